//! Whether the numbers of config.json fit each other: errors name its fields, where a layer's own check has only letters.

use super::error::Result;
use super::family::{Family, Field, Select, Size};
use super::model_config::ModelConfig;
use super::resolve::intermediate;
use fused_moe_core::config::{CapacityLimit, LayerConfig, Selection};
use fused_moe_core::problem::MAX_EXPERTS;
use serde_json::Value;

pub(super) fn check(config: &ModelConfig, family: &Family, described: &LayerConfig, layer: usize) -> Result<()> {
    let always = described.routing.always;
    let (routed, chosen) = (described.experts - always, described.top_k - always);
    let top_k: Field = match family.top_k {
        Size::Field(field) => field,
        Size::Fixed(_) => &[],
    };
    let wrong = |field: Field, expected: &str, n: usize| {
        Err(config.wrong(&config.named(field, layer).0, expected, &Value::from(n)))
    };
    let contradiction = |fields: &[Field], reason| {
        let given = fields.iter().filter(|field| config.has(field)).copied().collect::<Vec<_>>();
        Err(config.contradiction(&given, layer, reason))
    };
    for (field, size) in [
        (family.hidden, described.hidden),
        (intermediate(config, family), described.intermediate),
        (family.experts, routed),
        (top_k, chosen),
    ] {
        if size == 0 {
            return wrong(field, "a number from 1 on", 0);
        }
    }
    if routed > MAX_EXPERTS {
        return wrong(family.experts, "at most 4096 experts", routed);
    }
    let competing = described.choices() - always;
    if competing.saturating_add(always) > MAX_EXPERTS {
        return contradiction(&[family.experts, besides(family)], "more than 4096 experts");
    }
    if chosen > competing {
        return contradiction(&[top_k, family.experts], "a token cannot go to more experts than there are");
    }
    match (described.routing.selection, config.case(family.routing, layer)?.select) {
        (Selection::SparseMixer { .. }, _) if chosen != 2 => {
            return wrong(top_k, "2, as a sparse mixer has two passes", chosen);
        }
        (Selection::TopK { groups: Some(groups), .. }, Select::TopK { groups: Some(fields), .. }) => {
            if groups.count == 0 {
                return wrong(fields.count, "a number from 1 on", 0);
            }
            if !competing.is_multiple_of(groups.count) {
                return contradiction(&[fields.count, family.experts], "groups must be of one size");
            }
            if groups.keep == 0 {
                return wrong(fields.keep, "a number from 1 on", 0);
            }
            if groups.keep > groups.count {
                return contradiction(&[fields.keep, fields.count], "no more groups can be kept than there are");
            }
            if chosen > groups.keep * (competing / groups.count) {
                let fields = [top_k, fields.keep, fields.count, family.experts];
                return contradiction(&fields, "the groups that are kept have too few experts");
            }
        }
        _ => {}
    }
    match (&family.capacity, described.capacity) {
        (Some(slots), Some(capacity)) if capacity.limit == CapacityLimit::Slots(0) => {
            wrong(slots.count, "a number from 1 on", 0)
        }
        _ => Ok(()),
    }
}

/// The field of the experts that come besides the routed ones.
fn besides(family: &Family) -> Field {
    match (family.always, family.zero_experts) {
        (Some(always), _) => always.count,
        (_, Some(zero)) => match zero.count {
            Size::Field(field) => field,
            Size::Fixed(_) => &[],
        },
        _ => &[],
    }
}
