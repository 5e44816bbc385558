//! A family and a config.json to the description of a layer.

use super::error::{Error, Result};
use super::family::{Act, Family, Field, GroupFields, Norm, Number, Routing, Select, Shared, Sparse};
use super::model_config::ModelConfig;
use fused_moe_core::config::{
    Activation, Function, GateConfig, Groups, LayerConfig, Normalize, RoutingRule, Selection, SharedConfig, WeightRule,
};
use serde_json::Value;
use std::collections::HashSet;

/// More layers than any model has; keeps a hostile number from filling memory.
const MAX_LAYERS: usize = 1 << 16;

/// How many layers the model has, and which of them have experts.
pub(super) fn layers(config: &ModelConfig, family: &Family) -> Result<(usize, Vec<usize>)> {
    let count = layer_count(config, family)?;
    Ok((count, moe_layers(config, family, count)?))
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
fn moe_layers(config: &ModelConfig, family: &Family, count: usize) -> Result<Vec<usize>> {
    let rule = Rule::new(config, family.sparse)?;
    // a number that is none is the layer's error, not the model's
    let empty = |layer| matches!(config.optional_size(family.experts, layer), Ok(Some(0)));
    let mut layers = Vec::new();
    for layer in 0..count {
        if rule.holds(config, layer)? && !empty(layer) {
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
            _ => true,
        };
        let sparse = rules.iter().find(decides).copied();
        let listed = match sparse {
            Some(Sparse::Listed(field) | Sparse::Step { except: field, .. }) => config.list(field)?.unwrap_or_default(),
            Some(Sparse::Letter { field, moe }) => {
                let letters = (0..).zip(config.text(field, 0)?.unwrap_or_default().chars());
                letters.filter(|&(_, letter)| letter == moe).map(|(layer, _)| layer).collect()
            }
            Some(Sparse::Unlisted { field, default }) => config.list(field)?.unwrap_or_else(|| default.to_vec()),
            _ => Vec::new(),
        };
        Ok(Self { sparse, listed: listed.into_iter().collect() })
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
            Sparse::Unlisted { .. } => !is_listed(),
            Sparse::From { first } => layer >= config.optional_size(first, layer)?.unwrap_or(0),
            Sparse::Behind(first) => layer >= first,
            Sparse::Before { end, default } => layer < config.optional_size(end, layer)?.unwrap_or(default),
            Sparse::Step { step, .. } => (layer + 1).is_multiple_of(divisor(config, step)?) && !is_listed(),
            Sparse::Range { first, last, interval } => {
                layer >= config.optional_size(first, layer)?.unwrap_or(0)
                    && config.optional_last(last, layer)?.is_none_or(|last| layer <= last)
                    && (layer + 1).is_multiple_of(divisor(config, interval)?)
            }
            Sparse::Period { period, offset } => {
                layer % divisor(config, period)? == config.optional_size(offset, layer)?.unwrap_or(0)
            }
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
    let mut routing = routing(config, config.case(family.routing, layer)?, layer)?;
    if let Some(table) = &family.table
        && Rule::new(config, table.layers)?.holds(config, layer)?
    {
        routing.selection = Selection::Table;
    }
    let softcap = config.optional_number(family.softcap, layer)?.filter(|&cap| cap > 0.0);
    let described = LayerConfig {
        gate: GateConfig { softcap, ..GateConfig::default() },
        routing,
        activation: activation(config, family.activation, layer)?,
        weight_on: family.weight_on,
        routed_scale: config.number(*config.case(family.routed_scale, layer)?, layer)?,
        shared: match &family.shared {
            Some(described) => shared(config, described, layer)?,
            None => None,
        },
        ..LayerConfig::new(
            config.size(family.hidden, layer)?,
            config.size(family.intermediate, layer)?,
            config.size(family.experts, layer)?,
            config.size(family.top_k, layer)?,
        )
    };
    match described.check() {
        Ok(()) => Ok(described),
        Err(source) => Err(Error::Config { config: config.path().into(), source: source.into() }),
    }
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
        Select::SparseMixer { jitter } => Selection::SparseMixer { jitter: config.number(jitter, layer)? },
    };
    let normalize = match routing.normalize {
        Norm::Never => Normalize::None,
        Norm::Sum { when, eps } if config.flag(when, layer)? => Normalize::Sum { eps },
        Norm::Sum { .. } => Normalize::None,
        Norm::AtLeast(min) => Normalize::SumAtLeast { min: config.number(min, layer)? },
        Norm::Lp { p, .. } if config.is_null(p, layer) => Normalize::None,
        Norm::Lp { p, default } => Normalize::Lp { p: config.optional_number(p, layer)?.unwrap_or(default) },
    };
    let scale = config.number(routing.scale, layer)?;
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
        Act::Gated { named } => Activation::Gated(function(config, named, Function::Silu, layer)?),
        Act::Plain { named, default } => Activation::Plain(function(config, named, default, layer)?),
        Act::ClampedSilu { limit: Number::Field { field, .. } } if config.is_null(field, layer) => {
            Activation::default()
        }
        Act::ClampedSilu { limit } => match config.number(limit, layer)? {
            limit if limit <= 0.0 => Activation::default(),
            limit => Activation::ClampedSilu { limit },
        },
        Act::ClampedSwish { alpha, limit } => {
            Activation::ClampedSwish { alpha: config.number(alpha, layer)?, limit: config.number(limit, layer)? }
        }
        Act::SiluThenClamp { limit } => match config.optional_number(limit, layer)? {
            Some(limit) if limit != 0.0 => Activation::SiluThenClamp { limit },
            _ => Activation::default(),
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
            let expected = "silu, gelu, gelu_pytorch_tanh, relu, relu2 or linear";
            Err(config.wrong(field.first().unwrap_or(&""), expected, &Value::from(other)))
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
        scale: config.number(*config.case(shared.scale, layer)?, layer)?,
    }))
}
