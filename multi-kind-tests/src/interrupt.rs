//! Ctrl-C and SIGTERM: everything that waits, waits here, so that a lab is taken down at once.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Shared flag that can be waited on.
#[derive(Clone, Default)]
pub struct Interrupt {
    state: Arc<(Mutex<bool>, Condvar)>,
}

/// The run was interrupted by its user.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

impl Interrupt {
    /// A flag that SIGINT and SIGTERM set.
    ///
    /// # Errors
    /// If signal handlers cannot be installed.
    pub fn on_signals() -> std::io::Result<Self> {
        let interrupt = Self::default();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        let (mut int, mut term) = {
            let _guard = runtime.enter();
            use tokio::signal::unix::{SignalKind, signal};
            (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
        };
        let flag = interrupt.clone();
        std::thread::spawn(move || {
            runtime.block_on(async {
                tokio::select! { _ = int.recv() => {}, _ = term.recv() => {} }
            });
            flag.set();
        });
        Ok(interrupt)
    }

    /// Sets the flag.
    pub fn set(&self) {
        *self.state.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.state.1.notify_all();
    }

    /// Whether we were interrupted.
    pub fn is_set(&self) -> bool {
        *self.state.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for this long, or less if interrupted.
    ///
    /// # Errors
    /// [`Interrupted`] if the flag is set.
    pub fn wait(&self, duration: Duration) -> Result<(), Interrupted> {
        let set = self.state.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (set, _) = self
            .state
            .1
            .wait_timeout_while(set, duration, |set| !*set)
            .unwrap_or_else(PoisonError::into_inner);
        if *set { Err(Interrupted) } else { Ok(()) }
    }

    /// Calls `attempt` until it gives a value or the deadline has passed; then gives its last error.
    ///
    /// # Errors
    /// The last error of `attempt`, or [`Interrupted`].
    pub fn retry_until<T>(
        &self,
        deadline: Instant,
        pause: Duration,
        mut attempt: impl FnMut() -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        loop {
            let error = match attempt() {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            if error.is::<Interrupted>() || Instant::now() >= deadline {
                return Err(error);
            }
            self.wait(pause)?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_flag_ends_all_waiting() {
        let interrupt = Interrupt::default();
        assert!(interrupt.wait(Duration::ZERO).is_ok());
        interrupt.set();
        let begin = Instant::now();
        assert!(interrupt.wait(Duration::from_secs(60)).is_err());
        assert!(begin.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn retries_until_the_deadline() {
        let interrupt = Interrupt::default();
        let mut attempts = 0;
        let result: anyhow::Result<()> = interrupt.retry_until(Instant::now(), Duration::ZERO, || {
            attempts += 1;
            anyhow::bail!("not yet")
        });
        assert!(result.is_err());
        assert_eq!(attempts, 1);
    }
}
