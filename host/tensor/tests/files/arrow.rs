//! Arrow files: what of them is a tensor and what is not.

use super::{data, open, refusal};

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
        let mut file = open(&data(name));
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
    let mut file = open(&data("nulls.arrow"));
    let mut compressed = open(&data("nulls_lz4.arrow"));
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
        for file in [&mut file, &mut compressed] {
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
    let mut file = open(&data("zstd.arrow"));
    assert!(file.tensors().is_empty());
    let error = file.find("x").expect_err("ZSTD").to_string();
    assert!(
        error.contains("column \"x\" is compressed with ZSTD"),
        "{error}"
    );
}
