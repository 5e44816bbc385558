use crate::support::*;
use fused_moe_core::config::{GateConfig, GateNorm, RoutingRule};
use fused_moe_core::operation::{Choice, Gate, GateRoute, Route};
use fused_moe_core::{Backend, DType, reference};
use fused_moe_cpu::Cpu;

struct Case {
    x: Buffer,
    router: Buffer,
    bias: Option<Buffer>,
    norm_weight: Option<Buffer>,
    normed: Option<DType>,
    config: GateConfig,
    size: [usize; 3],
    gap: usize,
}

fn case(random: &mut Random, [t, e, h]: [usize; 3]) -> Case {
    let norm = random.flip().then_some(GateNorm { eps: 1e-5, feeds_experts: false });
    let config =
        GateConfig { norm, scale: if random.flip() { 1.0 } else { 0.37 }, softcap: random.flip().then_some(1.5) };
    let gap = random.pick(&[0, 3]);
    let mut floats = |rows, cols, scale: f64| {
        let values = random.units(rows * cols, scale);
        Buffer::floats(random.pick(&FLOATS), [rows, cols], gap, &values)
    };
    let (x, router) = (floats(t, h, 2.0), floats(e, h, 1.0));
    let (bias, norm_weight) = (floats(1, e, 1.0), floats(1, h, 2.0));
    Case {
        x,
        router,
        bias: random.flip().then_some(bias),
        norm_weight: (norm.is_some() && random.flip()).then_some(norm_weight),
        normed: (norm.is_some() && random.flip()).then(|| random.pick(&FLOATS)),
        config,
        size: [t, e, h],
        gap,
    }
}

impl Case {
    fn operands<'a>(&'a self, normed: Option<&'a mut Buffer>, logits: &'a mut Buffer) -> Gate<'a, Cpu> {
        Gate {
            bias: self.bias.as_ref().map(|b| b.view()),
            norm_weight: self.norm_weight.as_ref().map(|b| b.view()),
            config: self.config,
            normed: normed.map(|b| b.view_mut()),
            ..Gate::new(self.x.view(), self.router.view(), logits.view_mut())
        }
    }

    fn outputs(&self) -> (Option<Buffer>, Buffer) {
        let [t, e, h] = self.size;
        (self.normed.map(|dtype| Buffer::new(dtype, [t, h], self.gap)), Buffer::new(DType::F32, [t, e], self.gap))
    }

    fn check(&self) {
        let [t, e, h] = self.size;
        let [x, router] = [self.x.values(), self.router.values()];
        let bias = self.bias.as_ref().map(|b| b.values());
        let norm_weight = self.norm_weight.as_ref().map(|b| b.values());
        let op = reference::Gate {
            x: &x,
            router: &router,
            bias: bias.as_deref(),
            norm_weight: norm_weight.as_deref(),
            config: self.config,
            tokens: t,
            hidden: h,
            experts: e,
        };
        let expected = reference::gate(&op);
        let run = |cpu: &Cpu, stream: &_| {
            let (mut normed, mut logits) = self.outputs();
            cpu.gate(stream, self.operands(normed.as_mut(), &mut logits)).unwrap();
            [Some(logits), normed].into_iter().flatten().collect()
        };
        check(run, |outputs, _| {
            close(&outputs[0], &expected.logits, |i| {
                let (n, row) = (&expected.normed[i / e * h..][..h], &router[i % e * h..][..h]);
                1e-6 * (1.0 + n.iter().zip(row).map(|(n, r)| (n * r).abs()).sum::<f64>())
            });
            if let Some(normed) = outputs.get(1) {
                close(normed, &expected.normed, |i| 1e-6 * expected.normed[i].abs());
            }
        });
    }
}

#[test]
fn gate_agrees_with_the_reference() {
    let mut random = Random(1);
    let tokens = [0, 1, 2, 7, 23, 24, 25, 49, 70];
    for e in [1, 3, 8, 12, 31, 33, 60, 128, 160] {
        for h in [1, 7, 64, 131, 257, 700] {
            let t = random.pick(&tokens);
            case(&mut random, [t, e, h]).check();
        }
    }
    for size in [[1, 4096, 33], [3, 512, 2048], [100, 256, 96], [1, 1, 1]] {
        case(&mut random, size).check();
    }
}

#[test]
fn a_token_alone_has_the_bits_that_it_has_in_a_batch() {
    let mut random = Random(2);
    let cpu = Cpu::with_threads(2).unwrap();
    let stream = cpu.stream().unwrap();
    for _ in 0..8 {
        let case = case(&mut random, [50, 40, 300]);
        let (mut normed, mut logits) = case.outputs();
        cpu.gate(&stream, case.operands(normed.as_mut(), &mut logits)).unwrap();
        for t in [0, 23, 24, 49] {
            let mut alone = Buffer::new(DType::F32, [1, 40], 0);
            let operands = case.operands(None, &mut alone);
            cpu.gate(&stream, Gate { x: case.x.view().row_range(t, 1).unwrap(), ..operands }).unwrap();
            assert_eq!(alone.values(), logits.values()[t * 40..][..40]);
        }
    }
}

#[test]
fn gate_route_is_gate_and_route() {
    let mut random = Random(3);
    for size in [[0, 8, 16], [1, 60, 33], [70, 128, 65], [33, 513, 9]] {
        let case = case(&mut random, size);
        let k = random.pick(&[1, 2, 8]);
        let rule = RoutingRule { always: k / 2, ..RoutingRule::default() };
        let outputs = || [Buffer::new(DType::U32, [size[0], k], 1), Buffer::new(DType::F32, [size[0], k], 0)];
        let fused = |cpu: &Cpu, stream: &_| {
            let (mut normed, mut logits) = case.outputs();
            let [mut experts, mut weights] = outputs();
            let choice = Choice::new(rule, experts.view_mut(), weights.view_mut());
            let gate = case.operands(normed.as_mut(), &mut logits);
            cpu.gate_route(stream, GateRoute { gate, choice }).unwrap();
            vec![logits, experts, weights]
        };
        check(fused, |_, status| assert!(status.is_ok()));
        let cpu = Cpu::with_threads(2).unwrap();
        let stream = cpu.stream().unwrap();
        let (mut normed, mut logits) = case.outputs();
        let [mut experts, mut weights] = outputs();
        cpu.gate(&stream, case.operands(normed.as_mut(), &mut logits)).unwrap();
        let choice = Choice::new(rule, experts.view_mut(), weights.view_mut());
        cpu.route(&stream, Route { logits: logits.view(), choice }).unwrap();
        assert!(fused(&cpu, &stream) == [logits, experts, weights]);
    }
}
