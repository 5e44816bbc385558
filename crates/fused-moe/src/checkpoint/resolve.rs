//! A family and a config.json to the description of a layer.

use super::error::{Error, Result};
use super::family::*;
use super::fit;
use super::model_config::{ModelConfig, Within};
use fused_moe_core::config::{
    Activation, Capacity, CapacityLimit, CapacityOrder, ExpertScale, Function, GateConfig, GateNorm, Groups,
    LayerConfig, Normalize, Norms, RmsNorm, RouterMlp, RoutingRule, Selection, SharedConfig, WeightRule, ZeroExperts,
};
use serde_json::Value;
use std::collections::HashSet;

/// More layers than any model has; keeps a hostile number from filling memory.
const MAX_LAYERS: usize = 1 << 16;

/// The fields of config.json that say that a layer is dense, with their values.
pub(super) fn dense_by(config: &ModelConfig, family: &Family, layer: usize) -> Result<Vec<(String, String)>> {
    let rule = Rule::new(config, family.sparse)?;
    if rule.holds(config, layer)? {
        return Ok(vec![config.named(family.experts, layer)]);
    }
    let named = rule.fields().into_iter().filter(|field| config.has(field)).map(|field| match rule.sparse {
        Some(Sparse::Kind { .. } | Sparse::Marked(_)) => config.named(field, layer),
        _ => config.whole(field),
    });
    let named: Vec<_> = named.collect();
    let unsaid = || vec![("model_type".to_owned(), format!("{:?}", config.model_type()))];
    Ok(if named.is_empty() { unsaid() } else { named })
}

/// How many layers the model has, and which of them have experts; `is_stored` is asked for a layer's router.
pub(super) fn layers(
    config: &ModelConfig,
    family: &Family,
    is_stored: impl Fn(usize) -> bool,
) -> Result<(usize, Vec<usize>)> {
    let count = layer_count(config, family)?;
    Ok((count, moe_layers(config, family, count, is_stored)?))
}

fn layer_count(config: &ModelConfig, family: &Family) -> Result<usize> {
    let count = match config.length(family.kinds) {
        Some(count) => count,
        None => config.size(family.layers, 0)?,
    };
    if count <= MAX_LAYERS {
        return Ok(count);
    }
    let name = family.kinds.first().or(family.layers.first()).unwrap_or(&"");
    Err(config.wrong(name, "at most 65536 layers", &Value::from(count)))
}

/// Which of `count` layers have experts. A layer whose number of experts is 0 has none.
fn moe_layers(
    config: &ModelConfig,
    family: &Family,
    count: usize,
    is_stored: impl Fn(usize) -> bool,
) -> Result<Vec<usize>> {
    let rule = Rule::new(config, family.sparse)?;
    // a number that is none is the layer's error, not the model's
    let empty = |layer| matches!(config.optional_size(family.experts, layer), Ok(Some(0)));
    let assumed = matches!(rule.sparse, Some(Sparse::Behind(_)));
    let mut layers = Vec::new();
    for layer in 0..count {
        if (rule.holds(config, layer)? || assumed && is_stored(layer)) && !empty(layer) {
            layers.push(layer);
        }
    }
    Ok(layers)
}

/// The rule of several that decides, with the layers that its field lists.
struct Rule {
    /// None: every layer.
    sparse: Option<Sparse>,
    listed: HashSet<u64>,
}

impl Rule {
    fn new(config: &ModelConfig, rules: &[Sparse]) -> Result<Self> {
        let decides = |rule: &&Sparse| match **rule {
            Sparse::Kind { field, .. } | Sparse::Letter { field, .. } | Sparse::Listed(field) => config.has(field),
            Sparse::From { first } => config.has(first),
            Sparse::Marked(field) => config.length(field).is_some(),
            _ => true,
        };
        let sparse = rules.iter().find(decides).copied();
        let listed = match sparse {
            Some(Sparse::Listed(field)) => config.list(field)?.unwrap_or_default(),
            Some(Sparse::Step { except, default, .. }) => config.list(except)?.unwrap_or_else(|| default.to_vec()),
            Some(Sparse::Letter { field, moe }) => {
                let letters = (0..).zip(config.text(field, 0)?.unwrap_or_default().chars());
                letters.filter(|&(_, letter)| letter == moe).map(|(layer, _)| layer).collect()
            }
            _ => Vec::new(),
        };
        Ok(Self { sparse, listed: listed.into_iter().collect() })
    }

    /// What it goes by.
    fn fields(&self) -> Vec<Field> {
        match self.sparse.unwrap_or(Sparse::Every) {
            Sparse::Every | Sparse::Behind(_) | Sparse::If(Flag::Never | Flag::Always) => Vec::new(),
            Sparse::Kind { field, .. } | Sparse::Letter { field, .. } => vec![field],
            Sparse::Listed(field) | Sparse::Marked(field) => vec![field],
            Sparse::From { first: field } | Sparse::Before { end: field, .. } => vec![field],
            Sparse::EveryFrom { first, step, .. } => vec![first, step],
            Sparse::Step { step, except, .. } => vec![step, except],
            Sparse::Range { first, last, interval } => vec![first, last, interval],
            Sparse::Period { period, offset } => vec![period, offset],
            Sparse::SecondOf { step } | Sparse::LastOf { step } => vec![step],
            Sparse::If(Flag::Field { field, .. } | Flag::Not(field)) => vec![field],
        }
    }

    fn holds(&self, config: &ModelConfig, layer: usize) -> Result<bool> {
        let is_listed = || self.listed.contains(&(layer as u64));
        Ok(match self.sparse.unwrap_or(Sparse::Every) {
            Sparse::Every => true,
            Sparse::Kind { field, moe } => {
                let kind = config.text(field, layer)?.ok_or_else(|| config.missing(field))?;
                moe.contains(&kind)
            }
            Sparse::Listed(_) | Sparse::Letter { .. } => is_listed(),
            Sparse::Marked(field) => config.size(field, layer)? != 0,
            Sparse::From { first } => layer >= config.optional_size(first, layer)?.unwrap_or(0),
            Sparse::Behind(first) => layer >= first,
            Sparse::Before { end, default } => layer < config.optional_size(end, layer)?.unwrap_or(default),
            Sparse::EveryFrom { first, default, step } => {
                layer >= config.optional_size(first, layer)?.unwrap_or(default)
                    && layer.is_multiple_of(divisor(config, step)?)
            }
            Sparse::Step { step, .. } => (layer + 1).is_multiple_of(divisor(config, step)?) && !is_listed(),
            Sparse::Range { first, last, interval } => {
                layer >= config.optional_size(first, layer)?.unwrap_or(0)
                    && config.optional_last(last, layer)?.is_none_or(|last| layer <= last)
                    && (layer + 1).is_multiple_of(divisor(config, interval)?)
            }
            Sparse::Period { period, offset } => {
                layer % divisor(config, period)? == config.optional_size(offset, layer)?.unwrap_or(0)
            }
            Sparse::SecondOf { step } => match config.optional_size(step, layer)?.unwrap_or(1) {
                0 => false,
                1 => true,
                step => layer % step == 1,
            },
            // of 0 only 0 is a multiple
            Sparse::LastOf { step } => (layer + 1).is_multiple_of(config.optional_size(step, layer)?.unwrap_or(1)),
            Sparse::If(flag) => config.flag(flag, layer)?,
        })
    }
}

fn divisor(config: &ModelConfig, field: Field) -> Result<usize> {
    match config.optional_size(field, 0)? {
        None => Ok(1),
        Some(0) => Err(config.wrong(field.first().unwrap_or(&""), "a number from 1 on", &Value::from(0))),
        Some(n) => Ok(n),
    }
}

/// The description of one layer, checked.
pub(super) fn layer_config(config: &ModelConfig, family: &Family, layer: usize) -> Result<LayerConfig> {
    for &(field, what) in family.unread {
        if config.flag(Flag::Field { field, default: Some(false) }, layer)? {
            let known = format!("false, as {what} are not read");
            return Err(config.unsupported(field.first().unwrap_or(&""), &known, &Value::from(true)));
        }
    }
    let mut routing = routing(config, config.case(family.routing, layer)?, layer)?;
    if let Some(table) = &family.table
        && Rule::new(config, table.layers)?.holds(config, layer)?
    {
        routing.selection = Selection::Table;
    }
    let always = match family.always {
        Some(always) => config.count(Size::Field(always.count), layer)?,
        None => 0,
    };
    routing.always = always;
    let unweighted = family.zero_experts.is_some_and(|zero| !zero.weighted);
    if !family.expert_scale.is_empty() || unweighted {
        routing.weights.expert_scale = Some(ExpertScale::AfterNormalize);
    }
    let top_k = match family.top_k {
        Size::Fixed(top_k) => top_k,
        Size::Field(field) => config.size(field, layer)?,
    };
    let intermediate = intermediate(config, family);
    let shared = match &family.shared {
        Some(described) => shared(config, described, layer)?,
        None => None,
    };
    // what the shared expert's share of the sum is, the routed experts' is too
    let both = shared.map_or(1.0, |shared| shared.scale);
    let described = LayerConfig {
        gate: gate(config, family, layer)?,
        routing,
        activation: activation(config, family.activation, layer)?,
        weight_on: family.weight_on,
        routed_scale: both * config.number(*config.case(family.routed_scale, layer)?, Within::Positive, layer)?,
        shared,
        zero_experts: match family.zero_experts {
            Some(Zero { count, output, .. }) => {
                Some(ZeroExperts { count: config.count(count, layer)?, output }).filter(|zero| zero.count > 0)
            }
            None => None,
        },
        capacity: match &family.capacity {
            Some(slots) => Some(capacity(config, slots, layer)?),
            None => None,
        },
        latent: match family.around.latent {
            Some(latent) => Some(config.count(Size::Field(latent.width), layer)?).filter(|&width| width > 0),
            None => None,
        },
        norms: norms(config, &family.around, layer)?,
        router_mlp: match family.router_mlp {
            Some(RouterLayers { width, eps, function, .. }) => {
                let eps = config.number(eps, Within::NotNegative, layer)?;
                Some(RouterMlp { width: config.size(width, layer)?, eps, function })
            }
            None => None,
        },
        ..LayerConfig::new(
            config.size(family.hidden, layer)?,
            config.size(intermediate, layer)?,
            config.size(family.experts, layer)?.saturating_add(always),
            top_k.saturating_add(always),
        )
    };
    fit::check(config, family, &described, layer)?;
    match described.check() {
        Ok(()) => Ok(described),
        Err(source) => Err(Error::Config { config: config.path().into(), source: source.into() }),
    }
}

/// The field of I.
pub(super) fn intermediate(config: &ModelConfig, family: &Family) -> Field {
    match family.intermediate_beside {
        Some([beside, intermediate]) if config.has(beside) => intermediate,
        _ => family.intermediate,
    }
}

fn gate(config: &ModelConfig, family: &Family, layer: usize) -> Result<GateConfig> {
    let norm = match family.router_norm {
        Some((_, eps)) => Some(GateNorm { eps: config.number(eps, Within::NotNegative, layer)?, feeds_experts: false }),
        None => None,
    };
    let softcap = config.optional_number(family.softcap, Within::Finite, layer)?.filter(|&cap| cap > 0.0);
    Ok(GateConfig { norm, scale: config.number(family.router_scale, Within::Positive, layer)?, softcap })
}

fn capacity(config: &ModelConfig, slots: &Slots, layer: usize) -> Result<Capacity> {
    let fraction = match slots.fraction {
        [] => 0.0,
        field => config.optional_precise(field, Within::AtMostOne, layer)?.ok_or_else(|| config.missing(field))?,
    };
    let limit = if fraction > 0.0 {
        CapacityLimit::Fraction(fraction)
    } else {
        match (config.optional_size(slots.count, layer)?, slots.share) {
            (Some(count), _) => CapacityLimit::Slots(count),
            (None, Some(factor)) => CapacityLimit::EvenShare { factor },
            (None, None) => return Err(config.missing(slots.count)),
        }
    };
    let by_score = config.flag(slots.by_score, layer)?;
    let order = if by_score { CapacityOrder::Score } else { CapacityOrder::Position };
    let renormalize = config.flag(slots.renormalize, layer)?.then_some(f32::EPSILON);
    Ok(Capacity { limit, order, renormalize })
}

fn norms(config: &ModelConfig, around: &Around, layer: usize) -> Result<Norms> {
    let norm = |norm: Option<Rms>| -> Result<Option<RmsNorm>> {
        let Some(Rms { eps, unit_offset, scaled_first, .. }) = norm else { return Ok(None) };
        Ok(Some(RmsNorm { eps: config.number(eps, Within::NotNegative, layer)?, unit_offset, scaled_first }))
    };
    Ok(Norms {
        experts_in: norm(around.experts_in)?,
        expert_out: norm(around.expert_out)?,
        routed_out: norm(around.routed_out)?,
        shared_in: norm(around.shared_in)?,
        shared_out: norm(around.shared_out)?,
        out: norm(around.out)?,
    })
}

fn routing(config: &ModelConfig, routing: &Routing, layer: usize) -> Result<RoutingRule> {
    let selection = match routing.select {
        Select::TopK { by, bias, groups: fields } => Selection::TopK {
            by,
            bias: config.flag(bias, layer)?,
            groups: match fields {
                Some(fields) => groups(config, fields, layer)?,
                None => None,
            },
        },
        Select::SparseMixer { jitter } => {
            Selection::SparseMixer { jitter: config.number(jitter, Within::NotNegative, layer)? }
        }
    };
    let normalize = match routing.normalize {
        Norm::Never => Normalize::None,
        Norm::Sum { when, eps } if config.flag(when, layer)? => Normalize::Sum { eps },
        Norm::Sum { .. } => Normalize::None,
        Norm::AtLeast(min) => Normalize::SumAtLeast { min: config.number(min, Within::NotNegative, layer)? },
        Norm::Lp { p, .. } if config.is_null(p, layer) => Normalize::None,
        Norm::Lp { p, default } => {
            Normalize::Lp { p: config.optional_number(p, Within::Positive, layer)?.unwrap_or(default) }
        }
    };
    let scale = config.number(routing.scale, Within::Positive, layer)?;
    let weights = WeightRule { value: routing.value, normalize, scale, ..WeightRule::default() };
    Ok(RoutingRule { score: *config.case(routing.score, layer)?, selection, weights, always: 0 })
}

fn groups(config: &ModelConfig, fields: GroupFields, layer: usize) -> Result<Option<Groups>> {
    let GroupFields { count, keep, score, masked } = fields;
    match config.optional_size(count, layer)? {
        None | Some(1) => Ok(None),
        Some(count) => Ok(Some(Groups { count, keep: config.size(keep, layer)?, score, masked })),
    }
}

fn activation(config: &ModelConfig, act: Act, layer: usize) -> Result<Activation> {
    Ok(match act {
        Act::Gated { named, default } => Activation::Gated(function(config, named, default, layer)?),
        Act::Plain { named, default } => Activation::Plain(function(config, named, default, layer)?),
        Act::ClampedSilu { limit: Number::Field { field, .. } } if config.is_null(field, layer) => {
            Activation::default()
        }
        Act::ClampedSilu { limit } => match config.number(limit, Within::NotNegative, layer)? {
            0.0 => Activation::default(),
            limit => Activation::ClampedSilu { limit },
        },
        Act::ClampedSwish { alpha, limit } => Activation::ClampedSwish {
            alpha: config.number(alpha, Within::Finite, layer)?,
            limit: config.number(limit, Within::Positive, layer)?,
        },
        Act::SiluThenClamp { limit } => match config.optional_number(limit, Within::NotNegative, layer)? {
            Some(limit) if limit != 0.0 => Activation::SiluThenClamp { limit },
            _ => Activation::default(),
        },
        Act::SoftcappedSilu { gate_cap, up_cap } => Activation::SoftcappedSilu {
            gate_cap: config.number(gate_cap, Within::Positive, layer)?,
            up_cap: config.number(up_cap, Within::Positive, layer)?,
        },
    })
}

fn function(config: &ModelConfig, field: Field, default: Function, layer: usize) -> Result<Function> {
    let Some(name) = config.text(field, layer)? else { return Ok(default) };
    match name {
        "silu" | "swish" => Ok(Function::Silu),
        "gelu_pytorch_tanh" | "gelu_new" | "gelu_fast" => Ok(Function::GeluTanh),
        "gelu" => Ok(Function::GeluErf),
        "relu" => Ok(Function::Relu),
        "relu2" => Ok(Function::ReluSquared),
        "linear" => Ok(Function::Identity),
        other => {
            let known = "silu, gelu, gelu_pytorch_tanh, relu, relu2 or linear";
            Err(config.unsupported(&config.named(field, layer).0, known, &Value::from(other)))
        }
    }
}

fn shared(config: &ModelConfig, shared: &Shared, layer: usize) -> Result<Option<SharedConfig>> {
    let times = match shared.times {
        Some(field) => config.optional_size(field, layer)?.unwrap_or(0),
        None => 1,
    };
    if times == 0 {
        return Ok(None);
    }
    let width = match config.optional_size(shared.width, layer)? {
        None if shared.optional => 0,
        width => width.ok_or_else(|| config.missing(shared.width))?,
    };
    if width == 0 {
        return Ok(None);
    }
    let intermediate = width
        .checked_mul(times)
        .ok_or_else(|| config.wrong(shared.width.first().unwrap_or(&""), "a size in memory", &Value::from(width)))?;
    Ok(Some(SharedConfig {
        intermediate,
        activation: activation(config, shared.activation, layer)?,
        gated: !shared.gate.is_empty(),
        scale: config.number(*config.case(shared.both, layer)?, Within::Positive, layer)?,
    }))
}
