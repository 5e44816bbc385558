//! What a device noticed while it computed, kept until it is asked for.

use std::fmt;

/// A set of conditions that raise no error where they occur, because nobody may wait for the device there.
///
/// A stream collects them; reading its status waits for the enqueued work, returns the set and clears it.
///
/// ```
/// use fused_moe_core::Status;
/// let status = Status::NO_FINITE_SCORE | Status::EXPERT_OUT_OF_RANGE;
/// assert!(status.contains(Status::NO_FINITE_SCORE) && !status.is_ok());
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[must_use = "a status that is not ok means that some tokens have no meaningful result"]
pub struct Status(u32);

impl Status {
    /// Nothing happened.
    pub const OK: Self = Self(0);
    /// A token had no finite router score; its weights are NaN, on experts 0..K.
    pub const NO_FINITE_SCORE: Self = Self(1);
    /// A route named an expert that does not exist; it contributed nothing.
    pub const EXPERT_OUT_OF_RANGE: Self = Self(2);
    /// A token id lay outside the table of experts; the token got no expert.
    pub const TOKEN_OUT_OF_RANGE: Self = Self(4);

    const NAMES: [(Self, &'static str); 3] = [
        (Self::NO_FINITE_SCORE, "a token without a finite router score"),
        (Self::EXPERT_OUT_OF_RANGE, "a route to an expert that does not exist"),
        (Self::TOKEN_OUT_OF_RANGE, "a token id outside the table of experts"),
    ];

    /// The status a device keeps as this word; bits without a name are dropped.
    pub const fn from_bits(bits: u32) -> Self {
        Self(bits & 7)
    }

    /// The word a device keeps.
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// Whether nothing happened.
    pub const fn is_ok(self) -> bool {
        self.0 == 0
    }

    /// Whether all of `other` happened.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl std::ops::BitOr for Status {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl std::ops::BitOrAssign for Status {
    fn bitor_assign(&mut self, other: Self) {
        self.0 |= other.0;
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_ok() {
            return f.write_str("ok");
        }
        let mut separator = "";
        for (flag, name) in Self::NAMES {
            if self.contains(flag) {
                write!(f, "{separator}{name}")?;
                separator = ", ";
            }
        }
        Ok(())
    }
}
