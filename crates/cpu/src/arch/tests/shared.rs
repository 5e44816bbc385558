use super::super::SharedSlice;
use fused_moe_core::dtype::Element;
use half::{bf16, f16};

fn two_writers<T: Element>(number: fn(u16) -> T) {
    let mut buffer: Vec<T> = vec![number(0); 1001];
    let shared = SharedSlice::new(&mut buffer);
    std::thread::scope(|scope| {
        for odd in 0..2 {
            scope.spawn(move || {
                for row in (0..100).filter(|row| row % 2 == odd) {
                    let values: Vec<T> = (row * 10..row * 10 + 10).map(|i| number(i as u16)).collect();
                    shared.store_slice(row * 10, &values);
                }
            });
        }
    });
    shared.store(1000, number(1000));
    for (i, value) in buffer.iter().enumerate() {
        assert_eq!(*value, number(i as u16));
    }
}

#[test]
fn two_threads_write_one_buffer() {
    two_writers(f32::from);
    two_writers(u32::from);
    two_writers(f16::from_bits);
    two_writers(bf16::from_bits);
    SharedSlice::<f32>::new(&mut []).store(0, 1.0);
}

#[test]
fn stores_out_of_range_are_left_out() {
    let mut buffer = [0.0f32; 3];
    let shared = SharedSlice::new(&mut buffer);
    shared.store_slice(2, &[1.0, 2.0]);
    shared.store_slice(4, &[3.0]);
    shared.store(3, 4.0);
    shared.store(usize::MAX, 5.0);
    assert_eq!(buffer, [0.0, 0.0, 1.0]);
}
