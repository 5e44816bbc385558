//! A random MoE block: how it lies on disk, and what it computes.

use crate::common::model::{Model, raw};
use crate::common::{Extra, relative, run, specified};
use crate::rules::{Routes, sigmoid, swiglu};
use fused_moe::DType;
use fused_moe::checkpoint::Checkpoint;
use serde_json::{Value, json};

/// Names of gate, up and down; a gate without a name is not there, and an up without one lies below the gate.
pub(crate) type Three = [&'static str; 3];

/// How the routed experts lie.
pub(crate) enum Lies {
    /// A tensor each, `[I, H] [I, H] [H, I]`.
    Each(Three),
    /// `[E, 2I, H]` and `[E, H, I]`, gate rows first.
    Fused([&'static str; 2]),
    /// `[E, I, H]` and `[E, H, I]`, without gate.
    UpOnly([&'static str; 2]),
    /// `[E, H, 2I]` and `[E, I, H]`, gate columns first, with biases.
    Turned([&'static str; 2], [&'static str; 2]),
}

pub(crate) const PER_EXPERT: Lies =
    Lies::Each(["experts.{e}.gate_proj.weight", "experts.{e}.up_proj.weight", "experts.{e}.down_proj.weight"]);
pub(crate) const W123: Lies = Lies::Each(["experts.{e}.w1.weight", "experts.{e}.w3.weight", "experts.{e}.w2.weight"]);
pub(crate) const FUSED: Lies = Lies::Fused(["experts.gate_up_proj", "experts.down_proj"]);

pub(crate) const SHARED_EXPERTS: Three =
    ["shared_experts.gate_proj.weight", "shared_experts.up_proj.weight", "shared_experts.down_proj.weight"];
pub(crate) const SHARED_EXPERT: Three =
    ["shared_expert.gate_proj.weight", "shared_expert.up_proj.weight", "shared_expert.down_proj.weight"];

/// H, I, E, K, S of all blocks but where a row says otherwise.
pub(crate) const SIZES: [usize; 5] = [12, 6, 8, 3, 10];

/// A family's checkpoint and its rule.
pub(crate) struct Row {
    pub(crate) family: &'static str,
    pub(crate) config: Value,
    /// The layers that have experts; the last is the one that is stored.
    pub(crate) moe: &'static [usize],
    pub(crate) block: &'static str,
    pub(crate) sizes: [usize; 5],
    pub(crate) router: &'static str,
    /// `[H, E]`.
    pub(crate) router_turned: bool,
    pub(crate) router_bias: Option<&'static str>,
    /// Its full name, and how many rows it has.
    pub(crate) correction: Option<(&'static str, usize)>,
    pub(crate) experts: Lies,
    pub(crate) shared: Option<Three>,
    pub(crate) shared_gate: Option<&'static str>,
    pub(crate) activation: fn(f64, f64) -> f64,
    pub(crate) shared_activation: fn(f64, f64) -> f64,
    /// Logits and correction bias to routes.
    pub(crate) route: fn(&[f64], &[f64]) -> Routes,
    pub(crate) routed_scale: f64,
    /// Where in config.json H, I, E, K and S are.
    pub(crate) fields: [&'static str; 5],
}

/// A flat config with per-expert matrices under `model.layers.1.mlp`.
pub(crate) fn row(family: &'static str, config: Value) -> Row {
    let base = json!({ "model_type": family, "num_hidden_layers": 2, "hidden_size": 12, "num_experts_per_tok": 3 });
    Row {
        family,
        config: with(base, config),
        moe: &[0, 1],
        block: "model.layers.1.mlp",
        sizes: SIZES,
        router: "gate.weight",
        router_turned: false,
        router_bias: None,
        correction: None,
        experts: PER_EXPERT,
        shared: None,
        shared_gate: None,
        activation: swiglu,
        shared_activation: swiglu,
        route: |_, _| Vec::new(),
        routed_scale: 1.0,
        fields: ["/hidden_size", "/moe_intermediate_size", "/num_experts", "/num_experts_per_tok", ""],
    }
}

/// The first object with the fields of the second.
pub(crate) fn with(mut base: Value, more: Value) -> Value {
    for (key, value) in more.as_object().unwrap() {
        base[key] = value.clone();
    }
    base
}

/// The matrices of one expert, row-major; an empty one is not there.
struct Expert {
    gate: Vec<f64>,
    up: Vec<f64>,
    down: Vec<f64>,
    gate_bias: Vec<f64>,
    up_bias: Vec<f64>,
    down_bias: Vec<f64>,
}

/// A block in plain form.
struct Block {
    router: Vec<f64>,
    router_bias: Vec<f64>,
    correction: Vec<f64>,
    experts: Vec<Expert>,
    shared: Option<Expert>,
    shared_gate: Vec<f64>,
}

/// Numbers that f32 holds exactly, uniform in `-scale..scale`.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn numbers(&mut self, n: usize, scale: f64) -> Vec<f64> {
        let mut next = || {
            self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let unit = (self.0 >> 40) as f64 / (1u64 << 23) as f64 - 1.0;
            f64::from((unit * scale) as f32)
        };
        (0..n).map(|_| next()).collect()
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn turned(matrix: &[f64], cols: usize) -> Vec<f64> {
    (0..cols).flat_map(|c| matrix.iter().skip(c).step_by(cols).copied()).collect()
}

impl Expert {
    fn random(random: &mut Random, [hidden, inner]: [usize; 2], gated: bool, biased: bool) -> Self {
        let mut biases = |n| random.numbers(if biased { n } else { 0 }, 0.5);
        let (gate_bias, up_bias, down_bias) = (biases(inner), biases(inner), biases(hidden));
        let mut matrix = || random.numbers(hidden * inner, 0.6);
        let gate = if gated { matrix() } else { Vec::new() };
        Self { gate, up: matrix(), down: matrix(), gate_bias, up_bias, down_bias }
    }

    fn run(&self, x: &[f64], activation: fn(f64, f64) -> f64) -> Vec<f64> {
        let bias = |bias: &[f64], i: usize| bias.get(i).copied().unwrap_or(0.0);
        let row = |matrix: &[f64], i: usize| matrix.chunks(x.len()).nth(i).map_or(0.0, |row| dot(row, x));
        let inner = self.up.len() / x.len();
        let h: Vec<f64> = (0..inner)
            .map(|i| {
                let gate = row(&self.gate, i) + bias(&self.gate_bias, i);
                activation(gate, row(&self.up, i) + bias(&self.up_bias, i))
            })
            .collect();
        self.down.chunks(inner).enumerate().map(|(i, row)| dot(row, &h) + bias(&self.down_bias, i)).collect()
    }
}

/// A tensor on disk: name, shape, numbers.
pub(crate) type Stored = (String, Vec<usize>, Vec<f64>);

impl Row {
    fn random(&self) -> Block {
        let mut random = Random(self.family.bytes().fold(7u64, |seed, byte| seed.wrapping_mul(31) ^ u64::from(byte)));
        let [hidden, inner, experts, _, shared] = self.sizes;
        let gated = |names: &Three| !names[0].is_empty();
        let (routed_gated, biased) = match &self.experts {
            Lies::Each(names) => (gated(names), false),
            Lies::Fused(_) => (true, false),
            Lies::UpOnly(_) => (false, false),
            Lies::Turned(..) => (true, true),
        };
        Block {
            router: random.numbers(experts * hidden, 1.0),
            router_bias: random.numbers(if self.router_bias.is_some() { experts } else { 0 }, 0.5),
            // mostly below the scores, so that what masked groups count as shows
            correction: random
                .numbers(if self.correction.is_some() { experts } else { 0 }, 1.5)
                .iter()
                .map(|x| f64::from((x - 1.0) as f32))
                .collect(),
            experts: (0..experts).map(|_| Expert::random(&mut random, [hidden, inner], routed_gated, biased)).collect(),
            shared: self.shared.map(|names| Expert::random(&mut random, [hidden, shared], gated(&names), false)),
            shared_gate: random.numbers(if self.shared_gate.is_some() { hidden } else { 0 }, 1.0),
        }
    }

    /// As the family has it on disk.
    fn stored(&self, block: &Block) -> Vec<Stored> {
        let [hidden, inner, experts, _, shared] = self.sizes;
        let name = |name: &str| match name.strip_prefix("../") {
            Some(name) => format!("{}.{name}", self.block.rsplit_once('.').unwrap().0),
            None => format!("{}.{name}", self.block),
        };
        let router = match self.router_turned {
            false => (name(self.router), vec![experts, hidden], block.router.clone()),
            true => (name(self.router), vec![hidden, experts], turned(&block.router, hidden)),
        };
        let mut all = vec![router];
        all.extend(self.router_bias.map(|bias| (name(bias), vec![experts], block.router_bias.clone())));
        if let Some((bias, rows)) = self.correction {
            // rows that are not the first are not read
            let numbers = [block.correction.clone(), vec![9.0; (rows - 1) * experts]].concat();
            let shape = if rows == 1 { vec![experts] } else { vec![rows, experts] };
            all.push((bias.to_owned(), shape, numbers));
        }
        let mut each = |[gate, up, down]: Three, e: usize, expert: &Expert, inner: usize| {
            let joint = if up.is_empty() { [&expert.gate[..], &expert.up].concat() } else { expert.gate.clone() };
            for (of, numbers, cols) in [(gate, &joint, hidden), (up, &expert.up, hidden), (down, &expert.down, inner)] {
                if !of.is_empty() {
                    let shape = vec![numbers.len() / cols, cols];
                    all.push((name(&of.replace("{e}", &e.to_string())), shape, numbers.clone()));
                }
            }
        };
        if let (Some(names), Some(expert)) = (self.shared, &block.shared) {
            each(names, 0, expert, shared);
        }
        let stack = |part: &dyn Fn(&Expert) -> Vec<f64>| block.experts.iter().flat_map(part).collect::<Vec<f64>>();
        match &self.experts {
            Lies::Each(names) => {
                block.experts.iter().enumerate().for_each(|(e, expert)| each(*names, e, expert, inner));
            }
            Lies::Fused([gate_up, down]) => {
                let rows = stack(&|e| [e.gate.clone(), e.up.clone()].concat());
                all.push((name(gate_up), vec![experts, 2 * inner, hidden], rows));
                all.push((name(down), vec![experts, hidden, inner], stack(&|e| e.down.clone())));
            }
            Lies::UpOnly([up, down]) => {
                all.push((name(up), vec![experts, inner, hidden], stack(&|e| e.up.clone())));
                all.push((name(down), vec![experts, hidden, inner], stack(&|e| e.down.clone())));
            }
            Lies::Turned([gate_up, down], [gate_up_bias, down_bias]) => {
                let cols = stack(&|e| turned(&[e.gate.clone(), e.up.clone()].concat(), hidden));
                all.push((name(gate_up), vec![experts, hidden, 2 * inner], cols));
                all.push((name(down), vec![experts, inner, hidden], stack(&|e| turned(&e.down, inner))));
                let bias = stack(&|e| [e.gate_bias.clone(), e.up_bias.clone()].concat());
                all.push((name(gate_up_bias), vec![experts, 2 * inner], bias));
                all.push((name(down_bias), vec![experts, hidden], stack(&|e| e.down_bias.clone())));
            }
        }
        all.extend(self.shared_gate.map(|gate| (name(gate), vec![1, hidden], block.shared_gate.clone())));
        all
    }

    /// What the block makes of x, and its routes.
    fn compute(&self, block: &Block, x: &[f64]) -> (Vec<f64>, Vec<Routes>) {
        let hidden = self.sizes[0];
        let (mut y, mut all) = (Vec::new(), Vec::new());
        for x in x.chunks(hidden) {
            let mut logits: Vec<f64> = block.router.chunks(hidden).map(|row| dot(row, x)).collect();
            logits.iter_mut().zip(&block.router_bias).for_each(|(logit, bias)| *logit += bias);
            let routes = (self.route)(&logits, &block.correction);
            assert_eq!(routes.len(), self.sizes[3]);
            let mut out = vec![0.0; hidden];
            for &(e, weight) in &routes {
                let part = block.experts[e].run(x, self.activation);
                out.iter_mut().zip(part).for_each(|(out, part)| *out += self.routed_scale * weight * part);
            }
            if let Some(shared) = &block.shared {
                let gate = self.shared_gate.map_or(1.0, |_| sigmoid(dot(&block.shared_gate, x)));
                let part = shared.run(x, self.shared_activation);
                out.iter_mut().zip(part).for_each(|(out, part)| *out += gate * part);
            }
            y.extend(out);
            all.push(routes);
        }
        (y, all)
    }

    /// The blocks of several rows in one file.
    pub(crate) fn file_of(rows: &[&Self]) -> Vec<u8> {
        file(&rows.iter().flat_map(|row| row.stored(&row.random())).collect::<Vec<_>>())
    }

    pub(crate) fn check(&self) {
        let block = self.random();
        let model = Model::new(&self.config, &file(&self.stored(&block)));
        let checkpoint = Checkpoint::open(model.path()).unwrap();
        let family = self.family;
        assert_eq!(checkpoint.inspect().family, family);
        assert_eq!(checkpoint.layers(), self.moe, "{family}");
        let stored = *self.moe.last().unwrap();
        assert_eq!(checkpoint.first_stored_layer(), Some(stored), "{family}");
        let layer = checkpoint.layer(stored).unwrap_or_else(|error| panic!("{family}: {error}"));
        assert_eq!(layer.name, self.block, "{family}");
        let [hidden, inner, experts, top_k, shared] = self.sizes;
        let config = &layer.config;
        assert_eq!([config.hidden, config.intermediate, config.experts, config.top_k], [hidden, inner, experts, top_k]);
        assert_eq!(config.shared.map(|shared| shared.intermediate), self.shared.map(|_| shared), "{family}");

        let x = Random(99).numbers(64 * hidden, 1.0);
        let (y, routes) = self.compute(&block, &x);
        let x: Vec<f32> = x.iter().map(|&x| x as f32).collect();
        let out = specified(&layer, &x, Extra::default());
        let ran = run(&layer, &x, Extra::default(), DType::F32);
        for (who, ids, weights, got) in [
            ("reference", &out.routes.experts, &out.routes.weights, &out.y),
            ("cpu", &ran.experts, &ran.weights, &ran.y),
        ] {
            for (t, wanted) in routes.iter().enumerate() {
                let slots = t * top_k..(t + 1) * top_k;
                for &(e, weight) in wanted {
                    let slot = slots.clone().find(|&slot| ids[slot] as usize == e);
                    let slot = slot
                        .unwrap_or_else(|| panic!("{family}, {who}, token {t}: {:?}, {wanted:?}", &ids[slots.clone()]));
                    let error = (weights[slot] - weight).abs();
                    assert!(error <= 1e-5 * weight.abs().max(1.0), "{family}, {who}: {} {weight}", weights[slot]);
                }
            }
            let error = relative(got, &y);
            assert!(error <= 1e-5, "{family}, {who}: {error:e}");
        }
    }

    /// Each size in config.json one larger than the tensors have it.
    pub(crate) fn contradict(&self) {
        let model = Model::empty().with("model.safetensors", &Self::file_of(&[self]));
        let [hidden, inner, experts, _, shared] = self.sizes;
        for (size, field) in self.fields.iter().enumerate() {
            // no tensor has K
            if size == 3 || field.is_empty() {
                continue;
            }
            let mut config = self.config.clone();
            let value = config.pointer_mut(field).unwrap_or_else(|| panic!("{}: {field}", self.family));
            // E stays a multiple of the number of groups
            let step = if size == 2 { self.config["n_group"].as_u64().unwrap_or(1) } else { 1 };
            *value = json!(value.as_u64().unwrap() + step);
            std::fs::write(model.join("config.json"), config.to_string()).unwrap();
            let checkpoint = Checkpoint::open(model.path()).unwrap();
            let error = checkpoint.layer(*self.moe.last().unwrap()).unwrap_err().to_string();
            let pair = |n: usize| [n.to_string(), (n + step as usize).to_string()];
            let named = match size {
                0 => pair(hidden),
                1 => pair(inner),
                2 => pair(experts),
                _ if field.ends_with("_experts") => [shared.to_string(), (3 * shared / 2).to_string()],
                _ => pair(shared),
            };
            // joint rows are twice as many, and several shared experts are one
            let doubled = pair(inner).map(|n| (2 * n.parse::<usize>().unwrap()).to_string());
            let has = |numbers: &[String; 2]| {
                let digits = |c: char| !c.is_ascii_digit();
                let found: Vec<&str> = error.split(digits).collect();
                numbers.iter().all(|n| found.contains(&n.as_str()))
            };
            assert!(has(&named) || (size == 1 && has(&doubled)), "{}, {field}: {error}", self.family);
            assert!(error.contains(" expected ") && error.contains(", got "), "{}, {field}: {error}", self.family);
        }
    }
}

/// A file of f32 tensors.
pub(crate) fn file(tensors: &[Stored]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, shape, numbers) in tensors {
        assert_eq!(shape.iter().product::<usize>(), numbers.len(), "{name}");
        let start = data.len();
        data.extend(numbers.iter().flat_map(|&x| (x as f32).to_le_bytes()));
        header.insert(name.clone(), json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, data.len()] }));
    }
    raw(&Value::Object(header).to_string(), &data)
}
