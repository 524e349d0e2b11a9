//! Tensor files against what numpy, ml_dtypes and pyarrow wrote (`data/make.py`).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use strait_tensor::{Dtype, FileError, TensorFile, TensorSpec, write};

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

#[test]
fn an_npy_is_written_as_numpy_writes_it() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut compared = 0;
    for (name, tensors) in expected() {
        let is_plain = !name.starts_with("big") && !name.starts_with("version");
        let is_c_order = !name.starts_with("fortran") || name == "fortran_row.npy";
        if !name.ends_with(".npy") || !is_plain || !is_c_order {
            continue;
        }
        let [tensor] = tensors.as_slice() else {
            panic!("{name} has one tensor")
        };
        let path = directory.path().join(&name);
        write(&path, "ignored", &tensor.spec, &bytes_of(&tensor.hex))
            .unwrap_or_else(|error| panic!("{error}"));
        assert!(fs::read(&path).ok() == fs::read(data(&name)).ok(), "{name}");
        compared += 1;
    }
    assert!(compared >= 16);
    let e4m3 = TensorSpec {
        dtype: Dtype::Float8E4m3fn,
        shape: vec![24],
    };
    let path = directory.path().join("refused_e4m3fn.npy");
    let bytes = fs::read(data("refused_e4m3fn.npy")).expect("made by data/make.py");
    write(&path, "x", &e4m3, &bytes[128..]).unwrap_or_else(|error| panic!("{error}"));
    assert!(fs::read(&path).ok() == Some(bytes));
}

#[test]
fn every_dtype_comes_back_from_both_formats() {
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
            for extension in ["npy", "arrow", "feather"] {
                if extension == "npy" && dtype == Dtype::Float8E4m3fn {
                    continue; // the file does not say what it is
                }
                let path = directory.path().join("x").with_extension(extension);
                write(&path, "x", &spec, &bytes).unwrap_or_else(|error| panic!("{error}"));
                let mut file = open(&path);
                assert_eq!(file.tensors(), [("x".to_owned(), spec.clone())]);
                assert!(read(&mut file, 0) == bytes, "{spec} {extension}");
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

/// A file of `descr` with one element in `data`.
fn with_descr(path: &Path, descr: &str, data: &[u8]) {
    let mut header = format!("{{'descr': {descr:?}, 'fortran_order': False, 'shape': (1,), }}");
    header.push('\n');
    let length = u16::try_from(header.len()).expect("a short header");
    let start = [b"\x93NUMPY\x01\x00", &length.to_le_bytes()[..]].concat();
    fs::write(path, [&start, header.as_bytes(), data].concat()).expect("writes there");
}

/// Each spelling was tried with numpy 2.4 on 64-bit Linux.
#[test]
fn every_spelling_of_a_dtype_that_numpy_loads_is_read() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("x.npy");
    let spellings = [
        (Dtype::Bool8, "b1 |b1 <b1 >b1 ? =? <? bool bool_"),
        (Dtype::Int8, "i1 |i1 <i1 >i1 =i1 b int8 byte"),
        (Dtype::Int16, "i2 <i2 |i2 =i2 h <h int16 short"),
        (Dtype::Int32, "i4 <i4 |i4 =i4 i <i int32 intc"),
        (
            Dtype::Int64,
            "i8 <i8 |i8 =i8 l <l q n p int64 int int_ long longlong intp",
        ),
        (Dtype::Uint8, "u1 |u1 >u1 B uint8 ubyte"),
        (Dtype::Uint16, "u2 <u2 |u2 H uint16 ushort"),
        (Dtype::Uint32, "u4 <u4 =u4 I uint32 uintc"),
        (
            Dtype::Uint64,
            "u8 <u8 =u8 L Q N P uint64 uint ulong ulonglong uintp",
        ),
        (Dtype::Float16, "f2 <f2 |f2 e <e float16 half"),
        (Dtype::Float32, "f4 <f4 =f4 f float32 single"),
        (Dtype::Float64, "f8 <f8 |f8 =f8 d <d float64 float double"),
        (Dtype::Complex64, "c8 <c8 =c8 F complex64 csingle"),
        (
            Dtype::Complex128,
            "c16 <c16 |c16 D complex128 complex cdouble",
        ),
        (Dtype::Bfloat16, "V2 <V2 |V2 =V2"),
        (Dtype::Float8E5m2, "<f1"),
    ];
    for (dtype, spellings) in spellings {
        for descr in spellings.split(' ') {
            let data: Vec<u8> = (0..dtype.size())
                .map(|i| 0x40 - u8::try_from(i).expect("at most 16"))
                .collect();
            with_descr(&path, descr, &data);
            let mut file = open(&path);
            let spec = &file.tensors()[0].1;
            assert_eq!((spec.dtype, &*spec.shape), (dtype, &[1][..]), "{descr}");
            if dtype == Dtype::Bool8 {
                assert_eq!(read(&mut file, 0), [1], "{descr}");
            } else {
                assert_eq!(read(&mut file, 0), data, "{descr}");
            }
        }
    }
    // The other order, number by number; a byte has none.
    for (descr, is_swapped, parts) in [
        (">h", true, 1),
        (">i4", true, 1),
        (">Q", true, 1),
        (">e", true, 1),
        (">f4", true, 1),
        (">d", true, 1),
        (">F", true, 2),
        (">c16", true, 2),
        (">b", false, 1),
        (">?", false, 1),
    ] {
        let size = match descr {
            ">h" | ">e" => 2,
            ">i4" | ">f4" => 4,
            ">b" | ">?" => 1,
            ">c16" => 16,
            _ => 8,
        };
        let data: Vec<u8> = (1..=size).collect();
        with_descr(&path, descr, &data);
        let mut expected = data;
        if is_swapped {
            let part = expected.len() / parts;
            expected.chunks_mut(part).for_each(<[u8]>::reverse);
        }
        assert_eq!(read(&mut open(&path), 0), expected, "{descr}");
    }
}

#[test]
fn a_dtype_that_is_refused_is_named_for_what_it_is() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("x.npy");
    for (descrs, says) in [
        ("f16 <f16 g longdouble float128", "a long double"),
        ("c32 >c32 G clongdouble complex256", "a long complex"),
        ("O |O object object_", "Python objects"),
        ("S S10 |S3 a5 bytes bytes_ c", "of byte strings"),
        ("U <U3 str str_ unicode", "of strings"),
        ("M8 <M8[s] datetime64 datetime64[ns]", "of dates"),
        ("m8 <m8[us] timedelta64", "of time differences"),
        ("V V8 |V16 void", "of opaque bytes"),
        ("V1 |V1", "which one is not in the file"),
        ("f8,f8 1f8 (2,)i4", "structured"),
        (
            "x i3 f3 b2 q8 float_ float8 int128 >int32 <float64 |bool Float64 @f8 string d8",
            "is not known",
        ),
        ("\u{e4}", "is not known"),
    ] {
        for descr in descrs.split(' ') {
            with_descr(&path, descr, &[0; 32]);
            let text = refusal(&path);
            assert!(text.contains(says), "{descr}: {text}");
            assert!(text.contains(&format!("dtype {descr:?} is ")), "{text}");
        }
    }
    with_descr(&path, "", &[0; 32]);
    assert!(refusal(&path).contains("is not known"));
}

fn refusal(path: &Path) -> String {
    TensorFile::open(path).expect_err("a refusal").to_string()
}

#[test]
fn an_npy_that_is_refused_says_why() {
    for (name, says) in [
        ("refused_e4m3fn", "save it as .arrow"),
        ("refused_object", "Python objects"),
        ("refused_bytes", "byte strings"),
        ("refused_text", "strings"),
        ("refused_structured", "structured"),
        ("refused_date", "dates"),
        ("refused_delta", "time differences"),
        ("refused_longdouble", "long double"),
        ("refused_opaque", "opaque"),
        (
            "refused_two_arrays",
            "float32[24] has 96 bytes, the file 320 after its header",
        ),
        (
            "refused_cut_off",
            "float32[24] has 96 bytes, the file 95 after its header",
        ),
    ] {
        let text = refusal(&data(&format!("{name}.npy")));
        assert!(text.contains(says), "{text}");
        assert!(text.contains(&format!("{name}.npy: ")), "{text}");
    }
}

#[test]
fn a_damaged_npy_header_says_where() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("x.npy");
    let check = |bytes: Vec<u8>, says: &str| {
        fs::write(&path, bytes).expect("writes into the temporary directory");
        let text = refusal(&path);
        assert!(text.contains(says), "{text:?} instead of {says:?}");
    };
    let with = |text: &str| {
        let length = u16::try_from(text.len())
            .expect("a short header")
            .to_le_bytes();
        [b"\x93NUMPY\x01\x00", &length[..], text.as_bytes(), &[0; 8]].concat()
    };
    check(Vec::new(), "0 bytes in all");
    check(b"\x93NUM".to_vec(), "4 bytes in all");
    check(b"PK\x03\x04 a zip file".to_vec(), "does not begin with");
    check(
        b"\x93NUMPY\x01".to_vec(),
        "needs 8 bytes and the file has 7",
    );
    check(b"\x93NUMPY\x09\x00\x01\x00".to_vec(), "version 9.0");
    check(
        b"\x93NUMPY\x01\x00\xff\xff{".to_vec(),
        "needs 65545 bytes and the file has 11",
    );
    check(
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff{".to_vec(),
        "a header of 4294967295 bytes",
    );
    for (header, says) in [
        ("", "its end instead of '{' at its byte 0"),
        ("{", "its end instead of a string"),
        ("{}", "without all of"),
        ("{'descr': '<f8', 'shape': (1,), }", "without all of"),
        ("{'descr': '<f8' 'shape'", "'\\'' instead of '}'"),
        (
            "{'descr': '<f8', 'descr': '<f8'}",
            "\"descr\", unknown or for the second time",
        ),
        ("{'descr': '<f8', 'x': 1}", "\"x\", unknown"),
        (
            "{'descr': '<f8', 'fortran_order': Yes",
            "instead of True or False",
        ),
        (
            "{'descr': '<f8', 'fortran_order': False, 'shape': (1)}",
            "the ',' of a tuple",
        ),
        (
            "{'descr': '<f8', 'fortran_order': False, 'shape': (-1,)}",
            "instead of a size",
        ),
        (
            "{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999999999999,)}",
            "20 digits",
        ),
        (
            "{'descr': '<f8', 'fortran_order': False, 'shape': (1,)} x",
            "instead of the end",
        ),
        (
            "{'descr': '<f8', 'fortran_order': False, 'shape': (2,)}",
            "has 16 bytes, the file 8",
        ),
        (
            "{'descr': '<f8', 'fortran_order': False, 'shape': (9223372036854775807, 4)}",
            "more than 9223372036854775807 bytes",
        ),
        (
            "{'descr': '<f8', 'fortran_order': False, 'shape': (1,1,1,1,1,1,1,1,1)}",
            "9 axes",
        ),
        (
            "{'descr': '>V2', 'fortran_order': False, 'shape': (4,)}",
            "big-endian",
        ),
        (
            "{'descr': '<f3', 'fortran_order': False, 'shape': (1,)}",
            "not known",
        ),
        (
            "{'descr': '\u{e4}', 'fortran_order': False, 'shape': (1,)}",
            "not known",
        ),
    ] {
        check(with(header), says);
    }
    let odd = "{\"shape\" :(1L ,) ,\n'fortran_order':True,'descr': '|V2'}";
    fs::write(&path, &with(odd)[..10 + odd.len() + 2]).expect("writes there");
    assert_eq!(open(&path).tensors()[0].1.to_string(), "bfloat16[1]");
}

#[test]
fn a_column_that_is_no_tensor_hurts_only_when_asked_for() {
    let reasons = [
        ("null", "Null"),
        ("bits", "packed into bits; cast them to int8"),
        ("text", "Utf8"),
        ("large_text", "LargeUtf8"),
        ("bytes", "Binary"),
        ("text_view", "Utf8View"),
        ("fixed_bytes", "FixedSizeBinary"),
        ("list", "List"),
        ("large_list", "LargeList"),
        ("list_view", "ListView"),
        ("struct", "Struct"),
        ("map", "Map"),
        ("dictionary", "dictionary-encoded"),
        ("date", "cast it to the integers"),
        ("timestamp", "cast it to the integers"),
        ("duration", "cast it to the integers"),
        ("decimal", "Decimal"),
        ("dense_union", "Union"),
        ("sparse_union", "Union"),
        ("run_end", "RunEndEncoded"),
        ("text_lists", "Utf8"),
        ("permuted", "permuted"),
        ("nulls", "1 null;"),
        ("list_nulls", "1 null;"),
    ];
    for name in ["every_kind.arrow", "every_kind_stream.arrow"] {
        let file = open(&data(name));
        assert_eq!(file.unsupported().len(), reasons.len());
        for (column, reason) in reasons {
            let text = file.find(column).expect_err("no tensor").to_string();
            assert!(text.contains(reason), "{text}");
            assert!(
                text.contains(&format!("{name}: column {column:?}")),
                "{text}"
            );
        }
    }
}

#[test]
fn nulls_are_counted_once() {
    let file = open(&data("nulls.arrow"));
    let compressed = open(&data("nulls_lz4.arrow"));
    for (column, counted) in [
        ("values", "1 null;"),
        // Two values under the null row are null, too.
        ("rows", "1 null;"),
        ("rows_over_values", "1 null;"),
        ("in_rows", "2 nulls;"),
        ("rows_and_in_rows", "3 nulls;"),
        ("lists_in_lists", "4 nulls;"),
        ("many", "350 nulls;"),
    ] {
        for file in [&file, &compressed] {
            let text = file.find(column).expect_err("nulls").to_string();
            assert!(text.contains(&format!("has {counted}")), "{column}: {text}");
        }
    }
}

#[test]
fn feather_1_is_named() {
    let text = refusal(&data("version1.feather"));
    assert!(
        text.contains("version1.feather: Feather version 1"),
        "{text}"
    );
    assert!(text.contains("write it as version 2"), "{text}");
}

#[test]
fn zstd_is_refused_by_column() {
    let file = open(&data("zstd.arrow"));
    assert!(file.tensors().is_empty());
    let error = file.find("x").expect_err("ZSTD").to_string();
    assert!(
        error.contains("column \"x\" is compressed with ZSTD"),
        "{error}"
    );
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
    let text = refusal(&path("x.csv"));
    assert!(
        text.contains("known are .npy, .arrow and .feather"),
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
    ] {
        let path = directory.path().join(name);
        fs::copy(data(name), &path).expect("copies it");
        let mut file = open(&path);
        let length = file.tensors()[0].1.bytes().expect("an opened tensor");
        let shrunk = fs::OpenOptions::new().write(true).open(&path);
        shrunk.and_then(|f| f.set_len(160)).expect("cuts it off");
        let mut bytes = vec![0; usize::try_from(length).expect("a small file")];
        let text = file
            .read_into(0, &mut bytes)
            .expect_err("cut off")
            .to_string();
        assert!(
            text.contains("shorter meanwhile") && text.contains(name),
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
