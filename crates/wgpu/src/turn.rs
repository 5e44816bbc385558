//! Whose turn it is to record.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

/// A lock that the thread which holds it takes again: operations are made of operations.
#[derive(Debug, Default)]
pub(crate) struct Turn {
    /// Who holds it, and how often.
    holder: Mutex<Option<(ThreadId, usize)>>,
    free: Condvar,
}

/// The lock while it is held.
#[derive(Debug)]
pub(crate) struct Held<'a>(&'a Turn);

impl Turn {
    /// Waits until no other thread holds it.
    pub(crate) fn take(&self) -> Held<'_> {
        let own = thread::current().id();
        let mut holder = self.holder();
        loop {
            match &mut *holder {
                None => {
                    *holder = Some((own, 1));
                    return Held(self);
                }
                Some((thread, times)) if *thread == own => {
                    *times += 1;
                    return Held(self);
                }
                Some(_) => holder = self.free.wait(holder).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    fn holder(&self) -> MutexGuard<'_, Option<(ThreadId, usize)>> {
        self.holder.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut holder = self.0.holder();
        match &mut *holder {
            Some((_, times)) if *times > 1 => *times -= 1,
            _ => {
                *holder = None;
                self.0.free.notify_one();
            }
        }
    }
}
