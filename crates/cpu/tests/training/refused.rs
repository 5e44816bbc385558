//! Operands that do not fit: a plain error that begins with the operation and names the operand, and nothing else.

mod layer;

use fused_moe_core::config::{Activation, ExpertScale, Function, RoutingRule, Score, WeightRule};
use fused_moe_core::operation::*;
use fused_moe_core::{Backend, BackendBackward, DType, HostView, HostViewMut, Permutation, Shape, View};
use fused_moe_cpu::{Cpu, Error};

const T: usize = 3;
const K: usize = 2;
const E: usize = 4;
const H: usize = 8;
const I: usize = 5;
const R: usize = T * K;
const N: usize = 2 * I;

/// Zeros of a format.
fn of(dtype: DType, shape: impl Into<Shape>) -> HostView<'static> {
    const ZEROS: [u32; 512] = [0; 512];
    View::new(bytemuck::cast_slice(&ZEROS), dtype, 0, shape).unwrap()
}

fn floats(shape: impl Into<Shape>) -> HostView<'static> {
    of(DType::F32, shape)
}

fn ids(shape: impl Into<Shape>) -> HostView<'static> {
    of(DType::U32, shape)
}

/// Memory to write to, which is left behind.
fn out<'a>(shape: impl Into<Shape>) -> HostViewMut<'a> {
    View::new(bytemuck::cast_slice_mut(vec![0u32; 512].leak()), DType::F32, 0, shape).unwrap()
}

fn half_out<'a>(shape: impl Into<Shape>) -> HostViewMut<'a> {
    View::new(bytemuck::cast_slice_mut(vec![0u32; 512].leak()), DType::F16, 0, shape).unwrap()
}

fn gradient<'a>(shape: impl Into<Shape>) -> Option<Gradient<'a, Cpu>> {
    Some(Gradient::assign(out(shape)))
}

fn half_gradient<'a>(shape: impl Into<Shape>) -> Option<Gradient<'a, Cpu>> {
    Some(Gradient::assign(half_out(shape)))
}

fn permutation<'a>() -> Permutation<'a, Cpu> {
    Permutation { row_slot: ids([R]), slot_row: ids([R]), offsets: ids([E + 1]) }
}

/// Changes of operands that are right, and what the error must begin with.
type Changes<'a, O> = &'a [(&'a str, fn(&mut O))];

/// Every change is refused, and the operands as they were are not.
fn refused<O>(operation: &str, valid: fn() -> O, run: impl Fn(&Cpu, O) -> Result<(), Error>, changes: Changes<'_, O>) {
    let cpu = Cpu::with_threads(1).unwrap();
    run(&cpu, valid()).unwrap();
    for (beginning, change) in changes {
        let mut operands = valid();
        change(&mut operands);
        let message = run(&cpu, operands).expect_err(beginning).to_string();
        assert!(message.starts_with(&format!("{operation}: {beginning} ")), "{beginning}: {message}");
    }
}

#[test]
fn down() {
    let valid = || DownBackward::<Cpu> {
        d_out: floats([T, H]),
        rows: RowSource::Tokens { top_k: K },
        permutation: permutation(),
        row_weights: Some(RowWeights { weights: Some(floats([T, K])), row_slot: None, scale: 1.0 }),
        a: Some(floats([R, I])),
        matrices: floats([E, H, I]),
        d_a: Some(out([R, I])),
        d_down: gradient([E, H, I]),
        d_bias: gradient([E, H]),
    };
    let run = |cpu: &Cpu, operands| cpu.down_backward(&cpu.stream()?, operands);
    refused(
        "down_backward",
        valid,
        run,
        &[
            ("d_out", |op| op.d_out = floats([T, H + 1])),
            ("d_out", |op| op.d_out = ids([T, H])),
            ("d_out", |op| op.rows = RowSource::Rows),
            ("rows.top_k", |op| op.rows = RowSource::Tokens { top_k: 0 }),
            ("rows.top_k", |op| op.d_out = floats([T + 1, H])),
            ("permutation.row_slot", |op| op.permutation.row_slot = floats([R])),
            ("permutation.offsets", |op| op.permutation.offsets = floats([E + 1])),
            ("E", |op| op.permutation.offsets = ids([1])),
            ("row_weights.weights", |op| {
                op.row_weights = Some(RowWeights { weights: Some(floats([T, K + 1])), row_slot: None, scale: 1.0 });
            }),
            ("row_weights.row_slot", |op| {
                op.row_weights = Some(RowWeights { weights: None, row_slot: Some(ids([R])), scale: 1.0 });
            }),
            ("row_weights.scale", |op| {
                op.row_weights = Some(RowWeights { weights: None, row_slot: None, scale: f32::NAN });
            }),
            ("a", |op| op.a = Some(floats([R, I - 1]))),
            ("a", |op| op.a = Some(ids([R, I]))),
            ("a", |op| op.a = None),
            ("matrices", |op| op.matrices = ids([E, H, I])),
            ("matrices", |op| op.matrices = floats([E + 1, H, I])),
            ("d_a", |op| op.d_a = Some(out([R + 1, I]))),
            ("d_down", |op| op.d_down = gradient([E, I, H])),
            ("d_bias", |op| op.d_bias = gradient([E, I])),
        ],
    );
}

#[test]
fn gate_up() {
    let valid = || GateUpBackward::<Cpu> {
        d_z: floats([R, N]),
        x: Some(floats([T, H])),
        rows: RowSource::Tokens { top_k: K },
        permutation: permutation(),
        input_weights: Some(floats([T, K])),
        matrices: floats([E, N, H]),
        d_rows: Some(out([R, H])),
        d_gate_up: gradient([E, N, H]),
        d_bias: gradient([E, N]),
    };
    let run = |cpu: &Cpu, operands| cpu.gate_up_backward(&cpu.stream()?, operands);
    refused(
        "gate_up_backward",
        valid,
        run,
        &[
            ("d_z", |op| op.d_z = floats([R, I])),
            ("d_z", |op| op.d_z = ids([R, N])),
            ("x", |op| op.x = Some(floats([T, H - 1]))),
            ("x", |op| op.x = None),
            ("input_weights", |op| op.input_weights = Some(floats([T]))),
            ("input_weights", |op| op.input_weights = Some(of(DType::F16, [T, K]))),
            ("matrices", |op| op.matrices = floats([E * N, H])),
            ("d_rows", |op| op.d_rows = Some(out([T, H]))),
            ("d_gate_up", |op| op.d_gate_up = gradient([E, H, N])),
            ("d_bias", |op| op.d_bias = gradient([E, I])),
        ],
    );
}

#[test]
fn activation() {
    let valid = || ActivationBackward::<Cpu> {
        activation: Activation::default(),
        operands: ActivationBackwardOperands::Halves { gate_up: floats([R, N]), d_gate_up: out([R, N]) },
        d_a: floats([R, I]),
        row_weights: Some(RowWeights { weights: Some(floats([T, K])), row_slot: Some(ids([R])), scale: 1.0 }),
        a: Some(out([R, I])),
    };
    let run = |cpu: &Cpu, operands| cpu.activation_backward(&cpu.stream()?, operands);
    refused(
        "activation_backward",
        valid,
        run,
        &[
            ("d_a", |op| op.d_a = ids([R, I])),
            ("gate_up", |op| op.d_a = floats([R, I + 1])),
            ("d_gate_up", |op| {
                op.operands = ActivationBackwardOperands::Halves { gate_up: floats([R, N]), d_gate_up: out([R, I]) };
            }),
            ("gate", |op| {
                let (up, d_gate, d_up) = (floats([R, I]), out([R, I]), out([R, I]));
                op.operands = ActivationBackwardOperands::Separate { gate: ids([R, I]), up, d_gate, d_up };
            }),
            ("d_up", |op| {
                let (gate, up, d_gate) = (floats([R, I]), floats([R, I]), out([R, I]));
                op.operands = ActivationBackwardOperands::Separate { gate, up, d_gate, d_up: out([T, I]) };
            }),
            ("operands", |op| op.activation = Activation::Plain(Function::Relu)),
            ("operands", |op| {
                op.operands = ActivationBackwardOperands::Plain { up: floats([R, I]), d_up: out([R, I]) };
            }),
            ("row_weights.row_slot", |op| {
                op.row_weights = Some(RowWeights { weights: None, row_slot: Some(floats([R])), scale: 1.0 });
            }),
            ("a", |op| op.a = Some(out([R, N]))),
        ],
    );
}

#[test]
fn combine() {
    let valid = || CombineBackward::<Cpu> {
        weights: Some(floats([T, K])),
        d_rows: Some(RowsGradient::Permuted { d_y: out([R, H]), slot_row: ids([R]) }),
        d_weights: Some(WeightsGradient {
            from: WeightsFrom::Rows(SlotRows::Permuted { y: floats([R, H]), slot_row: ids([R]) }),
            out: Gradient::assign(out([T, K])),
        }),
        shared: Some(SharedBackward {
            y: Some(floats([T, H])),
            factor: None,
            logit: Some(floats([T])),
            scale: 1.0,
            d_y: Some(out([T, H])),
            d_gate: gradient([T]),
        }),
        ..CombineBackward::new(floats([T, H]), K)
    };
    let run = |cpu: &Cpu, operands| cpu.combine_backward(&cpu.stream()?, operands);
    fn intermediate(op: &mut CombineBackward<'_, Cpu>, [rows, cols]: [usize; 2], experts: HostView<'static>) {
        let bias = Some(DownBias { bias: floats([E, H]), experts });
        let (a, d_a, slot_row) = (floats([R, I]), floats([rows, cols]), ids([R]));
        let from = WeightsFrom::Intermediate { a, d_a, slot_row, bias };
        op.d_weights = Some(WeightsGradient { from, out: Gradient::assign(out([T, K])) });
    }
    refused(
        "combine_backward",
        valid,
        run,
        &[
            ("d_out", |op| op.d_out = ids([T, H])),
            ("weights", |op| op.weights = Some(floats([K, T]))),
            ("routed_scale", |op| op.routed_scale = f32::INFINITY),
            ("d_rows.d_y", |op| op.d_rows = Some(RowsGradient::Permuted { d_y: out([T, H]), slot_row: ids([R]) })),
            ("d_rows", |op| op.d_rows = Some(RowsGradient::Slots(out([R, I])))),
            ("slot_row", |op| op.d_rows = Some(RowsGradient::Permuted { d_y: out([R, H]), slot_row: floats([R]) })),
            ("d_weights.y", |op| {
                let from = WeightsFrom::Rows(SlotRows::Slots(floats([R, I])));
                op.d_weights = Some(WeightsGradient { from, out: Gradient::assign(out([T, K])) });
            }),
            ("d_weights.out", |op| {
                let from = WeightsFrom::Rows(SlotRows::Slots(floats([R, H])));
                op.d_weights = Some(WeightsGradient { from, out: Gradient::assign(half_out([T, K])) });
            }),
            ("d_weights.d_a", |op| intermediate(op, [R, I + 1], ids([T, K]))),
            ("d_weights.experts", |op| intermediate(op, [R, I], floats([T, K]))),
            ("shared.y", |op| op.shared.as_mut().unwrap().y = Some(floats([T, I]))),
            ("shared.y", |op| op.shared.as_mut().unwrap().y = None),
            ("shared.logit", |op| op.shared.as_mut().unwrap().factor = Some(floats([T]))),
            ("shared.factor", |op| op.shared.as_mut().unwrap().logit = None),
            ("shared.d_gate", |op| op.shared.as_mut().unwrap().d_gate = half_gradient([T])),
        ],
    );
}

#[test]
fn route() {
    fn rule() -> RoutingRule {
        let weights = WeightRule { expert_scale: Some(ExpertScale::AfterNormalize), ..WeightRule::default() };
        RoutingRule { weights, ..RoutingRule::default() }
    }
    let valid = || RouteBackward::<Cpu> {
        logits: floats([T, E]),
        experts: ids([T, K]),
        d_weights: floats([T, K]),
        rule: rule(),
        expert_scale: Some(floats([E])),
        d_logits: gradient([T, E]),
        d_expert_scale: gradient([E]),
    };
    let run = |cpu: &Cpu, operands| cpu.route_backward(&cpu.stream()?, operands);
    refused(
        "route_backward",
        valid,
        run,
        &[
            ("logits", |op| op.logits = ids([T, E])),
            ("experts", |op| op.experts = floats([T, K])),
            ("experts", |op| op.experts = ids([T + 1, K])),
            ("d_weights", |op| op.d_weights = floats([T, K + 1])),
            ("d_weights", |op| op.d_weights = of(DType::BF16, [T, K])),
            ("expert_scale", |op| op.expert_scale = None),
            ("expert_scale", |op| op.expert_scale = Some(floats([E + 1]))),
            ("d_logits", |op| op.d_logits = half_gradient([T, E])),
            ("d_expert_scale", |op| op.d_expert_scale = gradient([T])),
            ("d_expert_scale", |op| (op.rule.weights.expert_scale, op.expert_scale) = (None, None)),
        ],
    );
}

#[test]
fn gate() {
    let valid = || GateBackward::<Cpu> {
        d_logits: floats([T, E]),
        logits: Some(floats([T, E])),
        softcap: Some(30.0),
        scale: 1.0,
        n: Some(floats([T, H])),
        router: floats([E, H]),
        d_n: gradient([T, H]),
        d_router: gradient([E, H]),
        d_bias: gradient([E]),
    };
    let run = |cpu: &Cpu, operands| cpu.gate_backward(&cpu.stream()?, operands);
    refused(
        "gate_backward",
        valid,
        run,
        &[
            ("d_logits", |op| op.d_logits = of(DType::F16, [T, E])),
            ("d_logits", |op| op.d_logits = floats([T, H])),
            ("logits", |op| op.logits = None),
            ("logits", |op| op.logits = Some(floats([E, T]))),
            ("softcap", |op| op.softcap = Some(0.0)),
            ("scale", |op| op.scale = f32::NAN),
            ("n", |op| op.n = None),
            ("n", |op| op.n = Some(floats([T, E]))),
            ("router", |op| op.router = ids([E, H])),
            ("d_n", |op| op.d_n = gradient([T, E])),
            ("d_router", |op| op.d_router = gradient([H, E])),
            ("d_bias", |op| op.d_bias = gradient([H])),
        ],
    );
}

#[test]
fn norm() {
    let valid = || NormBackward::<Cpu> {
        x: floats([T, H]),
        weight: Some(floats([H])),
        eps: 1e-6,
        d_n: floats([T, H]),
        d_x: gradient([T, H]),
        d_weight: gradient([H]),
    };
    let run = |cpu: &Cpu, operands| cpu.norm_backward(&cpu.stream()?, operands);
    refused(
        "norm_backward",
        valid,
        run,
        &[
            ("x", |op| op.x = ids([T, H])),
            ("weight", |op| op.weight = Some(floats([E]))),
            ("eps", |op| op.eps = -1.0),
            ("d_n", |op| op.d_n = floats([T + 1, H])),
            ("d_x", |op| op.d_x = gradient([T, E])),
            ("d_weight", |op| op.d_weight = gradient([T])),
        ],
    );
}

#[test]
fn losses() {
    let balance = || LoadBalanceLoss::<Cpu> {
        logits: floats([T, E]),
        experts: ids([T, K]),
        score: Score::Softmax,
        sequences: Some(ids([2])),
        coefficient: 0.1,
        loss: gradient([1]),
        d_logits: gradient([T, E]),
    };
    let run = |cpu: &Cpu, operands| cpu.load_balance_loss(&cpu.stream()?, operands);
    refused(
        "load_balance_loss",
        balance,
        run,
        &[
            ("logits", |op| op.logits = ids([T, E])),
            ("experts", |op| op.experts = floats([T, K])),
            ("score", |op| op.score = Score::Logit),
            ("sequences", |op| op.sequences = Some(floats([2]))),
            ("coefficient", |op| op.coefficient = f32::NAN),
            ("loss", |op| op.loss = gradient([2])),
            ("d_logits", |op| op.d_logits = gradient([T, K])),
        ],
    );
    let z =
        || ZLoss::<Cpu> { logits: floats([T, E]), coefficient: 0.1, loss: gradient([1]), d_logits: gradient([T, E]) };
    let run = |cpu: &Cpu, operands| cpu.z_loss(&cpu.stream()?, operands);
    refused(
        "z_loss",
        z,
        run,
        &[
            ("logits", |op| op.logits = ids([T, E])),
            ("coefficient", |op| op.coefficient = f32::INFINITY),
            ("loss", |op| op.loss = half_gradient([1])),
            ("d_logits", |op| op.d_logits = gradient([E, T])),
        ],
    );
}
