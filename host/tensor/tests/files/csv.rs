//! `.csv`: what counts as a number, as a header and as a table.

use std::fs;
use std::path::Path;

use strait_tensor::{Dtype, NamedTensor, TensorFile, TensorSpec, write, write_tensors};

use super::{data, open, read, refusal};

fn table(path: &Path, text: impl AsRef<[u8]>) -> TensorFile {
    fs::write(path, text).expect("writes there");
    open(path)
}

fn numbers(bytes: &[u8]) -> Vec<f64> {
    bytes
        .as_chunks()
        .0
        .iter()
        .map(|&b| f64::from_le_bytes(b))
        .collect()
}

#[test]
fn a_columns_dtype_follows_from_its_cells() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("x.csv");
    for (cells, dtype) in [
        (&["1", "-2", " 3 "][..], Dtype::Int64),
        (
            &["-9223372036854775808", "9223372036854775807", "+7"],
            Dtype::Int64,
        ),
        (&["1", "18446744073709551615", "0"], Dtype::Uint64),
        (&["1", "2.5", "3"], Dtype::Float64),
        (&["1e3", "NaN", "-inf"], Dtype::Float64),
        (&["-0", "1", "2"], Dtype::Float64),
        (&["18446744073709551616", "1", "2"], Dtype::Float64),
        (&["true", "False", "TRUE"], Dtype::Bool8),
        (&["1", "\"\"", "3"], Dtype::Float64),
    ] {
        let file = table(&path, format!("v\n{}\n", cells.join("\n")));
        let spec = TensorSpec {
            dtype,
            shape: vec![3],
        };
        assert_eq!(file.tensors(), [("v".to_owned(), spec)], "{cells:?}");
    }
    for (cells, says) in [
        (
            &["1", "abc", "x"][..],
            "column \"v\": row 3: \"abc\" is not a number",
        ),
        (
            &["1e400", "1", "1"],
            "row 2: \"1e400\" is beyond what a float64 holds",
        ),
        (&["0x10", "1", "1"], "not a number"),
        (&["1_000", "1", "1"], "not a number"),
        (&["\"1,5\"", "1", "1"], "not a number"),
        (&["true", "0", "1"], "are mixed"),
        (&["true", "\"\"", "false"], "some of its cells are empty"),
        (&["-1", "18446744073709551615", "1"], "no dtype holds both"),
    ] {
        let mut file = table(&path, format!("v\n{}\n", cells.join("\n")));
        let text = file.find("v").expect_err("refused").to_string();
        assert!(text.contains(says), "{cells:?}: {text}");
    }
    let mut file = table(&path, b"v\n1\n\xff\n");
    assert!(
        file.find("v")
            .expect_err("refused")
            .to_string()
            .contains("not UTF-8")
    );
}

#[test]
fn empty_cells_are_nan_and_numbers_exact() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("x.csv");
    let mut file = table(&path, "a,b\n0.1,1\n,9007199254740993\ninf,-1\n");
    let a = numbers(&read(&mut file, 0));
    assert!(
        a[0] == 0.1 && a[1].is_nan() && a[2] == f64::INFINITY,
        "{a:?}"
    );
    let b = read(&mut file, 1);
    assert_eq!(b[8..16], 9_007_199_254_740_993_i64.to_le_bytes());
}

#[test]
fn several_columns_are_a_matrix() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("x.csv");
    let mut file = table(&path, "a,b,c,flag,word\n1,2,0.5,true,x\n3,4,1.5,false,y\n");
    let index = file.find("b,a").expect("integers");
    assert_eq!(file.tensors()[index].1.to_string(), "int64[2, 2]");
    let bytes = read(&mut file, index);
    let values: Vec<i64> = bytes
        .as_chunks()
        .0
        .iter()
        .map(|&b| i64::from_le_bytes(b))
        .collect();
    assert_eq!(values, [2, 1, 4, 3]);
    let index = file.find("a, c").expect("numbers");
    assert_eq!(numbers(&read(&mut file, index)), [1.0, 0.5, 3.0, 1.5]);
    for (name, says) in [
        ("a,d", "no column \"d\""),
        ("a,flag", "of true and false and others of numbers"),
        ("*", "column \"word\": row 2: \"x\" is not a number"),
        ("d", "no tensor \"d\"; it has \"a\", \"b\", \"c\", \"flag\""),
    ] {
        let text = file.find(name).expect_err("refused").to_string();
        assert!(text.contains(says), "{text}");
    }
    let mut file = open(&data("savetxt.csv"));
    let index = file.find("*").expect("all are numbers");
    let expected: Vec<f64> = (0..6).map(|i| f64::from(i) / 3.0).collect();
    assert_eq!(numbers(&read(&mut file, index)), expected);
}

#[test]
fn several_tensors_are_read_at_once() {
    let mut file = open(&data("pandas.csv"));
    let alone: Vec<Vec<u8>> = (0..file.tensors().len())
        .map(|i| read(&mut file, i))
        .collect();
    let mut together: Vec<Vec<u8>> = alone.iter().map(|bytes| vec![0xa5; bytes.len()]).collect();
    let mut wanted: Vec<_> = together
        .iter_mut()
        .map(Vec::as_mut_slice)
        .enumerate()
        .collect();
    file.read_all_into(&mut wanted)
        .unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(together, alone);
}

#[test]
fn what_is_no_table_is_refused() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("x.csv");
    for (text, says) in [
        ("", "it is empty"),
        ("\n\n", "it is empty"),
        ("a,b\n1,2\n3\n", "row 3 has 1 cells and row 1 has 2"),
        (
            "a,b\r\n1,2\r\n3,4,5\r\n",
            "row 3 has 3 cells and row 1 has 2",
        ),
    ] {
        fs::write(&path, text).expect("writes there");
        let told = refusal(&path);
        assert!(told.contains(says), "{told}");
    }
    fs::write(&path, ",".repeat(70_000)).expect("writes there");
    assert!(refusal(&path).contains("70001 columns; at most 65536"));
    // One row without end.
    let long = fs::File::create(&path).expect("creates it");
    long.set_len(100 << 20).expect("a file of zeros");
    assert!(refusal(&path).contains("a row of more than 64 MiB"));
    // Duplicate names stay apart until one is asked for.
    let mut file = table(&path, "a,a\n1,2\n");
    assert!(
        file.find("a")
            .expect_err("two")
            .to_string()
            .contains("2 columns are called \"a\"")
    );
    // No rows are none, not an error.
    assert_eq!(table(&path, "a,b\n").tensors()[1].1.shape, [0]);
}

#[test]
fn a_table_that_changes_while_it_is_read_says_so() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("x.csv");
    for changed in ["a\n1\n", "a\n1\n2\n3\n", "a\n1\nx\n", "a\n1\n2.5\n"] {
        let mut file = table(&path, "a\n1\n2\n");
        fs::write(&path, changed).expect("the same file");
        let text = file
            .read_into(0, &mut [0; 16])
            .expect_err("changed")
            .to_string();
        assert!(
            text.contains("x.csv: it was changed while it was read"),
            "{text}"
        );
    }
}

#[test]
fn what_is_written_reads_back_as_the_same_numbers() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("x.csv");
    let spec = |dtype, shape: &[u64]| TensorSpec {
        dtype,
        shape: shape.to_vec(),
    };
    let reals = [1.0, 0.1, -2.5e-308, f64::MAX, f64::NAN, f64::NEG_INFINITY];
    let real_bytes: Vec<u8> = reals.iter().flat_map(|x| x.to_le_bytes()).collect();
    let (matrix, flags, large) = (
        spec(Dtype::Float64, &[2, 3]),
        spec(Dtype::Bool8, &[2]),
        spec(Dtype::Uint64, &[2]),
    );
    let tensors = [
        NamedTensor {
            name: "m",
            spec: &matrix,
            bytes: &real_bytes,
        },
        NamedTensor {
            name: "f, g",
            spec: &flags,
            bytes: &[1, 0],
        },
        NamedTensor {
            name: "u",
            spec: &large,
            bytes: &[0xff; 16],
        },
    ];
    write_tensors(&path, &tensors).unwrap_or_else(|error| panic!("{error}"));
    let text = fs::read_to_string(&path).expect("just written");
    assert_eq!(
        text,
        "m.0,m.1,m.2,\"f, g\",u\n1.0,0.1,-2.5e-308,true,18446744073709551615\n\
         1.7976931348623157e308,nan,-inf,false,18446744073709551615\n"
    );
    let mut file = open(&path);
    let index = file.find("m.0,m.1,m.2").expect("just written");
    assert_eq!(read(&mut file, index)[..24], real_bytes[..24],);
    let index = file.find("f, g").expect("just written");
    assert_eq!(read(&mut file, index), [1, 0]);
    let index = file.find("u").expect("just written");
    assert_eq!(read(&mut file, index), [0xff; 16]);
    // Narrower floats come back as the float64 of the same value.
    let half = spec(Dtype::Float16, &[2]);
    write(&path, "h", &half, &[0x66, 0x2e, 0, 0x3c]).unwrap_or_else(|error| panic!("{error}"));
    let halves = numbers(&read(&mut open(&path), 0));
    assert_eq!(
        halves,
        [0.099_975_586, 1.0]
            .map(|x: f32| f64::from(x))
            .map(|x| (x * 1e9).round() / 1e9)
    );
}

#[test]
fn what_a_table_cannot_hold_is_refused() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("x.csv");
    for (name, dtype, shape, says) in [
        (
            "z",
            Dtype::Complex64,
            &[1][..],
            "a .csv has no complex64; write .npy",
        ),
        (
            "t",
            Dtype::Uint8,
            &[2, 2, 2],
            "has 3 axes and .csv two at most; reshape it",
        ),
        (
            "w",
            Dtype::Uint8,
            &[1, 70_000],
            "70000 columns; .csv has at most 65536",
        ),
        ("e", Dtype::Uint8, &[3, 0], "no columns"),
        (
            "7",
            Dtype::Uint8,
            &[1],
            "a header of numbers such as \"7\" would read as data",
        ),
    ] {
        let spec = TensorSpec {
            dtype,
            shape: shape.to_vec(),
        };
        let bytes = vec![0; usize::try_from(spec.bytes().expect("small")).expect("small")];
        let text = write(&path, name, &spec, &bytes)
            .expect_err("refused")
            .to_string();
        assert!(text.contains(says) && text.contains("x.csv"), "{text}");
    }
    let (two, three) = (
        TensorSpec {
            dtype: Dtype::Uint8,
            shape: vec![2],
        },
        TensorSpec {
            dtype: Dtype::Uint8,
            shape: vec![3],
        },
    );
    let tensors = [
        NamedTensor {
            name: "a",
            spec: &two,
            bytes: &[1, 2],
        },
        NamedTensor {
            name: "b",
            spec: &three,
            bytes: &[1, 2, 3],
        },
    ];
    let text = write_tensors(&path, &tensors)
        .expect_err("rows")
        .to_string();
    assert!(
        text.contains("tensor \"a\" has 2 rows and \"b\" 3"),
        "{text}"
    );
    assert!(!path.exists());
}
