use crate::error::Result;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

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

    /// `work(i)` for every i below `count`, some at once; a thread takes the next `grain` whenever it is free, so that all end
    /// together however fast each is, and memory is read about in the order of i.
    pub(crate) fn for_each(&self, count: usize, grain: usize, work: impl Fn(usize) + Send + Sync) {
        self.for_each_with([count, grain], || (), |(), i| work(i));
    }

    /// `work(state, i)` for every i below `count`, likewise; each thread makes a state of its own before its first.
    pub(crate) fn for_each_with<S>(
        &self,
        [count, grain]: [usize; 2],
        state: impl Fn() -> S + Send + Sync,
        work: impl Fn(&mut S, usize) + Send + Sync,
    ) {
        let (grain, next) = (grain.clamp(1, count.max(1)), AtomicUsize::new(0));
        let take = || {
            let first = next.fetch_add(grain, Ordering::Relaxed);
            (first < count).then(|| first..count.min(first + grain))
        };
        let threads = self.threads().min(count.div_ceil(grain));
        if threads <= 1 {
            serially(take, &state, &work);
        } else {
            self.install(|| together(threads, &|| serially(take, &state, &work)));
        }
    }
}

/// `work` on as many threads as are free, at most so many.
fn together(threads: usize, work: &(impl Fn() + Sync)) {
    if threads <= 1 {
        return work();
    }
    let left = threads / 2;
    rayon::join(|| together(left, work), || together(threads - left, work));
}

/// Apart, so that what `work` has on the stack is not also on the stack of a call that waits for other threads: a thread
/// that waits begins other work on top of it.
#[inline(never)]
fn serially<S>(take: impl Fn() -> Option<Range<usize>>, state: &impl Fn() -> S, work: &impl Fn(&mut S, usize)) {
    let Some(mut range) = take() else { return };
    let mut state = state();
    loop {
        range.for_each(|i| work(&mut state, i));
        let Some(next) = take() else { return };
        range = next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_is_done_once() {
        for threads in [1, 2, 3, 5] {
            let pool = Pool::with_threads(threads).unwrap();
            for (count, grain) in [(0, 0), (1, 0), (7, 1), (7, 3), (1000, 1), (1000, 999), (5, usize::MAX)] {
                let done: Vec<_> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                let states = AtomicUsize::new(0);
                let state = || states.fetch_add(1, Ordering::Relaxed);
                pool.for_each_with([count, grain], state, |_, i| {
                    done[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(states.load(Ordering::Relaxed) <= threads.min(count));
                assert!(
                    done.iter().all(|done| done.load(Ordering::Relaxed) == 1),
                    "{threads} threads, {count}, {grain}"
                );
            }
        }
    }
}
