//! One MoE layer of a checkpoint, on the best device here.
//!
//!     cargo run --example forward -- path/to/model [layer]

use fused_moe::checkpoint::{Checkpoint, CheckpointLayer};
use fused_moe::{Backend, Device, Layer, Options, Stream, View, Visitor};
use std::error::Error;

const TOKENS: usize = 4;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let path =
        arguments.next().unwrap_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/qwen3_moe").into());
    let checkpoint = Checkpoint::open(path)?;
    let index = match arguments.next() {
        Some(text) => text.parse()?,
        None => checkpoint.first_stored_layer().ok_or("no MoE layer in these files")?,
    };
    let layer = checkpoint.layer(index)?;
    println!("{}: {:?}", layer.name, layer.config);

    let (device, why) = Device::best_and_why()?;
    if let Some(why) = why {
        eprintln!("on {why}");
    }
    let y = device.visit(Forward { layer: &layer })?;
    for (token, row) in y.chunks(layer.config.hidden).enumerate() {
        let length = row.iter().map(|y| y * y).sum::<f32>().sqrt();
        println!("token {token}: |y| = {length:.6}, y[0] = {:+.6}", row[0]);
    }
    Ok(())
}

/// Written once over [`Backend`]: prepares the layer, brings x to the device, y back.
struct Forward<'a> {
    layer: &'a CheckpointLayer<'a>,
}

impl Visitor for Forward<'_> {
    type Output = Result<Vec<f32>, Box<dyn Error>>;

    fn visit<B: Backend>(self, backend: &B) -> Self::Output {
        let shape = [TOKENS, self.layer.config.hidden];
        let elements = TOKENS * self.layer.config.hidden;
        let layer = self.layer.prepare(backend, &Options::default())?;
        let mut workspace = layer.workspace(TOKENS)?;
        let stream = backend.stream()?;

        let x: Vec<u8> = (0..elements).flat_map(|i| (i as f32 * 0.37).sin().to_ne_bytes()).collect();
        let (mut x_memory, mut y_memory) = (backend.allocate(x.len())?, backend.allocate(x.len())?);
        backend.upload(&x, &mut x_memory)?;
        let x = View::new(B::read(&x_memory), fused_moe::DType::F32, 0, shape)?;
        let y = View::new(B::write(&mut y_memory), fused_moe::DType::F32, 0, shape)?;
        layer.forward(&stream, x, y, &mut workspace)?;
        println!("status {}", stream.status()?);

        let mut bytes = vec![0; elements * 4];
        backend.download(&stream, &y_memory, &mut bytes)?;
        Ok(bytes.as_chunks().0.iter().map(|&bytes| f32::from_ne_bytes(bytes)).collect())
    }
}
