//! Tensor files against what numpy, ml_dtypes, pyarrow, safetensors and pandas wrote (`data/make.py`).

mod arrow;
mod csv;
mod every;
mod npy;
mod npz;
mod safetensors;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use strait_tensor::{TensorFile, TensorSpec};

#[derive(serde::Deserialize)]
struct Expected {
    name: String,
    #[serde(flatten)]
    spec: TensorSpec,
    hex: String,
}

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data")
        .join(name)
}

fn expected() -> BTreeMap<String, Vec<Expected>> {
    let json = fs::read(data("expected.json")).expect("made by data/make.py");
    serde_json::from_slice(&json).expect("made by data/make.py")
}

fn bytes_of(hex: &str) -> Vec<u8> {
    (0..hex.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).expect("hex digits"))
        .collect()
}

fn open(path: &Path) -> TensorFile {
    TensorFile::open(path).unwrap_or_else(|error| panic!("{error}"))
}

/// What is in the tensor. The buffer is dirty before: every byte must be written.
fn read(file: &mut TensorFile, index: usize) -> Vec<u8> {
    let length = file.tensors()[index].1.bytes().expect("an opened tensor");
    let mut bytes = vec![0xa5; usize::try_from(length).expect("a small file")];
    file.read_into(index, &mut bytes)
        .unwrap_or_else(|error| panic!("{error}"));
    bytes
}

fn refusal(path: &Path) -> String {
    TensorFile::open(path).expect_err("a refusal").to_string()
}
