//! How far the lists of one kind's records have got.

/// Between the begin of a list and its end, records that were not seen again are stale: they count as
/// before, and go when the list is complete.
#[derive(Debug)]
pub(super) struct Lists {
    number: u8,
    synced: bool,
    open: bool,
}

impl Default for Lists {
    fn default() -> Self {
        Self { number: 1, synced: false, open: false }
    }
}

impl Lists {
    /// The number of records that no list has confirmed.
    pub(super) const UNSEEN: u8 = 0;

    /// The current list's number: a record with another one was not seen in it.
    pub(super) fn number(&self) -> u8 {
        self.number
    }

    /// A list begins. `unsee` makes all records [`Self::UNSEEN`]: lists that never became complete may use
    /// up all numbers.
    pub(super) fn begin(&mut self, unsee: impl FnOnce()) {
        (self.synced, self.open) = (false, true);
        self.number = self.number.checked_add(1).unwrap_or_else(|| {
            unsee();
            1
        });
    }

    /// The list is complete.
    pub(super) fn finish(&mut self) {
        (self.synced, self.open) = (true, false);
    }

    /// All records are known, and none that is not there any more.
    pub(super) fn is_synced(&self) -> bool {
        self.synced
    }

    /// A list has begun that is not complete.
    pub(super) fn is_open(&self) -> bool {
        self.open
    }
}
