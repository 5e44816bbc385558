use crate::support::*;
use fused_moe_core::config::{Activation, Function};
use fused_moe_core::operation::{Down, GateUp, GateUpOutput, Linear, Matrices, RowSource};
use fused_moe_core::weights::{ExpertWeights, GateUpOrder, StackLayout};
use fused_moe_core::{Backend, DType, NO_EXPERT, Permutation, reference};
use fused_moe_cpu::{Cpu, Experts};

const ACTIVATIONS: [Activation; 4] = [
    Activation::Gated(Function::Silu),
    Activation::Gated(Function::GeluErf),
    Activation::ClampedSwish { alpha: 1.7, limit: 2.0 },
    Activation::Plain(Function::ReluSquared),
];

/// Routed rows and the matrices of their experts.
struct Case {
    size: [usize; 5],
    permutation: reference::Permutation,
    x: Buffer,
    rows: RowSource,
    input_weights: Option<Buffer>,
    gate_up: Buffer,
    gate_up_bias: Option<Buffer>,
    a: Buffer,
    down: Buffer,
    down_bias: Option<Buffer>,
    activation: Activation,
    output: GateUpOutput,
    out: DType,
    gap: usize,
}

fn case(random: &mut Random, [t, k, e, i, h]: [usize; 5], all_on_one: bool) -> Case {
    let r = t * k;
    let id = |random: &mut Random| match random.below(8) {
        0 => NO_EXPERT,
        _ if all_on_one => (e / 2) as u32,
        _ => random.below(e) as u32,
    };
    let ids: Vec<u32> = (0..r).map(|_| id(random)).collect();
    let permutation = reference::permute(&reference::Permute { ids: &ids, experts: e, local: 0..e });
    let activation = random.pick(&ACTIVATIONS);
    let output = random.pick(&[GateUpOutput::Activated, GateUpOutput::PreActivation]);
    let n = activation.gate_up_rows(i);
    let gap = random.pick(&[0, 3]);
    let rows = if random.flip() { RowSource::Tokens { top_k: k } } else { RowSource::Rows };
    let x_rows = if rows == RowSource::Rows { r } else { t };
    let mut floats = |dtype: DType, [rows, cols]: [usize; 2]| {
        Buffer::floats(dtype, [rows, cols], gap, &random.units(rows * cols, 1.0))
    };
    let x = floats(FLOATS[(t + h) % 3], [x_rows, h]);
    let a = floats(FLOATS[(t + i) % 3], [r, i]);
    let input_weights = floats(DType::F32, [t, k]);
    let biases = [floats(FLOATS[(h + e) % 3], [e, n]), floats(FLOATS[(i + e) % 3], [e, h])];
    let weight = random.pick(&FLOATS);
    let stack = |random: &mut Random, [e, n, c]: [usize; 3]| {
        Buffer::floats(weight, [e, n, c], gap, &random.units(e * n * c, 1.0))
    };
    let (gate_up, down) = (stack(random, [e, n, h]), stack(random, [e, h, i]));
    let [gate_up_bias, down_bias] = biases.map(|bias| random.flip().then_some(bias));
    let input_weights = random.flip().then_some(input_weights);
    let (out, size) = (random.pick(&FLOATS), [t, k, e, i, h]);
    Case {
        size,
        permutation,
        x,
        rows,
        input_weights,
        gate_up,
        gate_up_bias,
        a,
        down,
        down_bias,
        activation,
        output,
        out,
        gap,
    }
}

fn values(buffer: &Option<Buffer>) -> Option<Vec<f64>> {
    buffer.as_ref().map(Buffer::values)
}

impl Case {
    fn packed(&self, cpu: &Cpu) -> Experts {
        let order = if self.activation.is_gated() { GateUpOrder::GateThenUp } else { GateUpOrder::UpOnly };
        let layout = StackLayout { order, ..StackLayout::default() };
        let weights = ExpertWeights::stacked(self.gate_up.view(), self.down.view(), layout).unwrap();
        let bias = |buffer: &'static str| match buffer {
            "gate_up" => self.gate_up_bias.as_ref().map(|b| b.view()),
            _ => self.down_bias.as_ref().map(|b| b.view()),
        };
        cpu.pack(&weights.with_biases(bias("gate_up"), bias("down"), order).unwrap()).unwrap()
    }

    /// Runs with the matrices as a stack and packed, whose sums are formed in different orders.
    fn both(&self, cpu: &Cpu, run: impl Fn(Option<&Experts>) -> Buffer) -> Vec<Buffer> {
        vec![run(None), run(Some(&self.packed(cpu)))]
    }

    /// Rows that are no expert's must be as they were, the others close to what is expected.
    fn verify(&self, out: &Buffer, expected: &[f64], tolerance: impl Fn(usize) -> f64) {
        let width = expected.len().checked_div(self.permutation.row_slot.len()).unwrap_or(0);
        let used = *self.permutation.offsets.last().unwrap() as usize * width;
        let untouched = Buffer::new(self.out, [self.permutation.row_slot.len(), width], self.gap).values();
        let expected: Vec<_> = expected[..used].iter().chain(&untouched[used..]).copied().collect();
        close(out, &expected, tolerance);
    }

    fn check_gate_up(&self) {
        let [t, k, e, i, h] = self.size;
        let (r, n) = (t * k, self.activation.gate_up_rows(i));
        let (x, gate_up) = (self.x.values(), self.gate_up.values());
        let (bias, input_weights) = (values(&self.gate_up_bias), values(&self.input_weights));
        let permutation = &self.permutation;
        let gather = match self.rows {
            RowSource::Tokens { top_k } => Some(reference::Gather { row_slot: &permutation.row_slot, top_k }),
            RowSource::Rows => None,
        };
        let op = reference::GateUp {
            x: &x,
            gather,
            input_weights: input_weights.as_deref(),
            offsets: &permutation.offsets,
            gate_up: &gate_up,
            bias: bias.as_deref(),
            rows: r,
            hidden: h,
            outputs: n,
        };
        let before = reference::gate_up(&op);
        let halves = reference::PreActivation::Halves(&before);
        let (expected, width) = match self.output {
            GateUpOutput::PreActivation => (before.clone(), n),
            GateUpOutput::Activated => (reference::activation(self.activation, halves, r, i), i),
        };
        let (row_slot, offsets) =
            (Buffer::ids([r], 0, &permutation.row_slot), Buffer::ids([e + 1], 0, &permutation.offsets));
        let run = |cpu: &Cpu, stream: &_| {
            let one = |packed: Option<&Experts>| {
                let mut out = Buffer::new(self.out, [r, width], self.gap);
                let operands = GateUp {
                    x: self.x.view(),
                    rows: self.rows,
                    permutation: Permutation {
                        row_slot: row_slot.view(),
                        slot_row: row_slot.view(),
                        offsets: offsets.view(),
                    },
                    input_weights: self.input_weights.as_ref().map(|b| b.view()),
                    matrices: packed.map_or(Matrices::Stack(self.gate_up.view()), Matrices::Packed),
                    bias: self.gate_up_bias.as_ref().filter(|_| packed.is_none()).map(|b| b.view()),
                    activation: self.activation,
                    output: self.output,
                    out: out.view_mut(),
                };
                cpu.gate_up(stream, operands).unwrap();
                out
            };
            self.both(cpu, one)
        };
        // Products are at most one, and so are biases; an activation stretches an error by no more than its arguments.
        let rounding = (h + 2) as f64 * (h + 2) as f64 * DType::F32.epsilon();
        let stretch = |c: usize| {
            let (row, col) = (c / width * n, c % width);
            match self.output {
                GateUpOutput::PreActivation => 1.0,
                GateUpOutput::Activated => 4.0 * (2.0 + before[row + col].abs() + before[row + n - i + col].abs()),
            }
        };
        check(run, |outputs, _| outputs.iter().for_each(|out| self.verify(out, &expected, |c| rounding * stretch(c))));
    }

    fn check_down(&self) {
        let [t, k, e, i, h] = self.size;
        let (a, down, bias) = (self.a.values(), self.down.values(), values(&self.down_bias));
        let op = reference::Down {
            a: &a,
            offsets: &self.permutation.offsets,
            down: &down,
            bias: bias.as_deref(),
            rows: t * k,
            hidden: h,
            intermediate: i,
        };
        let expected = reference::down(&op);
        let offsets = Buffer::ids([e + 1], 0, &self.permutation.offsets);
        let run = |cpu: &Cpu, stream: &_| {
            let one = |packed: Option<&Experts>| {
                let mut out = Buffer::new(self.out, [t * k, h], self.gap);
                let bias = self.down_bias.as_ref().filter(|_| packed.is_none()).map(|b| b.view());
                let matrices = packed.map_or(Matrices::Stack(self.down.view()), Matrices::Packed);
                let operands = Down { a: self.a.view(), offsets: offsets.view(), matrices, bias, out: out.view_mut() };
                cpu.down(stream, operands).unwrap();
                out
            };
            self.both(cpu, one)
        };
        let rounding = (i + 2) as f64 * (i + 2) as f64 * DType::F32.epsilon();
        check(run, |outputs, _| outputs.iter().for_each(|out| self.verify(out, &expected, |_| rounding)));
    }
}

#[test]
fn against_the_reference() {
    let mut random = Random(7);
    let sizes = [
        [0, 2, 3, 5, 7],
        [1, 1, 1, 1, 1],
        [1, 4, 8, 16, 32],
        [3, 2, 12, 13, 17],
        [7, 3, 24, 31, 67],
        [53, 2, 5, 37, 41],
        [19, 8, 60, 24, 129],
        [211, 1, 3, 11, 19],
        [9, 1, 2, 5, 2101],
        [20, 1, 2, 3, 1001],
    ];
    for size in sizes {
        for all_on_one in [false, true, false] {
            let case = case(&mut random, size, all_on_one);
            case.check_gate_up();
            case.check_down();
        }
    }
}

#[test]
fn results_that_go_past_the_caches() {
    let (mut random, size) = (Random(13), [8192, 1, 2, 8, 2056]);
    let case = Case { out: DType::F32, gap: 0, ..case(&mut random, size, false) };
    case.check_down();
}

#[test]
fn linear() {
    let mut random = Random(11);
    for [t, n, c] in [[0, 3, 2], [1, 1, 1], [5, 1, 300], [700, 1, 64], [1, 301, 33], [37, 130, 71]] {
        for (x, weight) in FLOATS.into_iter().flat_map(|x| FLOATS.map(|weight| (x, weight))) {
            let gap = random.pick(&[0, 3]);
            let x = Buffer::floats(x, [t, c], gap, &random.units(t * c, 1.0));
            let weight = Buffer::floats(weight, [n, c], gap, &random.units(n * c, 1.0));
            let bias = random.flip().then(|| Buffer::floats(random.pick(&FLOATS), [n], 0, &random.units(n, 1.0)));
            let (xs, weights, biases) = (x.values(), weight.values(), values(&bias));
            let op =
                reference::Linear { x: &xs, weight: &weights, bias: biases.as_deref(), rows: t, inputs: c, outputs: n };
            let expected = reference::linear(&op);
            let out = random.pick(&FLOATS);
            let flat = n == 1 && random.flip();
            let run = |cpu: &Cpu, stream: &_| {
                let mut out = if flat { Buffer::new(out, [t], gap) } else { Buffer::new(out, [t, n], gap) };
                let bias = bias.as_ref().map(|b| b.view());
                cpu.linear(stream, Linear { x: x.view(), weight: weight.view(), bias, out: out.view_mut() }).unwrap();
                vec![out]
            };
            let rounding = (c + 2) as f64 * (c + 2) as f64 * DType::F32.epsilon();
            check(run, |outputs, _| close(&outputs[0], &expected, |_| rounding));
        }
    }
}

#[test]
fn hostile_permutations_stay_within_bounds() {
    let (x, w) = (Buffer::floats(DType::F32, [2, 1], 0, &[1.0, 2.0]), [1.0f64; 3]);
    let stack = Buffer::floats(DType::F32, [3, 1, 1], 0, &w);
    for (offsets, row_slot) in [
        ([0, 9, 2, u32::MAX], [0, 1, 7, u32::MAX]),
        ([3, 1, 4, 2], [u32::MAX; 4]),
        ([u32::MAX, 0, u32::MAX, 0], [0; 4]),
        ([0, 4, 0, 4], [3, 2, 1, 0]),
    ] {
        let (offsets, row_slot) = (Buffer::ids([4], 0, &offsets), Buffer::ids([4], 0, &row_slot));
        let run = |cpu: &Cpu, stream: &_| {
            let mut out = Buffer::new(DType::F32, [4, 1], 3);
            let operands = GateUp {
                x: x.view(),
                rows: RowSource::Tokens { top_k: 2 },
                permutation: Permutation {
                    row_slot: row_slot.view(),
                    slot_row: row_slot.view(),
                    offsets: offsets.view(),
                },
                input_weights: None,
                matrices: Matrices::Stack(stack.view()),
                bias: None,
                activation: Activation::Plain(Function::Identity),
                output: GateUpOutput::Activated,
                out: out.view_mut(),
            };
            cpu.gate_up(stream, operands).unwrap();
            vec![out]
        };
        check(run, |outputs, _| drop(outputs[0].values()));
    }
}

#[test]
fn experts_of_another_shape_are_refused() {
    let mut random = Random(5);
    let case = case(&mut random, [2, 1, 3, 4, 5], false);
    let cpu = Cpu::new().unwrap();
    let (packed, stream) = (case.packed(&cpu), cpu.stream().unwrap());
    let (a, offsets) = (Buffer::floats(DType::F32, [2, 5], 0, &[0.0; 10]), Buffer::ids([4], 0, &[0; 4]));
    let mut out = Buffer::new(DType::F32, [2, 5], 0);
    let operands = Down {
        a: a.view(),
        offsets: offsets.view(),
        matrices: Matrices::Packed(&packed),
        bias: None,
        out: out.view_mut(),
    };
    let error = cpu.down(&stream, operands).unwrap_err().to_string();
    assert_eq!(error, "down: packed experts expected [E, I, H] = [3, 5, 5], got [3, 4, 5]");
}
