//! Moved or copied, large, small or empty: the same bits.

use serde_json::json;
use strait::error::Code;
use strait_client::wire;
use strait_tensor::Dtype;

use super::{MB, values};
use crate::support::{Rig, bytes_of, f64s};

#[test]
fn a_large_tensor_is_moved_and_never_copied() {
    let rig = Rig::new();
    let n = 100 * MB / 8;
    let x = values(n);
    let segment = rig.put_f64("x", &x);
    let mut results = Vec::new();
    for round in 0..5 {
        let invoked = rig.scale_shift("x", 2.0, 1.0);
        assert_eq!(invoked.report.copied_bytes, 0);
        if round >= 2 {
            // Mapping anew would take about 51 000.
            assert!(
                invoked.report.minor_faults < 256,
                "{} minor faults in call {round}",
                invoked.report.minor_faults
            );
        }
        let pages: Vec<_> = invoked
            .report
            .pages
            .iter()
            .map(|p| (p.port.as_str(), p.inode))
            .collect();
        let result = invoked.results[0].segment().unwrap();
        assert_eq!(
            pages,
            [("x", Some(segment.inode())), ("y", Some(result.inode()))]
        );
        results.push(result.inode());
        if round == 4 {
            let y = f64s(&bytes_of(result));
            assert!(y.iter().zip(&x).all(|(y, x)| *y == 2.0 * x + 1.0));
        }
    }
    assert!(
        results.windows(2).all(|w| w[0] == w[1]),
        "released results are recycled: {results:?}"
    );
    assert_eq!(rig.stats()["copied_bytes"], 0);
}

#[test]
fn both_sides_of_the_threshold_give_the_same_bits() {
    let threshold = 512 << 10;
    let kernels = [
        ("scale-shift", json!({"a": 1.5, "b": -3.0})),
        ("clip", json!({"lo": -100.0, "hi": 250.0})),
        ("zscore", json!({"axis": 0})),
        ("cast", json!({"to": "bfloat16"})),
        ("filter-finite", json!({})),
    ];
    let mut by_path: Vec<Vec<Vec<u8>>> = Vec::new();
    for move_min in [threshold, 1, u64::MAX] {
        let rig = Rig::with(|config| config.engine.move_min_bytes = move_min);
        let mut results = Vec::new();
        for elements in [threshold / 8 - 1, threshold / 8, threshold / 8 + 1] {
            let mut x = values(usize::try_from(elements).unwrap());
            x[7] = f64::NAN;
            x[9] = f64::INFINITY;
            rig.put_f64("x", &x);
            for (kernel, parameters) in &kernels {
                let call =
                    json!({"kernel": kernel, "inputs": {"x": "x"}, "parameters": parameters});
                let invoked = rig.invoke(call).unwrap();
                let bytes = bytes_of(invoked.results[0].segment().unwrap());
                let input = elements * 8;
                let moved_in = input >= move_min;
                let bound = if *kernel == "cast" {
                    elements * 2
                } else {
                    input
                };
                let moved_out = bound >= move_min;
                let expected = if moved_in { 0 } else { input }
                    + if moved_out { 0 } else { bytes.len() as u64 };
                assert_eq!(
                    invoked.report.copied_bytes, expected,
                    "{kernel} of {input} bytes, threshold {move_min}"
                );
                results.push(bytes);
            }
        }
        by_path.push(results);
    }
    assert!(by_path[0] == by_path[1] && by_path[1] == by_path[2]);
}

#[test]
fn simultaneous_calls_on_one_input_are_right() {
    let rig = Rig::new();
    let x = values(2 * MB / 8);
    rig.put_f64("x", &x);
    for _ in 0..10 {
        let started: Vec<_> = (0..6)
            .map(|k| {
                let call = json!({"kernel": "scale-shift", "inputs": {"x": "x"}, "parameters": {"a": k, "b": 0.5}});
                rig.start(call).1
            })
            .collect();
        for (k, answer) in started.into_iter().enumerate() {
            let invoked = answer.recv().unwrap().unwrap();
            let y = f64s(&bytes_of(invoked.results[0].segment().unwrap()));
            assert!(
                y.iter().zip(&x).all(|(y, x)| *y == k as f64 * x + 0.5),
                "call {k}"
            );
        }
    }
}

#[test]
fn small_and_empty_tensors() {
    let rig = Rig::new();
    rig.put("scalar", Dtype::Float64, &[], &3.5_f64.to_le_bytes());
    rig.put("empty", Dtype::Float64, &[0, 5], &[]);
    for (name, shape, expected) in [("scalar", vec![], vec![7.0]), ("empty", vec![0, 5], vec![])] {
        let invoked = rig
            .invoke(json!({"kernel": "scale-shift", "inputs": {"x": name}, "parameters": {"a": 2}}))
            .unwrap();
        let place = &invoked.results[0].segment().unwrap().tensors()[0];
        assert_eq!(place.spec.shape, shape);
        assert_eq!(
            f64s(&bytes_of(invoked.results[0].segment().unwrap())),
            expected
        );
    }
}

#[test]
fn a_tensor_beyond_wasm32_is_a_segment_and_no_input() {
    let rig = Rig::with(|config| config.memory.budget_bytes = Some(16 << 30));
    let shape = vec![5, 1 << 27];
    let tensors = vec![wire::NewTensor {
        name: "x".to_owned(),
        dtype: Dtype::Float64,
        shape,
    }];
    let (segment, _fd) = rig.me().create(tensors).unwrap();
    assert_eq!(segment.tensors()[0].length, 5 << 30);
    rig.me().publish(&segment, "big", false).unwrap();
    let status = rig
        .invoke(json!({"kernel": "zscore", "inputs": {"x": "big"}, "parameters": {"axis": 0}}))
        .unwrap_err();
    assert_eq!(
        (status.code, status.reason.name()),
        (Code::ResourceExhausted, "LIMIT_WASM32"),
        "{status}"
    );
    assert!(
        status.message.contains("wasm32") && status.message.contains("4 GiB"),
        "{status}"
    );
}
