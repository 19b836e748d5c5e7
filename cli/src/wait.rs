//! Waiting for a condition, with a deadline.

use std::time::Duration;

use tokio::time::Instant;

/// Between two looks: short against what is waited for, long against what a look costs.
const INTERVAL: Duration = Duration::from_millis(10);

/// Looks until there is an answer, or `None` at the deadline. Looks at least once.
///
/// # Errors
/// The first error of a look.
pub(crate) async fn until<T>(
    deadline: Instant,
    mut look: impl AsyncFnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<Option<T>> {
    loop {
        if let Some(answer) = look().await? {
            return Ok(Some(answer));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        tokio::time::sleep(INTERVAL).await;
    }
}
