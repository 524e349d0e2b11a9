//! `.safetensors`: headers that contradict themselves or the file.

use std::fs;
use std::path::Path;

use strait_tensor::{Dtype, NamedTensor, TensorSpec, write, write_tensors};

use super::{open, read, refusal};

fn made(path: &Path, header: &str, data: &[u8]) {
    let length = (header.len() as u64).to_le_bytes();
    fs::write(path, [&length, header.as_bytes(), data].concat()).expect("writes there");
}

fn entry(name: &str, dtype: &str, shape: &str, from: u64, to: u64) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{from},{to}]}}"#)
}

#[test]
fn headers_that_contradict_themselves_are_refused() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("x.safetensors");
    let u8s = |name, from, to| entry(name, "U8", &format!("[{}]", to - from), from, to);
    for (entries, says) in [
        (
            vec![u8s("a", 0, 4), u8s("b", 3, 8)],
            "lies from byte 3 to 8 of the data, and the one before it ends at 4",
        ),
        (
            vec![u8s("a", 0, 4), u8s("b", 5, 8)],
            "lies from byte 5 to 8",
        ),
        (
            vec![u8s("a", 0, 4), u8s("b", 0, 4)],
            "lies from byte 0 to 4",
        ),
        (
            vec![u8s("a", 0, 7)],
            "tells of 7 bytes of data and 8 are there",
        ),
        (
            vec![u8s("a", 0, 9)],
            "tells of 9 bytes of data and 8 are there",
        ),
        (vec![u8s("a", 0, 4), u8s("a", 4, 8)], "\"a\" is there twice"),
        (
            vec![entry("a", "F32", "[3]", 0, 8)],
            "float32[3], has 12 bytes and lies in 8",
        ),
        (vec![entry("a", "U8", "[8]", 8, 0)], "lies from byte 8 to 0"),
        (vec![entry("a", "U8", "[-8]", 0, 8)], "invalid value"),
        (vec![entry("a", "U8", "[1.5]", 0, 8)], "invalid type"),
        (vec![r#""a":{"dtype":"U8"}"#.to_owned()], "missing field"),
        (vec!["a".to_owned()], "header"),
    ] {
        made(&path, &format!("{{{}}}", entries.join(",")), &[0; 8]);
        let text = refusal(&path);
        assert!(
            text.contains(says) && text.contains("x.safetensors: damaged"),
            "{text}"
        );
    }
    for (bytes, says) in [
        (&b""[..], "0 bytes, and its header's length alone has 8"),
        (
            &[2, 0, 0, 0, 0, 0, 0, 0, b'{'],
            "a header of 2 bytes in a file of 9",
        ),
        (
            &[0xff; 16],
            "a header of 18446744073709551615 bytes in a file of 16",
        ),
        (&[2, 0, 0, 0, 0, 0, 0, 0, b'"', 0xff], "header: "),
    ] {
        fs::write(&path, bytes).expect("writes there");
        let text = refusal(&path);
        assert!(text.contains(says), "{text}");
    }
}

#[test]
fn what_no_kernel_takes_is_named_and_the_rest_is_read() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("x.safetensors");
    let header = [
        r#"{"__metadata__":{"format":"pt"}"#.to_owned(),
        entry("scale", "F8_E8M0", "[4]", 0, 4),
        entry("half", "F4", "[2,4]", 4, 8),
        entry("deep", "U8", "[1,1,1,1,1,1,1,1,2]", 8, 10),
        entry("rest", "U8", "[2]", 10, 12) + "}   ",
    ];
    made(
        &path,
        &header.join(","),
        &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
    );
    let mut file = open(&path);
    assert_eq!(file.tensors().len(), 1);
    assert_eq!(read(&mut file, 0), [11, 12]);
    for (name, says) in [
        (
            "scale",
            "tensor \"scale\" has dtype \"F8_E8M0\", which no kernel takes; convert it",
        ),
        ("half", "has dtype \"F4\""),
        ("deep", "tensor \"deep\": "),
    ] {
        let text = file.find(name).expect_err("refused").to_string();
        assert!(text.contains(says), "{text}");
    }
}

#[test]
fn what_is_written_is_aligned_and_in_the_formats_order() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("x.safetensors");
    let spec = |dtype, shape: &[u64]| TensorSpec {
        dtype,
        shape: shape.to_vec(),
    };
    let (small, wide) = (spec(Dtype::Uint8, &[3]), spec(Dtype::Float64, &[1]));
    let odd = "a \"quoted\"\n\u{1f600} name";
    let tensors = [
        NamedTensor {
            name: odd,
            spec: &small,
            bytes: &[1, 2, 3],
        },
        NamedTensor {
            name: "wide",
            spec: &wide,
            bytes: &[8; 8],
        },
    ];
    write_tensors(&path, &tensors).unwrap_or_else(|error| panic!("{error}"));
    let mut file = open(&path);
    let names: Vec<&str> = file.tensors().iter().map(|(name, _)| &**name).collect();
    assert_eq!(names, ["wide", odd]);
    assert_eq!(read(&mut file, 0), [8; 8]);
    assert_eq!(read(&mut file, 1), [1, 2, 3]);
    let offset = file.storage(0).expect("a tensor").offset.expect("plain");
    assert_eq!(offset % 64, 0);

    let complex = spec(Dtype::Complex128, &[1]);
    let text = write(&path, "z", &complex, &[0; 16])
        .expect_err("no word")
        .to_string();
    assert!(
        text.contains("tensor \"z\": .safetensors has no complex128; write .npz"),
        "{text}"
    );
    let text = write(&path, "__metadata__", &small, &[1, 2, 3]).expect_err("a name of its own");
    assert!(text.to_string().contains("cannot be called"), "{text}");
    assert_eq!(read(&mut open(&path), 1), [1, 2, 3]);
}
