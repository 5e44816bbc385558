//! config.json: fields by any of their names, with errors that say where.

use super::directory::read_config;
use super::error::{Error, Result};
use super::families;
use super::family::{Case, Cases, Family, Field, Flag, Number, Size};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Where composite models keep what their language models are.
const SCOPES: [&[&str]; 5] = [
    &["thinker_config", "text_config"],
    &["talker_config", "text_config"],
    &["text_config"],
    &["llm_config"],
    &["language_config"],
];

/// The Jaro-Winkler similarity from which a name is worth suggesting.
pub(super) const ALIKE: f64 = 0.88;

/// What a number must be.
#[derive(Clone, Copy)]
pub(super) enum Within {
    /// Finite in f32.
    Finite,
    /// 0 or more.
    NotNegative,
    /// More than 0.
    Positive,
    /// From 0 to less than 1.
    Part,
    /// At most 1.
    AtMostOne,
}

impl Within {
    fn has(self, x: f64) -> bool {
        let finite = (x as f32).is_finite();
        finite
            && match self {
                Self::Finite => true,
                Self::NotNegative => x >= 0.0,
                Self::Positive => x as f32 > 0.0,
                Self::Part => (0.0..1.0).contains(&x),
                Self::AtMostOne => x <= 1.0,
            }
    }

    fn words(self) -> &'static str {
        match self {
            Self::Finite => "a number",
            Self::NotNegative => "a number from 0 on",
            Self::Positive => "a number above 0",
            Self::Part => "a number from 0 to less than 1",
            Self::AtMostOne => "a number up to 1",
        }
    }
}

/// The part of config.json that describes the language model.
#[derive(Debug)]
pub(super) struct ModelConfig {
    path: PathBuf,
    scope: Value,
    model_type: String,
    quantisation: Option<String>,
}

impl ModelConfig {
    /// Reads the file and finds the language models that it describes, at least one, each with its family.
    pub(super) fn open(path: &Path) -> Result<Vec<(Self, &'static Family)>> {
        let root: Value = read_config(path)?;
        if !root.is_object() {
            return Err(Error::ConfigKind { config: path.into(), actual: short(&root) });
        }
        let inner = SCOPES.map(|keys| keys.iter().try_fold(&root, |value, key| value.get(key)));
        let inner: Vec<&Value> = inner.into_iter().flatten().filter(|scope| scope.is_object()).collect();
        let mut types = Vec::new();
        let mut models = Vec::new();
        for &scope in inner.iter().chain([&&root]) {
            let Some(name) = scope.get("model_type").filter(|name| !name.is_null()) else { continue };
            let Some(name) = name.as_str() else { return Err(wrong(path, "model_type", "a text", name)) };
            types.push(name);
            let outermost = std::ptr::eq(scope, &root);
            if outermost && !models.is_empty() {
                break;
            }
            for family in families::all().filter(|family| is_named(family.model_types, name)) {
                // what is inside describes the language model even where it does not name itself
                let has_sizes = |scope: &&Value| family.hidden.iter().any(|name| scope.get(name).is_some());
                let scope = if outermost { inner.iter().copied().find(has_sizes).unwrap_or(scope) } else { scope };
                let quantisation = quantisation(scope).or_else(|| quantisation(&root));
                let model = Self { path: path.into(), scope: scope.clone(), model_type: name.into(), quantisation };
                models.push((model, family));
            }
        }
        let Some(first) = types.first() else {
            return Err(Error::ConfigMissing { config: path.into(), fields: vec!["model_type".into()] });
        };
        if !models.is_empty() {
            return Ok(models);
        }
        let model_type: String = first.chars().take(64).collect();
        let nearest = nearest(&model_type);
        Err(Error::UnknownModel { config: path.into(), model_type, nearest })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn model_type(&self) -> &str {
        &self.model_type
    }

    /// What the weights are quantised with, if they are.
    pub(super) fn quantisation(&self) -> Option<&str> {
        self.quantisation.as_deref()
    }

    fn value(&self, name: &str) -> Option<&Value> {
        name.split('.').try_fold(&self.scope, |value, key| match value {
            Value::Array(list) => list.get(key.parse::<usize>().ok()?),
            _ => value.get(key),
        })
    }

    /// The value of a field for a layer, null included, and the name it was found under.
    fn lookup(&self, field: &[&str], layer: usize) -> Option<(String, &Value)> {
        field.iter().find_map(|&name| match self.value(name)? {
            Value::Array(list) => list.get(layer).map(|value| (format!("{name}[{layer}]"), value)),
            value => Some((name.to_owned(), value)),
        })
    }

    /// As `lookup`; null is absent.
    fn find(&self, field: Field, layer: usize) -> Option<(String, &Value)> {
        field.iter().find_map(|&name| self.lookup(&[name], layer).filter(|(_, value)| !value.is_null()))
    }

    /// Whether a field is there and null.
    pub(super) fn is_null(&self, field: Field, layer: usize) -> bool {
        matches!(self.lookup(field, layer), Some((_, Value::Null)))
    }

    /// Whether a field is there, if only as an empty list.
    pub(super) fn has(&self, field: Field) -> bool {
        field.iter().any(|name| self.value(name).is_some_and(|value| !value.is_null()))
    }

    /// The name and the value that a field has for a layer, for a message.
    pub(super) fn named(&self, field: Field, layer: usize) -> (String, String) {
        self.find(field, layer).map_or_else(|| self.whole(field), |(name, value)| (name, short(value)))
    }

    /// The name and the value of a field for all layers, for a message.
    pub(super) fn whole(&self, field: Field) -> (String, String) {
        let found = field.iter().find_map(|&name| Some((name.to_owned(), short(self.value(name)?))));
        found.unwrap_or_else(|| (field.join(" or "), "absent".into()))
    }

    /// How long a list or a text is.
    pub(super) fn length(&self, field: Field) -> Option<usize> {
        field.iter().find_map(|name| match self.value(name)? {
            Value::Array(list) => Some(list.len()),
            Value::String(text) => Some(text.chars().count()),
            _ => None,
        })
    }

    /// The whole list that a field holds, which may be a text with commas.
    pub(super) fn list(&self, field: Field) -> Result<Option<Vec<u64>>> {
        let found = field.iter().find_map(|name| Some((name, self.value(name).filter(|value| !value.is_null())?)));
        let Some((name, value)) = found else { return Ok(None) };
        let numbers = match value {
            Value::Array(list) => list.iter().map(Value::as_u64).collect(),
            Value::String(text) => {
                let numbers = text.split(',').map(str::trim).filter(|number| !number.is_empty());
                numbers.map(|number| number.parse().ok()).collect()
            }
            _ => None,
        };
        match numbers {
            Some(numbers) => Ok(Some(numbers)),
            None => Err(self.wrong(name, "a list of layer numbers", value)),
        }
    }

    pub(super) fn optional_size(&self, field: Field, layer: usize) -> Result<Option<usize>> {
        let Some((name, value)) = self.find(field, layer) else { return Ok(None) };
        match value.as_u64().and_then(|number| usize::try_from(number).ok()) {
            Some(number) => Ok(Some(number)),
            None => Err(self.wrong(&name, "a number from 0 on", value)),
        }
    }

    pub(super) fn size(&self, field: Field, layer: usize) -> Result<usize> {
        self.optional_size(field, layer)?.ok_or_else(|| self.missing(field))
    }

    /// A size that may be absent, which is 0.
    pub(super) fn count(&self, size: Size, layer: usize) -> Result<usize> {
        match size {
            Size::Fixed(count) => Ok(count),
            Size::Field(field) => Ok(self.optional_size(field, layer)?.unwrap_or(0)),
        }
    }

    /// The number of a last layer; a negative one means no end.
    pub(super) fn optional_last(&self, field: Field, layer: usize) -> Result<Option<usize>> {
        match self.find(field, layer) {
            Some((_, value)) if value.as_i64().is_some_and(|last| last < 0) => Ok(None),
            _ => self.optional_size(field, layer),
        }
    }

    pub(super) fn number(&self, number: Number, within: Within, layer: usize) -> Result<f32> {
        match number {
            Number::Fixed(x) => Ok(x),
            Number::Field { field, default } => {
                self.optional_number(field, within, layer)?.or(default).ok_or_else(|| self.missing(field))
            }
            Number::Inverse(field) => Ok(1.0 / self.size(field, layer)? as f32),
            Number::InverseRoot(field) => Ok((1.0 / (self.size(field, layer)? as f64).sqrt()) as f32),
            Number::OneLess(field) => {
                let number = self.optional_precise(field, Within::Part, layer)?.ok_or_else(|| self.missing(field))?;
                Ok((1.0 - number) as f32)
            }
        }
    }

    pub(super) fn optional_number(&self, field: Field, within: Within, layer: usize) -> Result<Option<f32>> {
        Ok(self.optional_precise(field, within, layer)?.map(|x| x as f32))
    }

    /// A number that f32 does not round.
    pub(super) fn optional_precise(&self, field: Field, within: Within, layer: usize) -> Result<Option<f64>> {
        let Some((name, value)) = self.find(field, layer) else { return Ok(None) };
        match value.as_f64().filter(|&x| within.has(x)) {
            Some(x) => Ok(Some(x)),
            None => Err(self.wrong(&name, within.words(), value)),
        }
    }

    pub(super) fn flag(&self, flag: Flag, layer: usize) -> Result<bool> {
        match flag {
            Flag::Never => Ok(false),
            Flag::Always => Ok(true),
            Flag::Field { field, default } => {
                let Some((name, value)) = self.find(field, layer) else {
                    return default.ok_or_else(|| self.missing(field));
                };
                value.as_bool().ok_or_else(|| self.wrong(&name, "true or false", value))
            }
            Flag::Not(field) => Ok(!self.flag(Flag::Field { field, default: Some(false) }, layer)?),
        }
    }

    pub(super) fn text(&self, field: Field, layer: usize) -> Result<Option<&str>> {
        let Some((name, value)) = self.find(field, layer) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(&name, "a text", value))
    }

    /// The first case that holds.
    pub(super) fn case<T>(&self, cases: Cases<T>, layer: usize) -> Result<&'static T> {
        let mut unmet = None;
        for Case { when, then } in cases {
            let differs = when.iter().find_map(|(field, wanted)| {
                let (name, value) = self.find(field, layer)?;
                (value.as_str() != Some(wanted)).then_some((*field, name, value))
            });
            match differs {
                None => return Ok(then),
                Some(found) => unmet = unmet.or(Some(found)),
            }
        }
        let (field, name, value) = unmet.unwrap_or((&[], String::new(), &Value::Null));
        let known = cases.iter().flat_map(|case| case.when).filter(|(known, _)| *known == field);
        let known: Vec<&str> = known.map(|(_, value)| *value).collect();
        Err(self.unsupported(&name, &known.join(" or "), value))
    }

    /// The error where a field has no value for a layer.
    pub(super) fn missing(&self, field: Field) -> Error {
        let too_short = field.iter().find_map(|&name| Some((name, self.value(name).filter(|value| value.is_array())?)));
        match too_short {
            Some((name, list)) => self.wrong(name, "an entry for every layer", list),
            None => {
                let fields = field.iter().map(|&name| name.to_owned()).collect();
                Error::ConfigMissing { config: self.path.clone(), fields }
            }
        }
    }

    /// A value that may well be right, and that layers here are not made for.
    pub(super) fn unsupported(&self, field: &str, known: &str, actual: &Value) -> Error {
        let (config, field) = (self.path.clone(), field.into());
        Error::ConfigUnsupported { config, field, known: known.into(), actual: short(actual) }
    }

    /// Fields that cannot be right together.
    pub(super) fn contradiction(&self, fields: &[Field], layer: usize, reason: &'static str) -> Error {
        let fields = fields.iter().map(|field| self.named(field, layer)).collect();
        Error::ConfigContradiction { config: self.path.clone(), fields, reason }
    }

    pub(super) fn wrong(&self, field: &str, expected: &str, actual: &Value) -> Error {
        wrong(&self.path, field, expected, actual)
    }
}

fn wrong(config: &Path, field: &str, expected: &str, actual: &Value) -> Error {
    Error::ConfigValue { config: config.into(), field: field.into(), expected: expected.into(), actual: short(actual) }
}

/// The beginning of a value.
fn short(value: &Value) -> String {
    let text = value.to_string();
    if text.len() > 80 { text.chars().take(80).chain("...".chars()).collect() } else { text }
}

fn quantisation(scope: &Value) -> Option<String> {
    let settings = scope.get("quantization_config").filter(|settings| !settings.is_null())?;
    let method = settings.get("quant_method").and_then(Value::as_str).unwrap_or("a method without a name");
    Some(method.chars().take(64).collect())
}

/// The `model_type`s that [`Checkpoint::open`](super::Checkpoint::open) understands; each may end in `_text`.
pub fn known_model_types() -> impl Iterator<Item = &'static str> {
    let mut types = Vec::new();
    for &name in families::all().flat_map(|family| family.model_types) {
        // the parts of one model share its types
        if !types.contains(&name) {
            types.push(name);
        }
    }
    types.into_iter()
}

/// The entries of the table of families.
pub fn known_families() -> impl Iterator<Item = &'static str> {
    families::all().map(|family| family.name)
}

fn is_named(types: &[&str], name: &str) -> bool {
    types.contains(&name) || name.strip_suffix("_text").is_some_and(|name| types.contains(&name))
}

/// The known types that are spelled much like `name`, the likest first.
fn nearest(name: &str) -> Vec<&'static str> {
    let scored = known_model_types().map(|known| (strsim::jaro_winkler(name, known), known));
    let mut alike: Vec<(f64, &'static str)> = scored.filter(|(score, _)| *score >= ALIKE).collect();
    alike.sort_by(|a, b| b.0.total_cmp(&a.0));
    alike.into_iter().take(3).map(|(_, known)| known).collect()
}
