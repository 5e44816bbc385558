//! What a family of models is, as data: where its numbers are in config.json and its tensors in the files.
//!
//! Nothing here names a model; the entries are in `families`.

use fused_moe_core::config::{Function, GroupScore, Masked, Score, SelectBy, WeightOn, WeightValue, ZeroOutput};
use fused_moe_core::weights::{Orientation, StackLayout};
use std::fmt;

/// Names of one number in config.json, tried in order; dots lead into nested objects, and `.0` to a list's first entry.
/// A value that is a list has one entry a layer; one that is null is absent.
pub(super) type Field = &'static [&'static str];

/// Names of one tensor, tried in order, relative to the block (`../`: to the block's parent); `{e}` is the expert.
pub(super) type Names = &'static [&'static str];

/// Alternatives, of which the first that holds counts.
pub(super) type Cases<T> = &'static [Case<T>];

/// One alternative.
#[derive(Clone, Copy)]
pub(super) struct Case<T> {
    /// Fields and their values; an absent field agrees with any value.
    pub(super) when: &'static [(Field, &'static str)],
    pub(super) then: T,
}

/// A family of models.
#[derive(Clone, Copy)]
pub(super) struct Family {
    pub(super) name: &'static str,
    /// `model_type`s in config.json, each also with `_text` behind it.
    pub(super) model_types: &'static [&'static str],
    /// Flags that ask for what is not read, and what that is.
    pub(super) unread: &'static [(Field, &'static str)],
    /// What of the block is no part of the layer, if it has more.
    pub(super) beside: Option<&'static str>,
    /// What tensor names may begin with.
    pub(super) roots: Names,
    /// What follows: the MoE block, `{l}` being the layer.
    pub(super) blocks: Names,
    pub(super) layers: Field,
    /// A list or a text with an entry or a letter a layer, which goes before `layers`.
    pub(super) kinds: Field,
    pub(super) hidden: Field,
    pub(super) intermediate: Field,
    /// Where the first of two fields is there, the second is `intermediate`.
    pub(super) intermediate_beside: Option<[Field; 2]>,
    /// The routed ones; those of `always` come besides.
    pub(super) experts: Field,
    /// Those that are chosen; those of `always` come besides.
    pub(super) top_k: Size,
    pub(super) zero_experts: Option<Zero>,
    pub(super) always: Option<Always>,
    /// Which layers have experts: the first rule whose field is there decides.
    pub(super) sparse: &'static [Sparse],
    pub(super) router: Names,
    /// `[E, H]` or `[H, E]`.
    pub(super) router_lies: Orientation,
    /// What comes before the router's matrix.
    pub(super) router_mlp: Option<RouterLayers>,
    /// The norm of what the router reads: its weight `[H]` and eps.
    pub(super) router_norm: Option<(&'static str, Number)>,
    /// Factor on the router's product.
    pub(super) router_scale: Number,
    /// Empty: none.
    pub(super) router_bias: Names,
    /// Whether it is there.
    pub(super) router_biased: Flag,
    /// `c` of `c * tanh(logit / c)`; absent or not above 0: none.
    pub(super) softcap: Field,
    pub(super) correction_bias: Names,
    /// `[n, E]`, of which the first row counts.
    pub(super) correction_rows: usize,
    /// What its last entry is, whatever the file says.
    pub(super) correction_end: Option<f32>,
    /// `[E]`: what normalised weights are multiplied by. Empty: nothing.
    pub(super) expert_scale: Names,
    /// `[1]`: what all weights are multiplied by. Empty: nothing.
    pub(super) scale: Names,
    /// Whether it may be absent, which is 1.
    pub(super) scale_optional: bool,
    pub(super) table: Option<ByTable>,
    pub(super) routing: Cases<Routing>,
    pub(super) capacity: Option<Slots>,
    pub(super) activation: Act,
    pub(super) weight_on: WeightOn,
    pub(super) routed_scale: Cases<Number>,
    /// Tried in order: the first whose tensors are there with the right shapes.
    pub(super) matrices: &'static [Layout],
    /// `[H]`, added once to the routed sum: a bias of every expert, where the weights of a token sum to 1. Empty: none.
    pub(super) sum_bias: Names,
    pub(super) shared: Option<Shared>,
    pub(super) around: Around,
}

impl fmt::Debug for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// Layers whose experts follow from the token id.
#[derive(Clone, Copy)]
pub(super) struct ByTable {
    /// Which layers.
    pub(super) layers: &'static [Sparse],
    /// `[V, K]`, integers.
    pub(super) names: Names,
    pub(super) vocabulary: Field,
}

/// Experts without weights.
#[derive(Clone, Copy)]
pub(super) struct Zero {
    /// 0 and absent: none.
    pub(super) count: Size,
    pub(super) output: ZeroOutput,
    /// Whether a slot that goes there has its weight in the routes, or 0; for families without `expert_scale`.
    pub(super) weighted: bool,
}

/// Experts that every token goes to besides the chosen ones, scored by the same router: its last rows.
#[derive(Clone, Copy)]
pub(super) struct Always {
    /// 0 and absent: none.
    pub(super) count: Field,
    pub(super) matrices: &'static [Layout],
}

/// How many slots of a sequence an expert takes: the first of these that there is.
#[derive(Clone, Copy)]
pub(super) struct Slots {
    /// Whether all tokens of a call are one sequence.
    pub(super) whole_call: bool,
    /// A part of its tokens, not above 0 for none. Empty: none, else it must be there.
    pub(super) fraction: Field,
    /// So many.
    pub(super) count: Field,
    /// How many times the even share.
    pub(super) share: Option<usize>,
    /// Whether tokens come by their best score, or by their position.
    pub(super) by_score: Flag,
    /// Whether the weights of the slots that stay are divided by their sum.
    pub(super) renormalize: Flag,
}

/// The layers before the router's matrix: weights, with their biases.
#[derive(Clone, Copy)]
pub(super) struct RouterLayers {
    pub(super) width: Field,
    pub(super) function: Function,
    pub(super) down: [&'static str; 2],
    /// `[M]` or `[1]`; the first layer with experts may lack it.
    pub(super) state_scale: &'static str,
    pub(super) norm: &'static str,
    pub(super) eps: Number,
    pub(super) fc1: [&'static str; 2],
    pub(super) fc2: [&'static str; 2],
}

/// An RMSNorm.
#[derive(Clone, Copy)]
pub(super) struct Rms {
    /// `[H]`, or as wide as what it norms.
    pub(super) weight: &'static str,
    pub(super) eps: Number,
    /// Whether the factor is `1 + weight`.
    pub(super) unit_offset: bool,
    /// Whether it comes before the norm.
    pub(super) scaled_first: bool,
}

/// What stands around the experts.
#[derive(Clone, Copy)]
pub(super) struct Around {
    pub(super) latent: Option<Latent>,
    pub(super) experts_in: Option<Rms>,
    pub(super) expert_out: Option<Rms>,
    pub(super) routed_out: Option<Rms>,
    pub(super) shared_in: Option<Rms>,
    pub(super) shared_out: Option<Rms>,
    pub(super) out: Option<Rms>,
}

/// The projections of experts that work in a width L of their own.
#[derive(Clone, Copy)]
pub(super) struct Latent {
    /// L; 0 and absent: none.
    pub(super) width: Field,
    /// `[L, H]`.
    pub(super) down: &'static str,
    /// `[H, L]`.
    pub(super) up: &'static str,
}

/// A size.
#[derive(Clone, Copy)]
pub(super) enum Size {
    Fixed(usize),
    Field(Field),
}

/// A number.
#[derive(Clone, Copy)]
pub(super) enum Number {
    Fixed(f32),
    Field {
        field: Field,
        default: Option<f32>,
    },
    /// One divided by a field.
    Inverse(Field),
    /// One divided by the square root of a field.
    InverseRoot(Field),
    /// One less a field.
    OneLess(Field),
}

/// A condition.
#[derive(Clone, Copy)]
pub(super) enum Flag {
    Never,
    Always,
    /// Without a default the field must be there.
    Field {
        field: Field,
        default: Option<bool>,
    },
    /// The opposite of a field, false where it is absent.
    Not(Field),
}

/// Which layers have experts.
#[derive(Clone, Copy)]
pub(super) enum Sparse {
    Every,
    /// The layer's entry in a list of kinds is one of these.
    Kind {
        field: Field,
        moe: &'static [&'static str],
    },
    /// The layer's letter in a text.
    Letter {
        field: Field,
        moe: char,
    },
    /// The layer's number is in a list, or in a text between commas.
    Listed(Field),
    /// The layer's entry in a list of 0 and 1; a field that is no list does not decide.
    Marked(Field),
    /// `l >= n`.
    From {
        first: Field,
    },
    /// `l >= n`, and those before that have a router in the files: config.json says nothing.
    Behind(usize),
    /// `l < n`.
    Before {
        end: Field,
        default: usize,
    },
    /// `l >= n` and `l % step == 0`.
    EveryFrom {
        first: Field,
        default: usize,
        step: Field,
    },
    /// `(l + 1) % step == 0`, and not in the list of exceptions.
    Step {
        step: Field,
        except: Field,
        default: &'static [u64],
    },
    /// `first <= l <= last` and `(l + 1) % interval == 0`.
    Range {
        first: Field,
        last: Field,
        interval: Field,
    },
    /// `l % period == offset`.
    Period {
        period: Field,
        offset: Field,
    },
    /// `l % step == 1`, or every layer if the step is 1, or none if it is 0.
    SecondOf {
        step: Field,
    },
    /// `(l + 1) % step == 0`, or none if the step is 0.
    LastOf {
        step: Field,
    },
    /// All, or none.
    If(Flag),
}

/// How logits become routes.
#[derive(Clone, Copy)]
pub(super) struct Routing {
    pub(super) score: Cases<Score>,
    pub(super) select: Select,
    pub(super) value: WeightValue,
    pub(super) normalize: Norm,
    pub(super) scale: Number,
}

/// Which experts are chosen.
#[derive(Clone, Copy)]
pub(super) enum Select {
    TopK { by: SelectBy, bias: Flag, groups: Option<GroupFields> },
    SparseMixer { jitter: Number },
}

/// Where the groups are described; absent, null and 1 mean none.
#[derive(Clone, Copy)]
pub(super) struct GroupFields {
    pub(super) count: Field,
    pub(super) keep: Field,
    pub(super) score: GroupScore,
    pub(super) masked: Masked,
}

/// What weights are divided by.
#[derive(Clone, Copy)]
pub(super) enum Norm {
    Never,
    /// By their sum plus eps, if the flag says so.
    Sum {
        when: Flag,
        eps: f32,
    },
    AtLeast(Number),
    /// The L_p norm; null means nothing.
    Lp {
        p: Field,
        default: f32,
    },
}

/// An activation; `named` fields hold a function's name.
#[derive(Clone, Copy)]
pub(super) enum Act {
    Gated {
        named: Field,
        default: Function,
    },
    /// Without a gate.
    Plain {
        named: Field,
        default: Function,
    },
    /// A limit that is null or not above 0 is gated SiLU.
    ClampedSilu {
        limit: Number,
    },
    ClampedSwish {
        alpha: Number,
        limit: Number,
    },
    /// A limit of 0, null or none is gated SiLU.
    SiluThenClamp {
        limit: Field,
    },
    SoftcappedSilu {
        gate_cap: Number,
        up_cap: Number,
    },
}

/// How matrices lie in tensors. Of a shared expert, stacks may lack their first dimension.
#[derive(Clone, Copy)]
pub(super) enum Layout {
    /// A tensor each: `[I, H] [I, H] [H, I]`.
    Apart { gate: &'static str, up: &'static str, down: &'static str },
    /// The same without a gate: `[I, H] [H, I]`, and their biases `[I] [H]`.
    Plain { up: &'static str, down: &'static str, biases: Option<[&'static str; 2]> },
    /// Two stacks, and their biases.
    Joint { gate_up: &'static str, down: &'static str, layout: StackLayout, biases: Option<[&'static str; 2]> },
    /// Three stacks; `flat`: their first two dimensions are one.
    Stacks { gate: &'static str, up: &'static str, down: &'static str, layout: StackLayout, flat: bool },
}

/// The expert that every token goes to.
#[derive(Clone, Copy)]
pub(super) struct Shared {
    pub(super) matrices: &'static [Layout],
    /// Its width, 0 for none; times the second number if there is such a field, where absent and null are 0.
    pub(super) width: Field,
    /// Whether it may be absent, which is 0.
    pub(super) optional: bool,
    pub(super) times: Option<Field>,
    /// `[H]` or `[1, H]`; empty: not gated.
    pub(super) gate: Names,
    pub(super) activation: Act,
    /// Factor on its output and on the routed sum beside it.
    pub(super) both: Cases<Number>,
}
