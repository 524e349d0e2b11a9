//! `.npy` files: every spelling of a dtype, and headers that are refused or damaged.

use std::fs;
use std::path::Path;

use strait_tensor::{Dtype, TensorSpec, write};

use super::{bytes_of, data, expected, open, read, refusal};

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
