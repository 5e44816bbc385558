//! How the slots of a batch spread over the experts.

/// Numbers that follow from how many slots went to each expert.
///
/// ```
/// use fused_moe_core::Statistics;
/// let statistics = Statistics::from_counts(&[6, 2, 0, 0]);
/// assert_eq!((statistics.total, statistics.max, statistics.dead), (8, 6, 2));
/// assert_eq!((statistics.mean, statistics.imbalance), (2.0, 3.0));
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Statistics {
    /// Slots that went to an expert: the sum of the counts.
    pub total: u64,
    /// The largest count.
    pub max: u32,
    /// `total / E`.
    pub mean: f64,
    /// `max / mean`, from 1 (even) to E (all on one expert); 1 where nothing was routed.
    pub imbalance: f64,
    /// `-sum_e p[e] * ln p[e]` with `p[e] = count[e] / total`, in nats; 0 where nothing was routed.
    pub entropy: f64,
    /// `entropy / ln E`, from 0 (all on one expert) to 1 (even); 1 for E = 1 and where nothing was routed.
    pub entropy_normalized: f64,
    /// Experts with count 0.
    pub dead: usize,
}

impl Statistics {
    /// From the slots of each expert, `[E]`.
    pub fn from_counts(counts: &[u32]) -> Self {
        let mut total = 0u64;
        let mut max = 0;
        let mut dead = 0;
        for &count in counts {
            total += u64::from(count);
            max = max.max(count);
            dead += usize::from(count == 0);
        }
        let mut entropy = 0.0;
        for &count in counts {
            if count > 0 {
                let p = f64::from(count) / total as f64;
                entropy -= p * p.ln();
            }
        }
        let experts = counts.len() as f64;
        let mean = if counts.is_empty() { 0.0 } else { total as f64 / experts };
        let spread = total > 0 && counts.len() > 1;
        Self {
            total,
            max,
            mean,
            imbalance: if total > 0 { f64::from(max) / mean } else { 1.0 },
            // a single p = 1 leaves -0
            entropy: entropy.abs(),
            entropy_normalized: if spread { entropy.abs() / experts.ln() } else { 1.0 },
            dead,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn even_and_uneven() {
        let even = Statistics::from_counts(&[3, 3, 3, 3]);
        assert_eq!((even.total, even.max, even.mean, even.imbalance, even.dead), (12, 3, 3.0, 1.0, 0));
        assert!((even.entropy - 4f64.ln()).abs() < 1e-15 && (even.entropy_normalized - 1.0).abs() < 1e-15);
        let uneven = Statistics::from_counts(&[2, 1, 1, 0]);
        assert!((uneven.entropy - 1.5 * 2f64.ln()).abs() < 1e-15);
        assert!((uneven.entropy_normalized - 0.75).abs() < 1e-15);
        assert_eq!((uneven.imbalance, uneven.dead), (2.0, 1));
    }

    #[test]
    fn all_on_one() {
        let one = Statistics::from_counts(&[0, 7, 0]);
        assert_eq!((one.imbalance, one.entropy, one.entropy_normalized, one.dead), (3.0, 0.0, 0.0, 2));
        assert!(one.entropy.is_sign_positive());
    }

    #[test]
    fn nothing_and_one_expert() {
        let nothing = Statistics::from_counts(&[0, 0]);
        assert_eq!((nothing.total, nothing.imbalance, nothing.entropy, nothing.dead), (0, 1.0, 0.0, 2));
        assert_eq!((nothing.mean, nothing.entropy_normalized), (0.0, 1.0));
        let one = Statistics::from_counts(&[5]);
        assert_eq!((one.imbalance, one.entropy, one.entropy_normalized), (1.0, 0.0, 1.0));
        assert_eq!(Statistics::from_counts(&[]).mean, 0.0);
        assert_eq!(Statistics::from_counts(&[u32::MAX, u32::MAX]).total, 2 * u64::from(u32::MAX));
    }
}
