//! Which experts, and which of their matrix rows, a launch is given, where a binding does not hold all.

use std::ops::Range;

/// Experts and pairs of matrix rows of each: those of a launch, or of a buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    pub(crate) experts: Range<usize>,
    pub(crate) pairs: Range<usize>,
}

/// Windows in order, which together are all; as few as there is room for, and about as large as each other. `rows` says
/// how many rows lie between the first and the last of so many experts with so many pairs each, at most `room`.
///
/// Whole experts go together; one that is larger than the room is cut, at even pairs if more than one fits. `None`: not
/// even one pair fits.
pub(crate) fn windows(
    experts: usize,
    pairs: usize,
    room: usize,
    rows: impl Fn(usize, usize) -> usize,
) -> Option<Vec<Window>> {
    if experts == 0 || pairs == 0 {
        return Some(Vec::new());
    }
    let whole = most(experts, |n| rows(n, pairs) <= room);
    if whole > 0 {
        let window = |experts| Window { experts, pairs: 0..pairs };
        return Some(evenly(experts, whole, 1).map(window).collect());
    }
    let part = most(pairs, |n| rows(1, n) <= room);
    if part == 0 {
        return None;
    }
    let step = if part > 1 { 2 } else { 1 };
    let of = |e| evenly(pairs, part, step).map(move |pairs| Window { experts: e..e + 1, pairs });
    Some((0..experts).flat_map(of).collect())
}

/// The largest number up to `all` that fits; what is larger than one that does not, does not either.
fn most(all: usize, fits: impl Fn(usize) -> bool) -> usize {
    let (mut yes, mut no) = (0, all + 1);
    while no - yes > 1 {
        let middle = yes + (no - yes) / 2;
        if fits(middle) { yes = middle } else { no = middle }
    }
    yes
}

/// Ranges of at most `most`, a multiple of `step` each but the last.
fn evenly(all: usize, most: usize, step: usize) -> impl Iterator<Item = Range<usize>> {
    let most = most / step * step;
    let each = all.div_ceil(all.div_ceil(most)).next_multiple_of(step).min(most);
    (0..all).step_by(each).map(move |first| first..all.min(first + each))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of packed experts.
    fn packed(experts: usize, pairs: usize) -> usize {
        2 * experts * pairs
    }

    fn check(experts: usize, pairs: usize, room: usize, rows: impl Fn(usize, usize) -> usize + Copy) -> usize {
        let windows = windows(experts, pairs, room, rows).unwrap();
        let mut seen = vec![0; experts * pairs];
        for Window { experts, pairs: some } in &windows {
            assert!(rows(experts.len(), some.len()) <= room && !some.is_empty());
            experts.clone().for_each(|e| some.clone().for_each(|j| seen[e * pairs + j] += 1));
        }
        assert!(seen.iter().all(|&n| n == 1));
        windows.len()
    }

    #[test]
    fn all_in_one_where_there_is_room() {
        assert_eq!(check(128, 768, 2 * 128 * 768, packed), 1);
        assert_eq!(check(128, 768, 2 * 128 * 768 - 1, packed), 2);
        assert_eq!(windows(0, 5, 1, packed), Some(vec![]));
    }

    #[test]
    fn whole_experts_while_one_fits() {
        for room in 20..200 {
            let stack = |n: usize, pairs| (n - 1) * 20 + pairs;
            check(9, 10, room, packed);
            check(9, 10, room, stack);
            let windows = windows(9, 10, room, packed).unwrap();
            assert!(windows.iter().all(|window| window.pairs == (0..10)));
        }
    }

    #[test]
    fn an_expert_is_cut_where_it_must_be() {
        for room in 2..20 {
            check(3, 10, room, packed);
            for Window { pairs, .. } in windows(3, 10, room, packed).unwrap() {
                assert!(room < 4 || pairs.start % 2 == 0);
            }
        }
        assert_eq!(windows(3, 10, 1, packed), None);
        let mixtral = windows(8, 14336, (128 << 20) / 8192, packed).unwrap();
        assert_eq!(mixtral[..2].iter().map(|w| w.pairs.clone()).collect::<Vec<_>>(), [0..7168, 7168..14336]);
    }
}
