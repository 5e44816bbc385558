//! Every case shows what it is about.

use super::*;
use crate::cases::Operation;
use crate::compare::{self, Comparison};
use crate::operands::{Expected, Prepared};
use crate::stage::Check;

/// The same layer with one part changed, and which.
fn changed(layer: &LayerCase) -> Vec<(&'static str, LayerConfig)> {
    let config = &layer.config;
    let mut all = Vec::new();
    // a device without the last expert has no copies
    let here = layer.local.as_ref().is_none_or(|local| local.contains(&(config.experts - 1)));
    if let (Some(ZeroExperts { count, output: ZeroOutput::Copy }), true) = (config.zero_experts, here) {
        let zero_experts = Some(ZeroExperts { count, output: ZeroOutput::Zero });
        all.push(("copies", LayerConfig { zero_experts, ..config.clone() }));
    }
    if let Some(capacity) = config.capacity.filter(|_| !matches!(layer.source, Origin::Routes(_))) {
        all.push(("capacity", LayerConfig { capacity: None, ..config.clone() }));
        let renormalize = if capacity.renormalize.is_some() { None } else { Some(0.0) };
        all.push((
            "renormalize",
            LayerConfig { capacity: Some(Capacity { renormalize, ..capacity }), ..config.clone() },
        ));
    }
    if let Some(mlp) = config.router_mlp.filter(|_| layer.source == Origin::Router) {
        let function = if mlp.function == Function::Relu { Function::Silu } else { Function::Relu };
        all.push(("function", LayerConfig { router_mlp: Some(RouterMlp { function, ..mlp }), ..config.clone() }));
        let eps = mlp.eps * 4.0;
        all.push(("router eps", LayerConfig { router_mlp: Some(RouterMlp { eps, ..mlp }), ..config.clone() }));
    }
    type Pick = fn(&mut Norms) -> &mut Option<RmsNorm>;
    let norms: [(&'static str, Pick); 6] = [
        ("experts_in", |norms| &mut norms.experts_in),
        ("expert_out", |norms| &mut norms.expert_out),
        ("routed_out", |norms| &mut norms.routed_out),
        ("shared_in", |norms| &mut norms.shared_in),
        ("shared_out", |norms| &mut norms.shared_out),
        ("out", |norms| &mut norms.out),
    ];
    for (name, pick) in norms {
        let mut without = config.clone();
        if let Some(norm) = pick(&mut without.norms).take() {
            all.push((name, without));
            let mut later = config.clone();
            *pick(&mut later.norms) = Some(RmsNorm { scaled_first: false, ..norm });
            if norm.scaled_first && layer.around.norm_weights {
                all.push(("what is scaled first", later));
            }
        }
    }
    all
}

fn verdict(expected: &Prepared, found: &Prepared) -> Comparison {
    let mut verdict = Comparison::default();
    for (want, got) in expected.outputs.iter().zip(&found.outputs) {
        verdict = verdict.worse(match (&want.expected, &got.expected) {
            (Expected::Floats { values, allowed }, Expected::Floats { values: found, .. }) => {
                compare::floats(want.name, want.shape, [values, allowed, found])
            }
            (Expected::Ids(ids), Expected::Ids(found)) => compare::ids(want.name, want.shape, [ids, found]),
            _ => Comparison::wrong("another kind".into()),
        });
    }
    verdict
}

/// A case whose tolerance hides a part that it is about would be no case.
#[test]
fn a_part_that_is_left_out_shows() {
    let mut hidden = Vec::new();
    for case in cases() {
        let Operation::Layer(layer) = &case.operation else { continue };
        // where many norms follow each other, the roundings of half precision add up to more than some of them do
        let precise = layer.dtypes[0] == DType::F32 || !case.name.contains("block");
        let nowhere = layer.source == Origin::Routes(Spread::Nowhere);
        if layer.tokens < 8 || layer.batches.is_some() || nowhere || !precise {
            continue;
        }
        let expected = layer.prepare();
        for (part, config) in changed(layer) {
            let other = LayerCase { config, ..(**layer).clone() };
            if verdict(&expected, &other.prepare()).failure.is_none() {
                hidden.push(format!("{part} of {}", case.id()));
            }
        }
    }
    assert!(hidden.is_empty(), "{hidden:#?}");
}
