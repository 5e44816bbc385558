//! The text that is learned: names that follow each other in some order, recited from anywhere on.

/// Random numbers: SplitMix64 (Steele, Lea, Flood, 2014).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    /// About normal, of variance 1.
    pub(crate) fn normal(&mut self) -> f32 {
        let sum: f32 = (0..12).map(|_| (self.next() >> 40) as f32 / (1u64 << 24) as f32).sum();
        sum - 6.0
    }
}

/// What is recited.
const LISTS: [&str; 10] = [
    "monday tuesday wednesday thursday friday saturday sunday",
    "january february march april may june july august september october november december",
    "mercury venus earth mars jupiter saturn uranus neptune",
    "zero one two three four five six seven eight nine ten eleven twelve",
    "red orange yellow green blue indigo violet",
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda omicron sigma tau omega",
    "hydrogen helium lithium beryllium boron carbon nitrogen oxygen fluorine neon",
    "aries taurus gemini cancer leo virgo libra scorpio sagittarius capricorn aquarius pisces",
    "do re mi fa sol la ti",
    "spring summer autumn winter",
];

/// Names of a sentence.
const NAMES: usize = 5;

/// Symbols: the letters, then the space, then the full stop.
pub(crate) const SYMBOLS: usize = 28;

/// A text of so many symbols.
pub(crate) fn text(length: usize, random: &mut Random) -> Vec<u8> {
    let mut text = Vec::with_capacity(length);
    while text.len() < length {
        let names: Vec<&str> = LISTS[random.below(LISTS.len())].split(' ').collect();
        let first = random.below(names.len());
        for i in 0..NAMES {
            text.extend(names[(first + i) % names.len()].bytes().map(|letter| letter - b'a'));
            text.push(if i + 1 < NAMES { 26 } else { 27 });
        }
    }
    text.truncate(length);
    text
}

/// Symbols as a person reads them.
pub(crate) fn readable(text: &[u8]) -> String {
    text.iter()
        .map(|&symbol| match symbol {
            26 => ' ',
            27 => '.',
            letter => char::from(b'a' + letter),
        })
        .collect()
}
