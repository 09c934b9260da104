//! A lock for each name.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// What serialises changes of things that have names.
#[derive(Debug, Default)]
pub(crate) struct Locks(Mutex<HashMap<String, Arc<Mutex<()>>>>);

impl Locks {
    /// The lock of what has this name.
    pub(crate) fn of(&self, name: &str) -> Arc<Mutex<()>> {
        // Each use changes one entry at a time, so a panic elsewhere leaves nothing half done.
        let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Nobody can take one up meanwhile: that needs the map.
        locks.retain(|_, lock| Arc::strong_count(lock) > 1);
        Arc::clone(locks.entry(name.to_owned()).or_default())
    }
}
