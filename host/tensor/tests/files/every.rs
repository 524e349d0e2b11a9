//! What holds of every format.

use std::fs;

use strait_tensor::{Dtype, FileError, TensorSpec, write};

use super::{bytes_of, data, expected, open, read, refusal};

#[test]
fn files_of_others_are_read_as_they_mean_them() {
    let expected = expected();
    assert!(expected.len() > 40);
    for (name, tensors) in expected {
        let mut file = open(&data(&name));
        for tensor in tensors {
            let index = file
                .find(&tensor.name)
                .unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(
                file.tensors()[index].1,
                tensor.spec,
                "{name} {}",
                tensor.name
            );
            assert_eq!(
                read(&mut file, index),
                bytes_of(&tensor.hex),
                "{name} {}",
                tensor.name
            );
        }
    }
}

/// The elements' bytes without their order, which a scan does not keep.
fn sorted(bytes: &[u8], size: u64) -> Vec<&[u8]> {
    let size = usize::try_from(size).expect("at most 16");
    let mut elements: Vec<&[u8]> = bytes.chunks(size).collect();
    elements.sort_unstable();
    elements
}

#[test]
fn a_scan_sees_what_a_read_sees() {
    for name in expected().into_keys() {
        let mut file = open(&data(&name));
        for index in 0..file.tensors().len() {
            let mut scanned = Vec::new();
            file.scan(index, &mut |block| scanned.extend_from_slice(block))
                .unwrap_or_else(|error| panic!("{error}"));
            let whole = read(&mut file, index);
            let size = file.tensors()[index].1.dtype.size();
            assert_eq!(sorted(&scanned, size), sorted(&whole, size), "{name}");
            let place = file.storage(index).expect("an opened tensor");
            let is_as_it_lies = place.layout == "row-major" && whole.len() > 8;
            if let (Some(offset), true) = (place.offset, is_as_it_lies) {
                let bytes = fs::read(data(&name)).expect("made by data/make.py");
                let offset = usize::try_from(offset).expect("a small file");
                if file.tensors()[index].1.dtype != Dtype::Bool8 {
                    assert!(bytes[offset..].starts_with(&whole), "{name} {place:?}");
                }
            }
        }
    }
}

#[test]
fn every_dtype_comes_back_from_every_binary_format() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    for dtype in Dtype::ALL {
        for shape in [&[][..], &[3], &[2, 3], &[0], &[2, 0], &[300_000]] {
            let spec = TensorSpec {
                dtype,
                shape: shape.to_vec(),
            };
            let length = spec.bytes().expect("a small shape");
            let mask = if dtype == Dtype::Bool8 { 1 } else { 0xff };
            let bytes: Vec<u8> = (0..length)
                .map(|i| u8::try_from(i % 251).expect("below 251") & mask)
                .collect();
            for extension in ["npy", "npz", "safetensors", "arrow", "feather"] {
                if extension.starts_with("np") && dtype == Dtype::Float8E4m3fn {
                    continue; // the file does not say what it is
                }
                if extension == "safetensors" && dtype == Dtype::Complex128 {
                    continue; // it has no word for that
                }
                let path = directory.path().join("x").with_extension(extension);
                write(&path, "x", &spec, &bytes).unwrap_or_else(|error| panic!("{error}"));
                let mut file = open(&path);
                assert_eq!(file.tensors(), [("x".to_owned(), spec.clone())]);
                assert!(read(&mut file, 0) == bytes, "{spec} {extension}");
                let mut scanned = Vec::new();
                file.scan(0, &mut |block| scanned.extend_from_slice(block))
                    .unwrap_or_else(|error| panic!("{error}"));
                assert!(scanned == bytes, "{spec} {extension}");
            }
        }
    }
}

#[test]
fn a_bool8_is_0_or_1() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("mask.npy");
    let spec = TensorSpec {
        dtype: Dtype::Bool8,
        shape: vec![4],
    };
    write(&path, "mask", &spec, &[0, 1, 2, 255]).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(read(&mut open(&path), 0), [0, 1, 1, 1]);
}

#[test]
fn mistakes_of_the_caller() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = |name: &str| directory.path().join(name);
    let text = refusal(&path("absent.npy"));
    assert!(
        text.contains("absent.npy: cannot open it: No such file"),
        "{text}"
    );
    let text = refusal(&path("x.txt"));
    assert!(
        text.contains("must say the format: .npy, .npz, .safetensors, .csv, .arrow or .feather"),
        "{text}"
    );
    fs::create_dir(path("directory.npy")).expect("creates a directory");
    let pipe = std::process::Command::new("mkfifo")
        .arg(path("pipe.npy"))
        .status();
    assert!(pipe.expect("mkfifo").success());
    let _socket = std::os::unix::net::UnixListener::bind(path("socket.npy")).expect("a socket");
    std::os::unix::fs::symlink("/dev/zero", path("zero.npy")).expect("a link");
    std::os::unix::fs::symlink(path("loop.npy"), path("loop.npy")).expect("a link");
    for name in ["directory", "pipe", "socket", "zero"] {
        let text = refusal(&path(name).with_extension("npy"));
        assert!(text.contains("not a regular file"), "{text}");
        assert!(text.contains(name), "{text}");
    }
    assert!(refusal(&path("loop.npy")).contains("loop.npy: cannot open it"));
    let linked = path("linked.npy");
    std::os::unix::fs::symlink(data("u8.npy").canonicalize().expect("it is there"), &linked)
        .expect("a link");
    assert_eq!(open(&linked).tensors()[0].0, "linked");
    fs::write(path("text.arrow"), "a,b\n1,2\n").expect("writes there");
    assert!(
        refusal(&path("text.arrow")).contains("not Arrow IPC"),
        "{}",
        refusal(&path("text.arrow"))
    );

    let mut file = open(&data("one_batch.arrow"));
    let text = file.find("y").expect_err("no such column").to_string();
    assert!(
        text.contains(r#"no tensor "y"; it has "x", "i", "image""#),
        "{text}"
    );
    let error = file.read_into(0, &mut [0; 3]).expect_err("a wrong size");
    assert!(
        matches!(
            error,
            FileError::BufferSize {
                needed: 320,
                given: 3,
                ..
            }
        ),
        "{error}"
    );
    let error = file.read_into(99, &mut []).expect_err("a wrong index");
    assert!(
        matches!(
            error,
            FileError::Index {
                index: 99,
                count: 5,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn a_file_that_shrinks_while_it_is_read_says_so() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    for name in [
        "f8.npy",
        "fortran_f8.npy",
        "one_batch.arrow",
        "two_batches.arrow",
        "several.safetensors",
    ] {
        let path = directory.path().join(name);
        fs::copy(data(name), &path).expect("copies it");
        let mut file = open(&path);
        let lengths = file.tensors().iter();
        let mut lengths = lengths.map(|(_, spec)| spec.bytes().expect("an opened tensor"));
        let index = lengths
            .position(|length| length > 0)
            .expect("not all are empty");
        let length = file.tensors()[index].1.bytes().expect("an opened tensor");
        let shrunk = fs::OpenOptions::new().write(true).open(&path);
        shrunk.and_then(|f| f.set_len(160)).expect("cuts it off");
        let mut bytes = vec![0; usize::try_from(length).expect("a small file")];
        let text = file
            .read_into(index, &mut bytes)
            .expect_err("cut off")
            .to_string();
        assert!(
            text.contains("truncated while it was read") && text.contains(name),
            "{text}"
        );
    }
}

#[test]
fn a_write_that_fails_leaves_nothing_behind() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let spec = TensorSpec {
        dtype: Dtype::Float32,
        shape: vec![2],
    };
    let error = write(&directory.path().join("x.npy"), "x", &spec, &[0; 7]).expect_err("7 of 8");
    assert!(
        error
            .to_string()
            .contains("has 8 bytes, the buffer for it 7"),
        "{error}"
    );
    // The rename is what fails: a directory of that name is there.
    let taken = directory.path().join("taken.npy");
    fs::create_dir(&taken).expect("creates a directory");
    let error = write(&taken, "x", &spec, &[0; 8]).expect_err("the name is taken");
    assert!(
        error.to_string().contains("taken.npy: cannot move"),
        "{error}"
    );
    let absent = directory.path().join("absent/x.arrow");
    let error = write(&absent, "x", &spec, &[0; 8]).expect_err("no such directory");
    assert!(
        error.to_string().contains("absent/x.arrow: cannot create"),
        "{error}"
    );
    let long_row = TensorSpec {
        dtype: Dtype::Int8,
        shape: vec![0, 1 << 31],
    };
    let error = write(&directory.path().join("x.arrow"), "x", &long_row, &[]).expect_err("a row");
    assert!(error.to_string().contains("reshape"), "{error}");
    let left: Vec<_> = fs::read_dir(directory.path())
        .expect("the directory")
        .map(|entry| entry.expect("an entry").file_name())
        .collect();
    assert_eq!(left, ["taken.npy"]);
}

#[test]
fn a_finished_file_replaces_the_old_one() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("x.arrow");
    for value in [1_u8, 2] {
        let spec = TensorSpec {
            dtype: Dtype::Uint8,
            shape: vec![u64::from(value)],
        };
        write(&path, "x", &spec, &vec![value; value.into()])
            .unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(read(&mut open(&path), 0), vec![value; value.into()]);
    }
    assert_eq!(
        fs::read_dir(directory.path())
            .expect("the directory")
            .count(),
        1
    );
}
