//! `.npz` archives: what is in them beside arrays, and sizes that lie.

use std::fs;
use std::path::Path;

use strait_tensor::{Dtype, NamedTensor, TensorFile, TensorSpec, write, write_tensors};

use super::{data, open, read, refusal};

/// A member of an archive made by hand.
struct Member {
    name: &'static str,
    /// 0: stored, 8: deflated.
    method: u16,
    stored: Vec<u8>,
    /// What the archive says of it.
    crc: u32,
    size: u32,
    stored_size: u32,
}

impl Member {
    fn stored(name: &'static str, bytes: &[u8]) -> Member {
        let size = u32::try_from(bytes.len()).expect("small");
        Member {
            name,
            method: 0,
            stored: bytes.to_vec(),
            crc: crc32(bytes),
            size,
            stored_size: size,
        }
    }

    /// As one block that is not compressed.
    fn deflated(name: &'static str, bytes: &[u8]) -> Member {
        let length = u16::try_from(bytes.len()).expect("small");
        let mut stored = vec![1];
        stored.extend(length.to_le_bytes());
        stored.extend((!length).to_le_bytes());
        stored.extend(bytes);
        Member {
            method: 8,
            stored_size: u32::try_from(stored.len()).expect("small"),
            stored,
            ..Member::stored(name, bytes)
        }
    }
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg())
        })
    })
}

fn zip(members: &[Member]) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for member in members {
        let offset = u32::try_from(file.len()).expect("small");
        let mut common = vec![20, 0, 0, 0];
        common.extend(member.method.to_le_bytes());
        common.extend([0, 0, 0x21, 0]);
        for number in [member.crc, member.stored_size, member.size] {
            common.extend(number.to_le_bytes());
        }
        common.extend(
            u16::try_from(member.name.len())
                .expect("short")
                .to_le_bytes(),
        );
        common.extend([0, 0]);
        file.extend([b"PK\x03\x04", &common[..], member.name.as_bytes()].concat());
        file.extend(&member.stored);
        directory.extend([b"PK\x01\x02\x14\0", &common[..], &[0; 10]].concat());
        directory.extend(offset.to_le_bytes());
        directory.extend(member.name.as_bytes());
    }
    let count = u16::try_from(members.len()).expect("few").to_le_bytes();
    let start = u32::try_from(file.len()).expect("small");
    let length = u32::try_from(directory.len()).expect("small");
    file.extend(directory);
    file.extend([b"PK\x05\x06\0\0\0\0", &count[..], &count].concat());
    file.extend([&length.to_le_bytes()[..], &start.to_le_bytes(), &[0, 0]].concat());
    file
}

/// An `.npy` that says it has `says` bytes and has `has`.
fn npy(says: u64, has: usize) -> Vec<u8> {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("x.npy");
    let spec = TensorSpec {
        dtype: Dtype::Uint8,
        shape: vec![0],
    };
    write(&path, "x", &spec, &[]).unwrap_or_else(|error| panic!("{error}"));
    let mut bytes = fs::read(&path).expect("just written");
    let text = String::from_utf8_lossy(&bytes[10..]).replace("(0,)", &format!("({says},)"));
    let spaces = text.len() - (bytes.len() - 10);
    let text = text.replacen(&" ".repeat(spaces), "", 1);
    bytes.truncate(10);
    bytes.extend(text.as_bytes());
    bytes.extend(vec![7; has]);
    bytes
}

fn opened(path: &Path, members: &[Member]) -> TensorFile {
    fs::write(path, zip(members)).expect("writes there");
    open(path)
}

/// Why the only member is not read.
fn unsupported(path: &Path, member: Member) -> String {
    let file = opened(path, &[member]);
    let [(_, reason)] = file.unsupported() else {
        panic!("{:?} {:?}", file.tensors(), file.unsupported())
    };
    reason.clone()
}

fn damage(path: &Path, member: Member) -> String {
    let mut file = opened(path, &[member]);
    let length = file.tensors()[0].1.bytes().expect("small");
    let mut bytes = vec![0; usize::try_from(length).expect("small")];
    let error = file.read_into(0, &mut bytes).expect_err("damaged");
    error.to_string()
}

#[test]
fn what_is_no_array_is_named() {
    let mixed = open(&data("mixed.npz"));
    let reasons: Vec<&str> = mixed.unsupported().iter().map(|(_, r)| &**r).collect();
    assert_eq!(reasons.len(), 2);
    assert!(reasons[0].contains("\"readme.txt\" in it is no .npy"));
    assert!(
        reasons[1].contains("array \"lzma\": it is compressed with Lzma; save it with numpy.savez"),
        "{reasons:?}"
    );
    let mut stored = open(&data("stored.npz"));
    let text = stored.find("text").expect_err("strings").to_string();
    assert!(
        text.contains("stored.npz: array \"text\": dtype \"<U2\" is of strings"),
        "{text}"
    );
    let text = stored.find("z").expect_err("not there").to_string();
    assert!(
        text.contains("no tensor \"z\"; it has \"x\", \"counts\""),
        "{text}"
    );
}

#[test]
fn sizes_that_lie_are_found_out() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("x.npz");
    let good = npy(100, 100);
    for member in [
        Member::stored("x.npy", &good),
        Member::deflated("x.npy", &good),
    ] {
        assert_eq!(read(&mut opened(&path, &[member]), 0), [7; 100]);
    }
    // The archive announces gigabytes in a few bytes; so does the array.
    let mut bomb = Member::deflated("x.npy", &npy(0xf000_0000, 100));
    bomb.size = 0xf000_0080;
    let text = unsupported(&path, bomb);
    assert!(text.contains("cannot hold that"), "{text}");
    let mut bomb = Member::stored("x.npy", &npy(0xf000_0000, 100));
    (bomb.size, bomb.stored_size) = (0xf000_0080, 0xf000_0080);
    let text = unsupported(&path, bomb);
    assert!(text.contains("cannot hold that"), "{text}");
    // The array alone does.
    let text = unsupported(&path, Member::deflated("x.npy", &npy(0xf000_0000, 100)));
    assert!(text.contains("cut off: uint8[4026531840]"), "{text}");
    // What comes out is shorter or longer than the archive and the array say.
    let mut short = Member::deflated("x.npy", &npy(100, 60));
    short.size += 40;
    assert!(damage(&path, short).contains("ends before its data does"));
    let mut long = Member::deflated("x.npy", &npy(100, 130));
    long.size -= 30;
    let text = damage(&path, long);
    assert!(text.contains("array \"x\": damaged"), "{text}");
    for member in [
        Member::stored("x.npy", &good),
        Member::deflated("x.npy", &good),
    ] {
        let text = damage(
            &path,
            Member {
                crc: member.crc ^ 1,
                ..member
            },
        );
        assert!(text.contains("x.npz: array \"x\": damaged: "), "{text}");
        assert!(text.to_lowercase().contains("checksum"), "{text}");
    }
}

#[test]
fn one_name_twice_and_no_archive_are_refused() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("x.npz");
    let member = || Member::stored("x.npy", &npy(1, 1));
    fs::write(&path, zip(&[member(), member()])).expect("writes there");
    assert!(refusal(&path).contains("two of its arrays have one name"));
    fs::write(&path, npy(1, 1)).expect("writes there");
    assert!(refusal(&path).contains("x.npz: not a .npz, or damaged"));
    fs::write(&path, zip(&[])).expect("writes there");
    assert!(open(&path).tensors().is_empty());
}

#[test]
fn several_tensors_are_written_under_their_names() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("x.npz");
    let bytes = TensorSpec {
        dtype: Dtype::Uint8,
        shape: vec![3],
    };
    let other = TensorSpec {
        dtype: Dtype::Int16,
        shape: vec![1, 2],
    };
    let one = NamedTensor {
        name: "one",
        spec: &bytes,
        bytes: &[1, 2, 3],
    };
    let two = NamedTensor {
        name: "folder/\u{e4}",
        spec: &other,
        bytes: &[4, 0, 5, 0],
    };
    write_tensors(&path, &[one, two]).unwrap_or_else(|error| panic!("{error}"));
    let mut file = open(&path);
    assert_eq!(read(&mut file, 0), [1, 2, 3]);
    let index = file.find("folder/\u{e4}").expect("just written");
    assert_eq!(file.tensors()[index].1, other);
    assert_eq!(read(&mut file, index), [4, 0, 5, 0]);
    let text = write_tensors(&path, &[one, one])
        .expect_err("twice")
        .to_string();
    assert!(text.contains("two tensors are called \"one\""), "{text}");
    let text = write_tensors(&path.with_extension("npy"), &[one, two]).expect_err("two");
    assert!(text.to_string().contains("write .npz"), "{text}");
    let long = "n".repeat(70_000);
    let text = write(&path, &long, &bytes, &[1, 2, 3]).expect_err("too long");
    assert!(text.to_string().contains("a name of 70000 bytes"), "{text}");
    assert_eq!(read(&mut open(&path), 0), [1, 2, 3]);
}
