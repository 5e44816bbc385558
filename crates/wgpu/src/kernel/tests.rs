//! Every kernel, without a device: its text is valid, every API's translation of it is made, and it keeps to the limits
//! that are asked of a device.
#![allow(clippy::unwrap_used, clippy::panic)]

use super::{Binding, Kernel, Kind, OPERANDS, Slot, Variant};
use crate::device::{BINDINGS, PARAMETER_BYTES};
use fused_moe_core::DType;
use naga::back::{hlsl, msl, spv};
use naga::valid::{Capabilities, FunctionInfo, ModuleInfo, ValidationFlags, Validator};
use naga::{
    AddressSpace, BinaryOperator, Block, Expression, Function, Handle, Module, ScalarKind, Statement, TypeInner,
};
use std::collections::{BTreeMap, HashSet};
use std::fmt::Debug;

const FORMATS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
const THREADS: u32 = 256;
const WORKGROUP_BYTES: u32 = 16384;
const LIST: &str = "tests/kernels.txt";

/// What a compiled kernel takes of a device.
#[derive(Clone, Copy, Debug, Default)]
struct Needs {
    buffers: usize,
    threads: u32,
    workgroup_bytes: u32,
    parameter_bytes: u32,
}

impl Needs {
    fn or_more(self, other: Self) -> Self {
        Self {
            buffers: self.buffers.max(other.buffers),
            threads: self.threads.max(other.threads),
            workgroup_bytes: self.workgroup_bytes.max(other.workgroup_bytes),
            parameter_bytes: self.parameter_bytes.max(other.parameter_bytes),
        }
    }
}

/// Variants that stand for all: operands of one format and of several, with 16-byte reads and without, read from what is
/// written and not, and each operand left out that may be.
fn variants(kernel: Kernel) -> Vec<Variant> {
    let bindings = kernel.bindings();
    let of = |format: &dyn Fn(usize) -> DType, (wide, shared): (bool, bool), absent: &dyn Fn(usize) -> bool| {
        let mut slots = [None; OPERANDS];
        for (i, (slot, binding)) in slots.iter_mut().zip(bindings).enumerate() {
            let Binding { written, kind, .. } = *binding;
            let format = if kind == Kind::Float { format(i) } else { DType::U32 };
            *slot = (!absent(i)).then_some(Slot { format, shared: shared && !written, wide: wide && !written });
        }
        Variant { kernel, slots }
    };
    let text = kernel.parts().concat();
    let optional: Vec<_> = (0..bindings.len()).filter(|&i| asks(&text, bindings[i].name)).collect();
    let too_many = bindings.len().saturating_sub(BINDINGS);
    assert!(!bindings.is_empty() && too_many <= optional.len(), "{kernel:?}");
    let mut variants = Vec::new();
    for (turn, format) in FORMATS.into_iter().enumerate() {
        let mixed = |i: usize| FORMATS[(i + turn) % 3];
        // more than a launch can have: others are left out each turn
        let left_out: Vec<_> = optional.iter().cycle().skip(turn).take(too_many).collect();
        let absent = |i: usize| left_out.contains(&&i);
        variants.push(of(&|_| format, (false, false), &absent));
        variants.push(of(&|_| format, (true, false), &absent));
        variants.push(of(&mixed, (false, true), &absent));
        variants.push(of(&mixed, (true, true), &absent));
    }
    for (turn, &first) in optional.iter().enumerate() {
        let left_out: Vec<_> = optional.iter().cycle().skip(turn).take(too_many.max(1)).collect();
        variants.push(of(&|i| FORMATS[(i + first) % 3], (false, false), &|i| left_out.contains(&&i)));
    }
    variants.push(of(&|_| DType::F32, (false, false), &|i| optional.contains(&i)));
    let mut seen = HashSet::new();
    variants.retain(|variant| seen.insert(*variant));
    variants
}

/// Whether a text asks if it has an operand: one that may be left out.
fn asks(text: &str, name: &str) -> bool {
    let word = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(&format!("has_{name}")).any(|(start, found)| !text[start + found.len()..].starts_with(word))
}

fn done<T>(variant: &Variant, what: &str, result: Result<T, impl Debug>) -> T {
    result.unwrap_or_else(|error| panic!("{variant:?}\n{what}: {error:?}"))
}

/// The module of a text, as wgpu would have it of a device with and without subgroups.
fn valid(variant: &Variant, subgroups: bool) -> (Module, ModuleInfo) {
    let text = variant.source(subgroups);
    let parsed = naga::front::wgsl::parse_str(&text).map_err(|error| error.emit_to_string(&text));
    let module = parsed.unwrap_or_else(|message| panic!("{variant:?}\n{message}"));
    let asked = Capabilities::IMMEDIATES | Capabilities::SHADER_FLOAT16_IN_FLOAT32;
    let asked = if subgroups { asked | Capabilities::SUBGROUP } else { asked };
    let mut validator = Validator::new(ValidationFlags::all(), asked);
    if subgroups {
        validator
            .subgroup_stages(naga::valid::ShaderStages::COMPUTE)
            .subgroup_operations(naga::valid::SubgroupOperationSet::all());
    }
    let info = validator.validate(&module).map_err(|error| error.emit_to_string(&text));
    let info = info.unwrap_or_else(|message| panic!("{variant:?}\n{message}"));
    (module, info)
}

fn needs(module: &Module) -> Needs {
    let size = |space: AddressSpace| {
        let of = |variable: &naga::GlobalVariable| module.types[variable.ty].inner.size(module.to_ctx());
        module
            .global_variables
            .iter()
            .filter(|(_, variable)| variable.space == space)
            .map(|(_, variable)| of(variable))
            .sum()
    };
    let is_buffer = |variable: &naga::GlobalVariable| matches!(variable.space, AddressSpace::Storage { .. });
    let [entry] = module.entry_points.as_slice() else { panic!("one entry point a kernel") };
    Needs {
        buffers: module.global_variables.iter().filter(|(_, variable)| is_buffer(variable)).count(),
        threads: entry.workgroup_size.iter().product(),
        workgroup_bytes: size(AddressSpace::WorkGroup),
        parameter_bytes: size(AddressSpace::Immediate),
    }
}

/// The statements of a block, those of the blocks in it among them.
fn statements<'m>(block: &'m Block) -> Vec<&'m Statement> {
    let inside = |statement: &'m Statement| match statement {
        Statement::Block(block) => vec![block],
        Statement::If { accept, reject, .. } => vec![accept, reject],
        Statement::Switch { cases, .. } => cases.iter().map(|case| &case.body).collect(),
        Statement::Loop { body, continuing, .. } => vec![body, continuing],
        _ => vec![],
    };
    let and_inside = |statement| std::iter::once(statement).chain(inside(statement).into_iter().flat_map(statements));
    block.iter().flat_map(and_inside).collect()
}

/// Whether a kernel writes a component of a vector that several threads see. Metal and D3D may make it a write of the whole
/// vector, which undoes what other threads write to the other components.
fn writes_components(module: &Module, info: &ModuleInfo) -> bool {
    let is_one = |statement: &Statement, of: &FunctionInfo| match statement {
        Statement::Store { pointer, .. } => match of[*pointer].ty.inner_with(&module.types) {
            TypeInner::ValuePointer { size: None, space, .. } => {
                matches!(space, AddressSpace::WorkGroup | AddressSpace::Storage { .. })
            }
            _ => false,
        },
        _ => false,
    };
    let does = |function: &Function, of: &FunctionInfo| statements(&function.body).into_iter().any(|s| is_one(s, of));
    module.functions.iter().any(|(handle, function)| does(function, &info[handle]))
        || module.entry_points.iter().enumerate().any(|(i, entry)| does(&entry.function, info.get_entry_point(i)))
}

/// Whether a kernel adds to a product of floats without `fma`: it is the driver's choice then to round the product or not, in
/// each kernel anew, and two forms of a kernel need not have the same bits.
fn adds_to_products(module: &Module, info: &ModuleInfo) -> bool {
    let does = |function: &Function, of: &FunctionInfo| {
        let product = |mut expression: Handle<Expression>| {
            while let Expression::Unary { expr, .. } | Expression::Splat { value: expr, .. } =
                function.expressions[expression]
            {
                expression = expr;
            }
            let float = of[expression].ty.inner_with(&module.types).scalar_kind() == Some(ScalarKind::Float);
            float && matches!(function.expressions[expression], Expression::Binary { op: BinaryOperator::Multiply, .. })
        };
        function.expressions.iter().any(|(_, expression)| match *expression {
            Expression::Binary { op: BinaryOperator::Add | BinaryOperator::Subtract, left, right } => {
                product(left) || product(right)
            }
            _ => false,
        })
    };
    module.functions.iter().any(|(handle, function)| does(function, &info[handle]))
        || module.entry_points.iter().enumerate().any(|(i, entry)| does(&entry.function, info.get_entry_point(i)))
}

fn to_spirv(variant: &Variant, module: &Module, info: &ModuleInfo) {
    // subgroups are Vulkan 1.1's
    let options = spv::Options { lang_version: (1, 3), ..Default::default() };
    let pipeline =
        spv::PipelineOptions { shader_stage: naga::ShaderStage::Compute, entry_point: variant.kernel.entry().into() };
    assert!(!done(variant, "SPIR-V", spv::write_vec(module, info, &options, Some(&pipeline))).is_empty());
}

fn to_msl(variant: &Variant, module: &Module, info: &ModuleInfo) {
    let mut resources = msl::EntryPointResources {
        immediates_buffer: Some(BINDINGS as u8),
        sizes_buffer: Some(BINDINGS as u8 + 1),
        ..Default::default()
    };
    for (_, variable) in module.global_variables.iter() {
        if let Some(binding) = variable.binding {
            let target = msl::BindTarget { buffer: Some(binding.binding as u8), mutable: true, ..Default::default() };
            resources.resources.insert(binding, target);
        }
    }
    let entry = variant.kernel.entry();
    let options = msl::Options {
        lang_version: (2, 4),
        per_entry_point_map: BTreeMap::from([(entry.to_owned(), resources)]),
        fake_missing_bindings: false,
        ..Default::default()
    };
    let pipeline =
        msl::PipelineOptions { entry_point: Some((naga::ShaderStage::Compute, entry.into())), ..Default::default() };
    let (text, translated) = done(variant, "MSL", msl::write_string(module, info, &options, &pipeline));
    assert!(!text.is_empty());
    for name in translated.entry_point_names {
        done(variant, "MSL", name);
    }
}

fn to_hlsl(variant: &Variant, module: &Module, info: &ModuleInfo, subgroups: bool) {
    let target = |register| hlsl::BindTarget { register, ..Default::default() };
    let mut options = hlsl::Options {
        // wave operations are those of 6.0
        shader_model: if subgroups { hlsl::ShaderModel::V6_0 } else { hlsl::ShaderModel::V5_1 },
        fake_missing_bindings: false,
        immediates_target: Some(target(BINDINGS as u32)),
        special_constants_binding: Some(target(BINDINGS as u32 + 1)),
        ..Default::default()
    };
    for (_, variable) in module.global_variables.iter() {
        if let Some(binding) = variable.binding {
            options.binding_map.insert(binding, target(binding.binding));
        }
    }
    let (mut text, pipeline) = (String::new(), hlsl::PipelineOptions::default());
    let written = hlsl::Writer::new(&mut text, &options, &pipeline).write(module, info, None);
    for name in done(variant, "HLSL", written).entry_point_names {
        done(variant, "HLSL", name);
    }
    assert!(!text.is_empty());
}

/// A kernel in all its variants, in every language.
fn examined(kernel: Kernel) -> Needs {
    let mut most = Needs::default();
    let matters = |variant: &Variant| variant.source(true) != variant.source(false);
    for variant in variants(kernel) {
        for subgroups in [false, true].into_iter().filter(|&subgroups| !subgroups || matters(&variant)) {
            let (module, info) = valid(&variant, subgroups);
            let needs = needs(&module);
            let within = needs.buffers <= BINDINGS
                && needs.threads <= THREADS
                && needs.workgroup_bytes <= WORKGROUP_BYTES
                && needs.parameter_bytes <= PARAMETER_BYTES as u32;
            assert!(within, "{variant:?}: {needs:?}");
            assert_eq!(needs.parameter_bytes, kernel.params().1, "{variant:?}: one struct in Rust and in WGSL");
            assert!(!writes_components(&module, &info), "{variant:?}: a component of a vector is written by itself");
            assert!(!adds_to_products(&module, &info), "{variant:?}: a product is added to without fma");
            to_spirv(&variant, &module, &info);
            to_msl(&variant, &module, &info);
            to_hlsl(&variant, &module, &info, subgroups);
            most = most.or_more(needs);
        }
    }
    most
}

#[test]
fn kernels_are_valid_in_every_language_and_keep_to_the_limits() {
    let kernels = Kernel::all();
    let workers = std::thread::available_parallelism().map_or(1, usize::from).min(kernels.len());
    let part = |worker: usize| -> Vec<(&'static str, Needs)> {
        kernels.iter().skip(worker).step_by(workers).map(|&kernel| (kernel.entry(), examined(kernel))).collect()
    };
    let mut table: BTreeMap<&str, Needs> = BTreeMap::new();
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..workers).map(|worker| scope.spawn(move || part(worker))).collect();
        for (entry, needs) in running.into_iter().flat_map(|thread| thread.join().unwrap()) {
            let most = table.entry(entry).or_default();
            *most = most.or_more(needs);
        }
    });
    let header = ["kernel", "buffers", "threads", "workgroup bytes", "parameter bytes"].join("\t") + "\n";
    let line = |(entry, needs): (&&str, &Needs)| {
        let Needs { buffers, threads, workgroup_bytes, parameter_bytes } = needs;
        format!("{entry}\t{buffers}\t{threads}\t{workgroup_bytes}\t{parameter_bytes}\n")
    };
    let list = header + &table.iter().map(line).collect::<String>();
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(LIST);
    if std::env::var_os("FMOE_RENEW").is_some() {
        std::fs::write(&path, &list).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default().replace("\r\n", "\n");
    assert!(
        kept == list,
        "crates/wgpu/{LIST} lists other kernels, or other needs of theirs, than there are. If they changed on purpose, \
         renew it with `FMOE_RENEW=1 cargo test -p fused-moe-wgpu --lib kernels`.\n--- is\n{list}--- was\n{kept}"
    );
}

#[test]
fn operands_that_a_text_asks_about() {
    assert!(asks("if (has_bias) {", "bias") && asks("has_bias", "bias"));
    assert!(!asks("has_bias_rows", "bias") && !asks("load_bias(i)", "bias"));
}

#[test]
fn components_that_are_written_by_themselves() {
    let found = |statement: &str| {
        let text = format!(
            "var<workgroup> vectors: array<vec4<f32>, 8>;\nvar<workgroup> numbers: array<f32, 8>;\n\
             @group(0) @binding(0) var<storage, read_write> out: array<vec2<u32>>;\n\
             fn write(i: u32) {{ var own: vec4<f32>; loop {{ if (i > 1u) {{ {statement} }} break; }} }}\n\
             @compute @workgroup_size(8) fn entry(@builtin(local_invocation_index) i: u32) {{ write(i); }}"
        );
        let module = naga::front::wgsl::parse_str(&text).unwrap();
        let info = Validator::new(ValidationFlags::all(), Capabilities::empty()).validate(&module).unwrap();
        writes_components(&module, &info)
    };
    assert!(found("vectors[1].x = 1.0;") && found("vectors[1][i] = 1.0;") && found("out[i].y = 1u;"));
    assert!(!found("vectors[i] = vec4(1.0);") && !found("numbers[i] = vectors[1].y;") && !found("own[i] = 1.0;"));
}

#[test]
fn products_that_are_added_to() {
    let found = |expression: &str| {
        let text = format!(
            "fn sum(x: vec3<f32>, i: u32) -> f32 {{ let xy = x.x * x.y; return {expression}; }}\n\
             @compute @workgroup_size(8) fn entry(@builtin(local_invocation_index) i: u32) {{ _ = sum(vec3(), i); }}"
        );
        let module = naga::front::wgsl::parse_str(&text).unwrap();
        let info = Validator::new(ValidationFlags::all(), Capabilities::empty()).validate(&module).unwrap();
        adds_to_products(&module, &info)
    };
    assert!(found("xy + x.z") && found("x.z - -xy") && found("x.z * (x.x + x.y * x.z)"));
    assert!(!found("fma(x.x, x.y, x.z)") && !found("xy * x.z") && !found("f32(i * 3u + 1u)") && !found("x.x + x.y"));
}
