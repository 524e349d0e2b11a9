//! Whatever the bytes are: an answer or an error, never a panic, never a size that the file cannot
//! hold.

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use strait_tensor::{Column, Dtype, FileLayout, TensorFile, TensorSpec, read_layout};

fn sample() -> Vec<u8> {
    let column = |name: &str, dtype, shape: &[u64]| {
        let shape = shape.to_vec();
        Column::new(name, TensorSpec { dtype, shape }).expect("a small shape")
    };
    let layout = FileLayout::plan(&[
        column("x", Dtype::Float64, &[6]),
        column("image", Dtype::Bfloat16, &[6, 2, 3]),
        column("z", Dtype::Complex64, &[6]),
        column("mask", Dtype::Bool8, &[6]),
    ])
    .expect("small columns");
    let mut file = vec![0; usize::try_from(layout.bytes).expect("a small file")];
    let footer = file.len() - layout.footer.len();
    file[..layout.header.len()].copy_from_slice(&layout.header);
    file[footer..].copy_from_slice(&layout.footer);
    file
}

/// Bytes to overwrite: where (counted round), and by what.
type Edits = Vec<(prop::sample::Index, u8)>;

fn any_edits() -> impl Strategy<Value = Edits> {
    let value = prop_oneof![
        any::<u8>(),
        Just(0),
        Just(1),
        Just(0x7f),
        Just(0x80),
        Just(0xff)
    ];
    prop::collection::vec((any::<prop::sample::Index>(), value), 1..6)
}

/// Edits only metadata, which is what a reader believes.
fn edit(file: &mut [u8], metadata: impl Iterator<Item = usize>, edits: Edits) {
    let places: Vec<usize> = metadata.collect();
    for (index, value) in edits {
        file[places[index.index(places.len())]] = value;
    }
}

/// What is answered must lie in the file.
fn check_layout(bytes: &[u8]) {
    for tensor in read_layout(bytes).into_iter().flatten() {
        let end = tensor.offset.checked_add(tensor.length);
        assert!(
            end.is_some_and(|end| end <= bytes.len() as u64),
            "{tensor:?}"
        );
        assert_eq!(tensor.spec.bytes(), Ok(tensor.length));
    }
}

/// Opens it and reads everything.
fn check_file(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).expect("writes into the temporary directory");
    let Ok(mut file) = TensorFile::open(path) else {
        return;
    };
    for index in 0..file.tensors().len() {
        let spec = file.tensors()[index].1.clone();
        let length = spec.bytes().expect("an opened tensor's size is checked");
        let length = usize::try_from(length).expect("a size that the file can hold");
        // No format that is read makes more of a byte than deflate does.
        assert!(
            length <= bytes.len() * 1032,
            "{spec} in {} bytes",
            bytes.len()
        );
        // An error is fine, as for damaged compressed data.
        let _ = file.read_into(index, &mut vec![0; length]);
    }
    for (name, reason) in file.unsupported() {
        assert!(!reason.is_empty(), "{name}");
    }
}

fn fixtures(extensions: &[&str]) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let mut paths: Vec<_> = fs::read_dir(directory)
        .expect("the fixtures")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| {
            let extension = path
                .extension()
                .and_then(|e| e.to_str())
                .unwrap_or_default();
            extensions.contains(&extension)
        })
        .collect();
    paths.sort();
    paths
        .iter()
        .map(|path| fs::read(path).expect("a fixture"))
        .collect()
}

#[test]
fn every_truncation_of_a_segment_is_an_error() {
    let file = sample();
    read_layout(&file).expect("the whole is fine");
    let near_the_ends = (0..2048).chain(file.len() - 2048..file.len());
    for length in near_the_ends.chain((0..file.len()).step_by(4099)) {
        assert!(read_layout(&file[..length]).is_err(), "{length}");
    }
}

#[test]
fn every_byte_of_a_segments_metadata_may_be_anything() {
    let file = sample();
    let header = 0..2200;
    let footer = file.len() - 1800..file.len();
    for at in header.chain(footer) {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            let mut file = file.clone();
            file[at] = value;
            check_layout(&file);
        }
    }
}

#[test]
fn a_footer_that_repeats_a_batch_is_refused() {
    // Two batches in a small file, the second one's place replaced by the first one's with a body
    // that spans the file.
    let bytes = fixtures(&["arrow"])
        .into_iter()
        .find(
            |bytes| matches!(read_layout(bytes), Err(error) if error.to_string().starts_with("2 ")),
        )
        .expect("two_batches.arrow");
    let footer_bytes = u32::from_le_bytes(
        bytes[bytes.len() - 10..bytes.len() - 6]
            .try_into()
            .expect("four bytes"),
    );
    let start = bytes.len() - 10 - footer_bytes as usize;
    let footer = arrow_ipc::root_as_footer(&bytes[start..bytes.len() - 10]).expect("a footer");
    let block = footer.recordBatches().expect("batches").get(1);
    let place = bytes
        .windows(24)
        .rposition(|window| window == block.0)
        .expect("the block lies in the footer");
    let mut bytes = bytes.clone();
    let large = (bytes.len() as u64).to_le_bytes();
    bytes[place + 16..place + 24].copy_from_slice(&large);
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("x.arrow");
    fs::write(&path, &bytes).expect("writes there");
    let text = TensorFile::open(&path)
        .expect_err("too many bytes")
        .to_string();
    assert!(text.contains("its first 2 record batches claim"), "{text}");
}

#[test]
fn lists_nested_without_end_are_refused() {
    use arrow_schema::{DataType, Field, Schema};
    let mut data_type = DataType::Int8;
    for _ in 0..50 {
        data_type = DataType::new_fixed_size_list(data_type, 1, true);
    }
    let schema = Schema::new(vec![Field::new("deep", data_type, true)]);
    let mut bytes = Vec::new();
    arrow_ipc::writer::FileWriter::try_new(&mut bytes, &schema)
        .and_then(|mut writer| writer.finish())
        .expect("writes into memory");
    let text = read_layout(&bytes).expect_err("too deep").to_string();
    assert!(
        text.contains("nested deeper") || text.contains("corrupt"),
        "{text}"
    );
}

const TABLES_AND_ARCHIVES: [&str; 3] = ["npz", "safetensors", "csv"];

#[test]
fn every_prefix_of_a_file_is_read_or_refused() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    for extension in TABLES_AND_ARCHIVES {
        for file in fixtures(&[extension]) {
            let path = directory.path().join("x").with_extension(extension);
            for length in 0..file.len() {
                check_file(&path, &file[..length]);
                // A table without its last rows is one.
                if extension != "csv" {
                    assert!(TensorFile::open(&path).is_err(), "{length} of {extension}");
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn edited_tables_and_archives(
        extension in prop::sample::select(&TABLES_AND_ARCHIVES),
        which in any::<prop::sample::Index>(),
        edits in any_edits(),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let fixtures = fixtures(&[extension]);
        let mut file = which.get(&fixtures).clone();
        let end = file.len();
        edit(&mut file, 0..end, edits);
        if let Some(cut) = cut {
            file.truncate(cut.index(end));
        }
        let directory = tempfile::tempdir().expect("a temporary directory");
        check_file(&directory.path().join("x").with_extension(extension), &file);
    }

    #[test]
    fn any_safetensors_header(header in r#"[{}\[\]":,0-9.e\-]{0,20}\{"x":\{"dtype":"F32","shape":\[[0-9,]{0,30}\],"data_offsets":\[[0-9]{1,20},[0-9]{1,20}\]\}\}"#) {
        let length = (header.len() as u64).to_le_bytes();
        let file = [&length[..], header.as_bytes(), &[0; 16]].concat();
        let directory = tempfile::tempdir().expect("a temporary directory");
        check_file(&directory.path().join("x.safetensors"), &file);
    }

    #[test]
    fn any_table(text in "[0-9a-f,\"\r\n.+eE\\- naif\u{e4}]{0,60}") {
        let directory = tempfile::tempdir().expect("a temporary directory");
        check_file(&directory.path().join("x.csv"), text.as_bytes());
    }

    #[test]
    fn edited_segments(edits in any_edits()) {
        let mut file = sample();
        let end = file.len();
        edit(&mut file, (0..2200).chain(end - 1800..end), edits);
        check_layout(&file);
    }

    #[test]
    fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        check_layout(&bytes);
        check_layout(&[b"ARROW1\0\0", bytes.as_slice(), b"\x20\0\0\0ARROW1"].concat());
    }

    #[test]
    fn edited_arrow_files(
        which in any::<prop::sample::Index>(),
        edits in any_edits(),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let fixtures = fixtures(&["arrow", "feather"]);
        let mut file = which.get(&fixtures).clone();
        let end = file.len();
        edit(&mut file, 0..end, edits);
        if let Some(cut) = cut {
            file.truncate(cut.index(end));
        }
        check_layout(&file);
        let directory = tempfile::tempdir().expect("a temporary directory");
        check_file(&directory.path().join("x.arrow"), &file);
    }

    #[test]
    fn edited_npy_files(
        which in any::<prop::sample::Index>(),
        edits in any_edits(),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let fixtures = fixtures(&["npy"]);
        let mut file = which.get(&fixtures).clone();
        let end = file.len();
        edit(&mut file, 0..end.min(90), edits);
        if let Some(cut) = cut {
            file.truncate(cut.index(end));
        }
        let directory = tempfile::tempdir().expect("a temporary directory");
        check_file(&directory.path().join("x.npy"), &file);
    }

    #[test]
    fn any_npy_header(header in r#"[{}'":,()TrueFalsdcfohpnt_<>|0-9L \\\[\]]{0,60}"#) {
        let length = u16::try_from(header.len()).expect("a short header").to_le_bytes();
        let file = [b"\x93NUMPY\x01\x00", &length[..], header.as_bytes(), &[0; 16]].concat();
        let directory = tempfile::tempdir().expect("a temporary directory");
        check_file(&directory.path().join("x.npy"), &file);
    }
}
