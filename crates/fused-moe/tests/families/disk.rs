//! A random block by its tensors on disk, for rules that are more than routes and a sum: what it makes of tokens is written
//! from the tensors' own names.

use crate::block::{Random, file};
use crate::common::model::Model;
use crate::common::{Extra, relative, run, specified};
use crate::rules::Routes;
use fused_moe::checkpoint::Checkpoint;
use fused_moe::{DType, NO_EXPERT};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// How many tokens a call has.
const TOKENS: usize = 64;

/// A family's checkpoint and its rule.
pub(crate) struct Block {
    pub(crate) family: &'static str,
    pub(crate) config: Value,
    /// The layers that have experts; the last is the one that is stored.
    pub(crate) moe: &'static [usize],
    pub(crate) name: &'static str,
    /// H, and K with those that every token goes to.
    pub(crate) sizes: [usize; 2],
    /// Names relative to the block (`../`: to its parent).
    pub(crate) tensors: Vec<Tensor>,
    /// Calls are made with these.
    pub(crate) sequences: Option<Vec<u32>>,
    /// Width of the state that routers hand on.
    pub(crate) state: Option<usize>,
    pub(crate) rule: Rule,
    /// Fields of config.json that a tensor contradicts when they are one larger.
    pub(crate) fields: &'static [&'static str],
}

/// What a block makes of all tokens of a call.
pub(crate) type Rule = Box<dyn Fn(&Disk, &Call) -> Vec<Answer>>;

/// Name, shape, and the range of its numbers.
pub(crate) type Tensor = (String, Vec<usize>, [f64; 2]);

/// What goes into a call.
pub(crate) struct Call {
    pub(crate) x: Vec<Vec<f64>>,
    /// Ranges of tokens.
    pub(crate) sequences: Vec<std::ops::Range<usize>>,
    pub(crate) state: Option<Vec<Vec<f64>>>,
}

/// What becomes of a token: slots that go nowhere are left out.
pub(crate) struct Answer {
    pub(crate) y: Vec<f64>,
    pub(crate) routes: Routes,
}

/// Tensors by their names relative to the block.
pub(crate) struct Disk(BTreeMap<String, (Vec<usize>, Vec<f64>)>);

impl Disk {
    /// All numbers of a tensor.
    pub(crate) fn all(&self, name: &str) -> &[f64] {
        &self.0.get(name).unwrap_or_else(|| panic!("{name}")).1
    }

    /// A matrix times a vector.
    pub(crate) fn times(&self, name: &str, x: &[f64]) -> Vec<f64> {
        product(self.all(name), x)
    }

    /// The same with a bias of the same name.
    pub(crate) fn linear(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let bias = self.all(&format!("{name}.bias"));
        self.times(&format!("{name}.weight"), x).iter().zip(bias).map(|(y, b)| y + b).collect()
    }

    /// One matrix of a stack times a vector.
    pub(crate) fn of_stack(&self, name: &str, e: usize, x: &[f64]) -> Vec<f64> {
        let (shape, numbers) = &self.0[name];
        product(&numbers[e * shape[1] * shape[2]..(e + 1) * shape[1] * shape[2]], x)
    }

    /// `x / sqrt(mean(x^2) + eps) * (offset + weight)`.
    pub(crate) fn rms(&self, name: &str, x: &[f64], eps: f64, offset: f64) -> Vec<f64> {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        x.iter().zip(self.all(name)).map(|(x, w)| x / (mean + eps).sqrt() * (offset + w)).collect()
    }

    /// An expert of gate, up and down projections.
    pub(crate) fn mlp(&self, prefix: &str, x: &[f64], activation: fn(f64, f64) -> f64) -> Vec<f64> {
        let part = |name: &str, x: &[f64]| self.times(&format!("{prefix}.{name}_proj.weight"), x);
        let (gate, up) = (part("gate", x), part("up", x));
        part("down", &gate.iter().zip(&up).map(|(&g, &u)| activation(g, u)).collect::<Vec<_>>())
    }

    /// An expert of two stacks, gate rows first.
    pub(crate) fn fused(&self, e: usize, x: &[f64], activation: fn(f64, f64) -> f64) -> Vec<f64> {
        let both = self.of_stack("experts.gate_up_proj", e, x);
        let (gate, up) = both.split_at(both.len() / 2);
        let a: Vec<f64> = gate.iter().zip(up).map(|(&g, &u)| activation(g, u)).collect();
        self.of_stack("experts.down_proj", e, &a)
    }
}

fn product(matrix: &[f64], x: &[f64]) -> Vec<f64> {
    matrix.chunks(x.len()).map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum()).collect()
}

/// The sum of weighted vectors.
pub(crate) fn sum(routes: &Routes, expert: impl Fn(usize) -> Vec<f64>, len: usize) -> Vec<f64> {
    let mut y = vec![0.0; len];
    for &(e, weight) in routes {
        y.iter_mut().zip(expert(e)).for_each(|(y, part)| *y += weight * part);
    }
    y
}

pub(crate) fn add(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

/// A rule that treats each token alone.
pub(crate) fn alone(rule: impl Fn(&Disk, &[f64]) -> Answer + 'static) -> Rule {
    Box::new(move |disk, call| call.x.iter().map(|x| rule(disk, x)).collect())
}

/// Numbers in `-scale..scale`.
pub(crate) fn tensor(name: impl Into<String>, shape: &[usize], scale: f64) -> Tensor {
    (name.into(), shape.to_vec(), [-scale, scale])
}

impl Block {
    fn disk(&self) -> Disk {
        let mut random = Random(self.family.bytes().fold(11u64, |seed, byte| seed.wrapping_mul(31) ^ u64::from(byte)));
        let mut numbers = |(name, shape, [low, high]): &Tensor| {
            let unit = random.numbers(shape.iter().product(), 0.5);
            let numbers = unit.iter().map(|x| f64::from((low + (x + 0.5) * (high - low)) as f32)).collect();
            (name.clone(), (shape.clone(), numbers))
        };
        Disk(self.tensors.iter().map(&mut numbers).collect())
    }

    fn file(&self, disk: &Disk) -> Vec<u8> {
        let parent = self.name.rsplit_once('.').map_or("", |(parent, _)| parent);
        let full = |name: &str| match name.strip_prefix("../") {
            Some(name) => format!("{parent}.{name}"),
            None => format!("{}.{name}", self.name),
        };
        let stored: Vec<_> = disk.0.iter().map(|(name, (shape, x))| (full(name), shape.clone(), x.clone())).collect();
        file(&stored)
    }

    /// The checkpoint in a directory.
    pub(crate) fn model(&self) -> Model {
        Model::new(&self.config, &self.file(&self.disk()))
    }

    pub(crate) fn check(&self) {
        let (disk, model, family) = (self.disk(), self.model(), self.family);
        let checkpoint =
            Checkpoint::open_part(model.path(), family).unwrap_or_else(|error| panic!("{family}: {error}"));
        assert_eq!(Checkpoint::open(model.path()).unwrap().inspect().family, family);
        assert_eq!(checkpoint.layers(), self.moe, "{family}");
        let stored = *self.moe.last().unwrap();
        assert_eq!(checkpoint.first_stored_layer(), Some(stored), "{family}");
        let layer = checkpoint.layer(stored).unwrap_or_else(|error| panic!("{family}: {error}"));
        let parameters = disk.0.values().map(|(_, numbers)| numbers.len() as u64).sum::<u64>();
        assert_eq!((&*layer.name, checkpoint.inspect().parameters), (self.name, parameters), "{family}");

        let [hidden, top_k] = self.sizes;
        let x = Random(99).numbers(TOKENS * hidden, 1.0);
        let rows = |x: &[f64], n: usize| x.chunks(n).map(<[f64]>::to_vec).collect::<Vec<_>>();
        let narrow = |x: &[f64]| x.iter().map(|&x| x as f32).collect::<Vec<f32>>();
        let state = self.state.map(|width| (width, Random(5).numbers(TOKENS * width, 1.0)));
        let ends = self.sequences.clone().unwrap_or(vec![0, TOKENS as u32]);
        let call = Call {
            x: rows(&x, hidden),
            sequences: ends.windows(2).map(|ends| ends[0] as usize..ends[1] as usize).collect(),
            state: state.as_ref().map(|(width, state)| rows(state, *width)),
        };
        let answers = (self.rule)(&disk, &call);
        assert_eq!(answers.len(), TOKENS);
        let (x, state) = (narrow(&x), state.map(|(_, state)| narrow(&state)));
        let sequences = self.sequences.as_deref();
        let extra = Extra { sequences, router_state: state.as_deref(), ..Extra::default() };
        let out = specified(&layer, &x, extra);
        let ran = run(&layer, &x, extra, DType::F32);
        let y: Vec<f64> = answers.iter().flat_map(|answer| answer.y.clone()).collect();
        for (who, ids, weights, got) in [
            ("reference", &out.routes.experts, &out.routes.weights, &out.y),
            ("cpu", &ran.experts, &ran.weights, &ran.y),
        ] {
            for (t, Answer { routes, .. }) in answers.iter().enumerate() {
                let slots = t * top_k..(t + 1) * top_k;
                let mut found: Routes = slots.map(|slot| (ids[slot] as usize, weights[slot])).collect();
                found.retain(|&(e, _)| e != NO_EXPERT as usize);
                let mut wanted = routes.clone();
                [&mut found, &mut wanted].into_iter().for_each(|routes| routes.sort_by_key(|&(e, _)| e));
                let same = |((e, w), (wanted_e, wanted)): (&(usize, f64), &(usize, f64))| {
                    e == wanted_e && (w - wanted).abs() <= 1e-5 * wanted.abs().max(1.0)
                };
                let equal = found.len() == wanted.len() && found.iter().zip(&wanted).all(same);
                assert!(equal, "{family}, {who}, token {t}: {found:?} {wanted:?}");
            }
            let error = relative(got, &y);
            assert!(error <= 1e-5, "{family}, {who}: {error:e}");
        }
    }

    /// Each field one larger than the tensors have it, and each tensor one row longer or away.
    pub(crate) fn contradict(&self) {
        let (disk, layer) = (self.disk(), *self.moe.last().unwrap());
        let error = |config: &Value, disk: &Disk| {
            let model = Model::new(config, &self.file(disk));
            let checkpoint = Checkpoint::open_part(model.path(), self.family).unwrap();
            checkpoint.layer(layer).unwrap_err().to_string()
        };
        for field in self.fields {
            let mut config = self.config.clone();
            let value = config.pointer_mut(field).unwrap_or_else(|| panic!("{}: {field}", self.family));
            *value = json!(value.as_u64().unwrap() + 1);
            let error = error(&config, &disk);
            assert!(error.contains(" expected ") && error.contains(", got "), "{}, {field}: {error}", self.family);
        }
        for (name, shape, _) in &self.tensors {
            // the name behind the block's or its parent's
            let name_in_error = name.trim_start_matches("../");
            let numbers = disk.all(name);
            let mut longer = shape.clone();
            longer[0] += 1;
            let more = numbers.len() / shape[0];
            let changed = |new: Option<(Vec<usize>, Vec<f64>)>| {
                let mut other = Disk(disk.0.clone());
                other.0.remove(name);
                other.0.extend(new.map(|new| (name.clone(), new)));
                other
            };
            let long = changed(Some((longer.clone(), [numbers, &vec![0.0; more]].concat())));
            let message = error(&self.config, &long);
            let both = [format!("expected {shape:?}"), format!("got {longer:?}")];
            let said = message.contains(name_in_error) && both.iter().all(|words| message.contains(words));
            assert!(said, "{}, {name}: {message}", self.family);
            let message = error(&self.config, &changed(None));
            let said = message.contains(name_in_error) && message.contains(&format!("{shape:?} is missing"));
            assert!(said || message.contains("more tensors"), "{}, {name}: {message}", self.family);
        }
    }
}
