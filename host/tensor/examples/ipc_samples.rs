//! Writes one Arrow file for each case of the segment layout, and a JSON of what is in them, into
//! the directory given: what `tests/python/test_ipc_layout.py` reads with pyarrow.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use serde_json::json;
use strait_tensor::{Column, Dtype, FileLayout, TensorSpec};

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> Fallible<()> {
    let directory = std::env::args_os()
        .nth(1)
        .ok_or("usage: ipc_samples DIRECTORY")?;
    let directory = Path::new(&directory);
    let mut cases = Vec::new();
    for dtype in Dtype::ALL {
        for (rank, shape) in [&[][..], &[5], &[3, 4], &[2, 3, 2]].into_iter().enumerate() {
            cases.push(sample(
                directory,
                &format!("{dtype}-{rank}d"),
                &[(dtype, shape)],
                0,
            )?);
        }
    }
    for (name, columns, spare_bytes) in [
        ("no-rows", &[(Dtype::Float64, &[0][..])][..], 0),
        ("no-rows-2d", &[(Dtype::Float64, &[0, 3])], 0),
        ("no-columns", &[(Dtype::Float64, &[3, 0])], 0),
        ("inner-zero", &[(Dtype::Float32, &[2, 0, 3])], 0),
        ("no-rows-complex", &[(Dtype::Complex64, &[0])], 0),
        ("rank-8", &[(Dtype::Int16, &[2, 1, 2, 1, 2, 1, 2, 3])], 0),
        (
            "several",
            &[
                (Dtype::Float32, &[4][..]),
                (Dtype::Bool8, &[4, 2]),
                (Dtype::Complex128, &[4]),
                (Dtype::Uint64, &[4, 2, 2]),
            ],
            0,
        ),
        (
            "scalar-beside-row",
            &[(Dtype::Float64, &[][..]), (Dtype::Int8, &[1, 3])],
            0,
        ),
        (
            "huge",
            &[(Dtype::Int8, &[600_000][..]), (Dtype::Float64, &[600_000])],
            0,
        ),
        ("shrunk", &[(Dtype::Float64, &[10][..])], 5 << 20),
    ] {
        cases.push(sample(directory, name, columns, spare_bytes)?);
    }
    serde_json::to_writer_pretty(File::create(directory.join("cases.json"))?, &cases)?;
    Ok(())
}

/// Writes the file, with holes where nothing lies, and answers its entry in the JSON.
fn sample(
    directory: &Path,
    name: &str,
    columns: &[(Dtype, &[u64])],
    spare_bytes: u64,
) -> Fallible<serde_json::Value> {
    let columns = columns
        .iter()
        .enumerate()
        .map(|(index, &(dtype, shape))| {
            let shape = shape.to_vec();
            let mut column = Column::new(format!("c{index}"), TensorSpec { dtype, shape })?;
            column.reserve_bytes += spare_bytes;
            Ok(column)
        })
        .collect::<Fallible<Vec<Column>>>()?;
    let layout = FileLayout::plan(&columns)?;
    let mut file = File::create(directory.join(format!("{name}.arrow")))?;
    file.write_all(&layout.header)?;
    for tensor in &layout.tensors {
        file.seek(SeekFrom::Start(tensor.offset))?;
        file.write_all(&pattern(tensor.spec.dtype, tensor.length))?;
    }
    file.seek(SeekFrom::Start(layout.footer_offset))?;
    file.write_all(&layout.footer)?;
    Ok(json!({
        "name": name,
        "bytes": layout.bytes,
        "footer_offset": layout.footer_offset,
        "tensors": layout.tensors,
    }))
}

/// Bytes that the reader can compute too: byte `i` of a tensor is `i * 37 + 11` modulo 251, or its
/// lowest bit where only 0 and 1 are values.
fn pattern(dtype: Dtype, length: u64) -> Vec<u8> {
    let mask = if dtype == Dtype::Bool8 { 1 } else { 0xff };
    (0..length)
        .map(|i| u8::try_from((i % 251 * 37 + 11) % 251).unwrap_or(0) & mask)
        .collect()
}
