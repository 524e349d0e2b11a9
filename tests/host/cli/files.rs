//! Tensor files by their formats, on the command line: `put`, `get`, `run` and `inspect`.

use std::fs::{self, File};
use std::path::Path;
use std::process::Stdio;

use serde_json::json;
use strait_tensor::{Dtype, NamedTensor, TensorFile, TensorSpec, write_tensors};

use super::{bad, code, get_f64, good, good_json, names_in, put_f64, run, stderr, strait};
use crate::served::Served;

fn fixture(name: &str) -> String {
    format!(
        "{}/host/tensor/tests/data/{name}",
        env!("CARGO_MANIFEST_DIR")
    )
}

fn read(path: &Path, name: &str) -> (TensorSpec, Vec<u8>) {
    let mut file = TensorFile::open(path).unwrap();
    let index = file.find(name).unwrap();
    let spec = file.tensors()[index].1.clone();
    let mut bytes = vec![0; usize::try_from(spec.bytes().unwrap()).unwrap()];
    file.read_into(index, &mut bytes).unwrap();
    (spec, bytes)
}

fn f64s(bytes: &[u8]) -> Vec<f64> {
    let numbers = bytes.as_chunks().0.iter();
    numbers.map(|&b| f64::from_le_bytes(b)).collect()
}

#[test]
fn a_kernel_reads_and_writes_every_format() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let x: Vec<f64> = (0..6).map(f64::from).collect();
    let bytes: Vec<u8> = x.iter().flat_map(|v| v.to_le_bytes()).collect();
    let spec = TensorSpec {
        dtype: Dtype::Float64,
        shape: vec![6],
    };
    let (x, w) = ("x", "w");
    let tensors = [x, w].map(|name| NamedTensor {
        name,
        spec: &spec,
        bytes: &bytes,
    });
    for from in ["npz", "safetensors", "csv", "arrow"] {
        write_tensors(&at("in").with_extension(from), &tensors).unwrap();
        for to in ["npz", "safetensors", "csv", "npy", "feather"] {
            let out = format!("out.{to}");
            let input = format!("x=in.{from}#w");
            good(
                folder.path(),
                &[
                    "run",
                    "scale-shift",
                    "-i",
                    &input,
                    "-p",
                    "a=2",
                    "-p",
                    "b=1",
                    "-o",
                    &out,
                ],
            );
            let name = if to == "npy" { "out" } else { "y" };
            let (found, bytes) = read(&at(&out), name);
            assert_eq!(found, spec, "{from} {to}");
            assert_eq!(f64s(&bytes), [1.0, 3.0, 5.0, 7.0, 9.0, 11.0], "{from} {to}");
        }
        let input = format!("x=in.{from}");
        let text = bad(
            folder.path(),
            &["run", "scale-shift", "-i", &input, "-o", "out.npy"],
            3,
            "BAD_INPUT",
        );
        assert!(text.contains(&format!("x=in.{from}#NAME: ")), "{text}");
    }
    // A matrix of a table's columns; a name of one's own.
    good(
        folder.path(),
        &[
            "run",
            "scale-shift",
            "-i",
            "x=in.csv#*",
            "-p",
            "a=10",
            "-o",
            "y=m.safetensors#ten",
        ],
    );
    let (found, bytes) = read(&at("m.safetensors"), "ten");
    assert_eq!(found.shape, [6, 2]);
    assert_eq!(f64s(&bytes)[..4], [0.0, 0.0, 10.0, 10.0]);
}

#[test]
fn a_flight_of_several_tensors_goes_through_every_format_that_holds_them() {
    let host = Served::start(&[]);
    let columns = [
        ("x", Dtype::Float64),
        ("n", Dtype::Int64),
        ("flag", Dtype::Bool8),
    ];
    let specs = columns.map(|(name, dtype)| {
        let spec = TensorSpec {
            dtype,
            shape: vec![3],
        };
        (name, spec)
    });
    let bytes: Vec<Vec<u8>> = vec![
        [0.5_f64, -1.0, 3e300]
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect(),
        [-7_i64, 0, i64::MAX]
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect(),
        vec![1, 0, 1],
    ];
    let tensors: Vec<NamedTensor> = specs
        .iter()
        .zip(&bytes)
        .map(|((name, spec), bytes)| NamedTensor { name, spec, bytes })
        .collect();
    for format in ["npz", "safetensors", "csv", "arrow"] {
        let (file, copy) = (format!("a.{format}"), format!("b.{format}"));
        write_tensors(&host.path().join(&file), &tensors).unwrap();
        let put = good_json(host.path(), &["put", "t", &file, "--replace", "--json"]);
        let copied: usize = bytes.iter().map(Vec::len).sum();
        assert_eq!(put["copied_bytes"], copied);
        good(host.path(), &["get", "t", &copy]);
        for ((name, spec), bytes) in specs.iter().zip(&bytes) {
            let (found, read) = read(&host.path().join(&copy), name);
            assert_eq!((&found, &read), (spec, bytes), "{format}");
        }
    }
    let text = bad(host.path(), &["get", "t", "t.npy"], 3, "BAD_INPUT");
    assert!(text.contains("t#TENSOR, or write .npz"), "{text}");
    // Tensors of several leading axes are not one flight.
    let text = bad(
        host.path(),
        &["put", "u", &fixture("stored.npz")],
        3,
        "BAD_TENSOR",
    );
    assert!(text.contains("rows"), "{text}");
    good(
        host.path(),
        &["put", "u", &format!("{}#fortran", fixture("deflated.npz"))],
    );
    let text = bad(host.path(), &["get", "u", "u.csv"], 3, "BAD_FILE");
    assert!(
        text.contains("u.csv: tensor \"fortran\" has 3 axes"),
        "{text}"
    );
    assert!(
        !names_in(host.path())
            .iter()
            .any(|name| name.starts_with("u.csv"))
    );
}

#[test]
fn an_arrow_stream_comes_from_stdin_and_goes_to_stdout() {
    let host = Served::start(&[]);
    let at = |name: &str| host.path().join(name);
    let large: Vec<f64> = (0..300_000).map(f64::from).collect();
    put_f64(&at("x.arrow"), &[300_000], &large);
    put_f64(&at("x.npy"), &[300_000], &large);
    // From a file, and through a pipe, whose bytes are copied once more.
    let from_file = strait(host.path())
        .args(["put", "x", "-", "--json"])
        .stdin(File::open(at("x.arrow")).unwrap())
        .output()
        .unwrap();
    assert_eq!(code(&from_file), 0, "{}", stderr(&from_file));
    let put: serde_json::Value = serde_json::from_slice(&from_file.stdout).unwrap();
    assert_eq!(put["copied_bytes"], 2_400_000);
    let mut get = strait(host.path())
        .args(["get", "x", "-"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let through_pipe = strait(host.path())
        .args(["put", "again", "-", "--json"])
        .stdin(get.stdout.take().unwrap())
        .output()
        .unwrap();
    assert!(get.wait().unwrap().success());
    assert_eq!(code(&through_pipe), 0, "{}", stderr(&through_pipe));
    let put: serde_json::Value = serde_json::from_slice(&through_pipe.stdout).unwrap();
    assert!(put["copied_bytes"].as_u64().unwrap() > 4_800_000, "{put}");
    good(host.path(), &["get", "again", "again.npy"]);
    assert_eq!(get_f64(&at("again.npy")).1, large);

    // A kernel between two pipes.
    let ran = strait(host.path())
        .args(["run", "scale-shift", "-i", "x=-", "-p", "a=-1", "-o", "-"])
        .stdin(File::open(at("x.arrow")).unwrap())
        .output()
        .unwrap();
    assert_eq!(code(&ran), 0, "{}", stderr(&ran));
    fs::write(at("ran.arrow"), &ran.stdout).unwrap();
    assert_eq!(get_f64(&at("ran.arrow")).1[299_999], -299_999.0);

    let text = run(host.path(), &["get", "x", "-", "--json"]);
    assert_eq!(code(&text), 2, "{}", stderr(&text));
    assert!(stderr(&text).contains("both go to stdout"));
    let text = bad(host.path(), &["put", "none", "-"], 3, "BAD_FILE");
    assert!(text.contains("stdin: "), "{text}");
    // Nobody reads to the end.
    let mut get = strait(host.path())
        .args(["get", "x", "-"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(get.stdout.take());
    let ended = get.wait_with_output().unwrap();
    assert!(!stderr(&ended).contains("panicked"));
}

#[test]
fn inspect_shows_what_is_in_a_file_a_flight_and_a_plugin() {
    let host = Served::start(&[]);
    let x = [1.0, 2.0, f64::NAN, 4.0, f64::INFINITY, 1.0];
    put_f64(&host.path().join("x.npy"), &[2, 3], &x);
    let file = good_json(host.path(), &["inspect", "x.npy", "--json"]);
    good(host.path(), &["put", "x", "x.npy"]);
    let flight = good_json(host.path(), &["inspect", "x", "--json"]);
    for (said, offset) in [(&file, 128), (&flight, 64 << 10)] {
        let tensor = &said["tensors"][0];
        let expected = json!({
            "name": "x", "dtype": "float64", "shape": [2, 3], "bytes": 48, "layout": "row-major",
            "offset": offset, "alignment": offset, "measured": "value", "count": 6, "nan": 1,
            "infinite": 1, "min": 1.0, "max": "inf", "mean": 2.0,
        });
        for (key, value) in expected.as_object().unwrap() {
            assert_eq!(&tensor[key], value, "{key}: {tensor}");
        }
        let parts = tensor["histogram"].as_array().unwrap();
        assert_eq!(parts.len(), 16);
        let counts: Vec<u64> = parts
            .iter()
            .map(|part| part["count"].as_u64().unwrap())
            .collect();
        assert_eq!((counts[0], counts[5], counts[15]), (2, 1, 1));
        assert_eq!(counts.iter().sum::<u64>(), 4);
    }
    let text = good(host.path(), &["inspect", "x"]);
    assert!(text.contains("x  float64 [2, 3]  48 B"), "{text}");
    assert!(
        text.contains("min 1, max inf, mean 2, 1 NaN, 1 infinite"),
        "{text}"
    );
    assert!(
        text.contains(&format!("{} 2", "\u{2588}".repeat(40))),
        "{text}"
    );
    assert!(!text.contains('\u{1b}'), "{text}");

    for (what, says) in [
        ("several.safetensors#c8", "magnitude: min "),
        ("several.safetensors#none", "no elements"),
        ("several.safetensors#mask", "min 0, max 1, mean 0.666667"),
        ("deflated.npz#big", "row-major, big-endian, deflated"),
        ("fortran_f8.npy", "column-major, at byte 128"),
        ("scalar.npy", "float64 []"),
        ("pandas.csv#large", "max 18446744073709551615"),
        ("two_batches.arrow#x", "in 2 record batches"),
        ("lz4.feather#x", "LZ4"),
    ] {
        let text = good(host.path(), &["inspect", &fixture(what)]);
        assert!(text.contains(says), "{what}: {text}");
    }
    let all = run(host.path(), &["inspect", &fixture("mixed.npz")]);
    assert!(stderr(&all).contains("no tensor: \"readme.txt\" in it is no .npy"));
    for (what, reason) in [
        ("absent.npy", "BAD_FILE"),
        ("absent", "FLIGHT_NOT_FOUND"),
        ("x.npy#z", "TENSOR_NOT_FOUND"),
    ] {
        bad(host.path(), &["inspect", what], 3, reason);
    }
    bad(
        host.path(),
        &["inspect", "x.npy", "--flight"],
        3,
        "FLIGHT_NOT_FOUND",
    );

    let wasm = super::plugin(host.path(), "fails");
    let wasm = wasm.to_str().unwrap();
    assert!(good(host.path(), &["inspect", wasm]).starts_with("k  ("));
    let said = good_json(host.path(), &["inspect", wasm, "--json"]);
    assert_eq!(said["kernels"][0]["name"], "k");
}
