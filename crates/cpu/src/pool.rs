use crate::error::Result;
use rayon::prelude::*;
use std::sync::Arc;

/// The threads that share a call's work.
#[derive(Clone, Debug)]
pub(crate) struct Pool(Option<Arc<rayon::ThreadPool>>);

impl Pool {
    pub(crate) fn global() -> Self {
        Self(None)
    }

    pub(crate) fn of(pool: Arc<rayon::ThreadPool>) -> Self {
        Self(Some(pool))
    }

    pub(crate) fn with_threads(threads: usize) -> Result<Self> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
        Ok(Self(Some(Arc::new(pool))))
    }

    pub(crate) fn threads(&self) -> usize {
        self.0.as_ref().map_or_else(rayon::current_num_threads, |pool| pool.current_num_threads())
    }

    /// Runs `work` where [`for_each`](Self::for_each) needs no hand-over to the pool.
    pub(crate) fn install<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        match &self.0 {
            _ if self.threads() == 1 => work(),
            Some(pool) => pool.install(work),
            None if rayon::current_thread_index().is_some() => work(),
            None => rayon::join(work, || ()).0,
        }
    }

    /// `work(i)` for every i below `count`, in any order, some at once; at least `grain` successive ones on a thread.
    pub(crate) fn for_each(&self, count: usize, grain: usize, work: impl Fn(usize) + Send + Sync) {
        if count <= grain.max(1) || self.threads() == 1 {
            serially(count, work);
        } else {
            self.install(|| (0..count).into_par_iter().with_min_len(grain.max(1)).for_each(work));
        }
    }
}

/// Apart, so that what `work` has on the stack is not also on the stack of a call that waits for other threads: a thread
/// that waits begins other work on top of it.
#[inline(never)]
fn serially(count: usize, work: impl Fn(usize)) {
    (0..count).for_each(work);
}
