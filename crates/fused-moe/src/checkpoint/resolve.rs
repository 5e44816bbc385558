//! A family and a config.json to the description of a layer.

use super::error::{Error, Result};
use super::family::{Act, Family, Field, GroupFields, Norm, Routing, Select, Shared, Sparse};
use super::model_config::ModelConfig;
use fused_moe_core::config::{
    Activation, Function, Groups, LayerConfig, Normalize, RoutingRule, Selection, SharedConfig, WeightRule,
};
use serde_json::Value;

/// More layers than any model has; keeps a hostile number from filling memory.
const MAX_LAYERS: usize = 1 << 16;

/// How many layers the model has.
pub(super) fn layer_count(config: &ModelConfig, family: &Family) -> Result<usize> {
    let count = config.size(family.layers, 0)?;
    if count <= MAX_LAYERS {
        return Ok(count);
    }
    let (name, value) = config.lookup(family.layers, 0).unwrap_or((String::new(), &Value::Null));
    Err(config.wrong(&name, "at most 65536 layers", value))
}

/// Which of `count` layers have experts.
pub(super) fn moe_layers(config: &ModelConfig, family: &Family, count: usize) -> Result<Vec<usize>> {
    let decides = |rule: &&Sparse| match **rule {
        Sparse::Every => true,
        Sparse::Kind { field, .. } | Sparse::Listed(field) => {
            config.lookup(field, 0).is_some_and(|(_, v)| !v.is_null())
        }
        Sparse::From { first } => config.lookup(first, 0).is_some_and(|(_, v)| !v.is_null()),
        Sparse::Step { .. } | Sparse::Range { .. } | Sparse::Period { .. } => true,
    };
    let Some(rule) = family.sparse.iter().find(decides) else { return Ok((0..count).collect()) };
    let listed = match *rule {
        Sparse::Listed(field) | Sparse::Step { except: field, .. } => config.list(field)?.unwrap_or_default(),
        _ => Vec::new(),
    };
    let is_listed = |layer: usize| listed.contains(&(layer as u64));
    let kept = |layer: usize| -> Result<bool> {
        Ok(match *rule {
            Sparse::Every => true,
            Sparse::Kind { field, moe } => {
                let kind = config.text(field, layer)?.ok_or_else(|| config.missing(field))?;
                moe.contains(&kind)
            }
            Sparse::Listed(_) => is_listed(layer),
            Sparse::From { first } => layer >= config.optional_size(first, layer)?.unwrap_or(0),
            Sparse::Step { step, .. } => (layer + 1).is_multiple_of(divisor(config, step)?) && !is_listed(layer),
            Sparse::Range { first, last, interval } => {
                layer >= config.optional_size(first, layer)?.unwrap_or(0)
                    && config.optional_last(last, layer)?.is_none_or(|last| layer <= last)
                    && (layer + 1).is_multiple_of(divisor(config, interval)?)
            }
            Sparse::Period { period, offset } => {
                layer % divisor(config, period)? == config.optional_size(offset, layer)?.unwrap_or(0)
            }
        })
    };
    let mut layers = Vec::new();
    for layer in 0..count {
        if kept(layer)? {
            layers.push(layer);
        }
    }
    Ok(layers)
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
    let described = LayerConfig {
        routing: routing(config, config.case(family.routing, layer)?, layer)?,
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
        Norm::Lp { p, default } => match config.lookup(p, layer) {
            Some((_, Value::Null)) => Normalize::None,
            _ => Normalize::Lp { p: config.optional_number(p, layer)?.unwrap_or(default) },
        },
    };
    let scale = config.number(routing.scale, layer)?;
    let weights = WeightRule { value: routing.value, normalize, scale, ..WeightRule::default() };
    Ok(RoutingRule { score: routing.score, selection, weights })
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
        Act::Gated { named } => Activation::Gated(function(config, named, layer)?),
        Act::ClampedSilu { limit } => Activation::ClampedSilu { limit: config.number(limit, layer)? },
        Act::ClampedSwish { alpha, limit } => {
            Activation::ClampedSwish { alpha: config.number(alpha, layer)?, limit: config.number(limit, layer)? }
        }
        Act::SiluThenClamp { limit } => match config.optional_number(limit, layer)? {
            Some(limit) if limit != 0.0 => Activation::SiluThenClamp { limit },
            _ => Activation::default(),
        },
    })
}

fn function(config: &ModelConfig, field: Field, layer: usize) -> Result<Function> {
    let Some(name) = config.text(field, layer)? else { return Ok(Function::Silu) };
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
    let width = config.size(shared.width, layer)?;
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
