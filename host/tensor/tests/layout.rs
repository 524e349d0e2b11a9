//! Plans: where tensors lie, and that arrow-rs reads what is written around them.

use std::io::Cursor;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_ipc::reader::{FileReader, StreamReader};
use arrow_schema::DataType;
use proptest::prelude::*;
use strait_tensor::layout::{HUGE_ALIGN_BYTES, HUGE_MIN_BYTES, PAGE_BYTES, TENSOR_ALIGN_BYTES};
use strait_tensor::{
    Column, Dtype, FileLayout, LayoutError, SchemaMessage, TensorSpec, read_layout,
};

fn spec(dtype: Dtype, shape: &[u64]) -> TensorSpec {
    TensorSpec {
        dtype,
        shape: shape.to_vec(),
    }
}

fn column(name: &str, dtype: Dtype, shape: &[u64]) -> Column {
    Column::new(name, spec(dtype, shape)).expect("a small shape")
}

fn plan(columns: &[Column]) -> FileLayout {
    FileLayout::plan(columns).expect("columns that fit")
}

/// The file as it would lie in memory, with bytes that differ from tensor to tensor.
fn file(layout: &FileLayout) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(layout.bytes).expect("a small file")];
    put(&mut bytes, 0, &layout.header);
    put(&mut bytes, layout.footer_offset, &layout.footer);
    for (index, tensor) in layout.tensors.iter().enumerate() {
        put(&mut bytes, tensor.offset, &content(index, tensor.length));
    }
    bytes
}

fn content(index: usize, length: u64) -> Vec<u8> {
    (0..length)
        .map(|i| u8::try_from((i * 7 + index as u64 * 31) % 251).expect("below 251"))
        .collect()
}

fn put(file: &mut [u8], offset: u64, bytes: &[u8]) {
    let start = usize::try_from(offset).expect("a small file");
    file[start..start + bytes.len()].copy_from_slice(bytes);
}

/// What must hold for every plan.
fn check_plan(columns: &[Column], layout: &FileLayout) {
    assert_eq!(layout.tensors.len(), columns.len());
    let mut free = layout.header.len() as u64;
    assert_eq!(free % TENSOR_ALIGN_BYTES, 0);
    for (column, tensor) in columns.iter().zip(&layout.tensors) {
        assert_eq!((&tensor.name, &tensor.spec), (&column.name, &column.spec));
        assert_eq!(Ok(tensor.length), tensor.spec.bytes());
        let align = if column.reserve_bytes >= HUGE_MIN_BYTES {
            HUGE_ALIGN_BYTES
        } else {
            TENSOR_ALIGN_BYTES
        };
        assert_eq!(tensor.offset % align, 0, "{tensor:?}");
        assert!(tensor.offset >= free, "{tensor:?} before {free}");
        free = (tensor.offset + column.reserve_bytes).next_multiple_of(TENSOR_ALIGN_BYTES);
        let end = (tensor.offset + tensor.length).next_multiple_of(TENSOR_ALIGN_BYTES);
        assert!(end <= layout.footer_offset, "{tensor:?}");
    }
    assert_eq!(layout.footer_offset % TENSOR_ALIGN_BYTES, 0);
    assert_eq!(
        layout.bytes,
        layout.footer_offset + layout.footer.len() as u64
    );
    assert_eq!(layout.capacity % PAGE_BYTES, 0);
    assert!(layout.capacity >= layout.bytes.max(free));
    assert_eq!(&layout.header[..8], b"ARROW1\0\0");
    assert_eq!(&layout.header[8..12], &[0xff; 4]);
    assert_eq!(&layout.footer[..8], &[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
    assert!(layout.footer.ends_with(b"ARROW1"));
}

/// The one batch that arrow-rs reads, fully validated, by both of its readers.
fn read_by_arrow(bytes: &[u8]) -> RecordBatch {
    let mut files = FileReader::try_new(Cursor::new(bytes), None).expect("an IPC file");
    let batch = files.next().expect("a batch").expect("a valid batch");
    assert!(files.next().is_none());
    let mut stream = StreamReader::try_new(Cursor::new(&bytes[8..]), None).expect("a stream");
    assert_eq!(
        stream.next().expect("a batch").expect("a valid batch"),
        batch
    );
    assert!(
        stream.next().is_none(),
        "the stream ends where the footer begins"
    );
    batch
}

/// The primitive values of a column as bytes, through any list around them.
fn values(array: &ArrayRef) -> &[u8] {
    assert_eq!(array.null_count(), 0);
    if let Some(lists) = array.as_fixed_size_list_opt() {
        return values(lists.values());
    }
    let data = match array.data_type() {
        DataType::Int8 => array
            .as_primitive::<arrow_array::types::Int8Type>()
            .values()
            .inner(),
        DataType::Int16 => array
            .as_primitive::<arrow_array::types::Int16Type>()
            .values()
            .inner(),
        DataType::Int32 => array
            .as_primitive::<arrow_array::types::Int32Type>()
            .values()
            .inner(),
        DataType::Int64 => array
            .as_primitive::<arrow_array::types::Int64Type>()
            .values()
            .inner(),
        DataType::UInt8 => array
            .as_primitive::<arrow_array::types::UInt8Type>()
            .values()
            .inner(),
        DataType::UInt16 => array
            .as_primitive::<arrow_array::types::UInt16Type>()
            .values()
            .inner(),
        DataType::UInt32 => array
            .as_primitive::<arrow_array::types::UInt32Type>()
            .values()
            .inner(),
        DataType::UInt64 => array
            .as_primitive::<arrow_array::types::UInt64Type>()
            .values()
            .inner(),
        DataType::Float16 => array
            .as_primitive::<arrow_array::types::Float16Type>()
            .values()
            .inner(),
        DataType::Float32 => array
            .as_primitive::<arrow_array::types::Float32Type>()
            .values()
            .inner(),
        DataType::Float64 => array
            .as_primitive::<arrow_array::types::Float64Type>()
            .values()
            .inner(),
        other => panic!("{other} is no storage of ours"),
    };
    data.as_slice()
}

fn check_round_trip(columns: &[Column]) {
    let layout = plan(columns);
    check_plan(columns, &layout);
    let bytes = file(&layout);
    assert_eq!(read_layout(&bytes).expect("our own file"), layout.tensors);
    let batch = read_by_arrow(&bytes);
    assert_eq!(batch.num_columns(), columns.len());
    for (index, (array, tensor)) in batch.columns().iter().zip(&layout.tensors).enumerate() {
        let rows = tensor.spec.shape.first().copied().unwrap_or(1);
        assert_eq!(array.len() as u64, rows, "{tensor:?}");
        assert!(values(array) == content(index, tensor.length), "{tensor:?}");
    }
}

#[test]
fn every_dtype_at_every_rank() {
    for dtype in Dtype::ALL {
        for shape in [
            &[][..],
            &[1],
            &[5],
            &[0],
            &[3, 4],
            &[3, 0],
            &[0, 3],
            &[2, 0, 3],
            &[2, 3, 4],
            &[2, 1, 2, 1, 2, 1, 2, 3],
        ] {
            check_round_trip(&[column("x", dtype, shape)]);
        }
    }
}

#[test]
fn several_columns_in_one_file() {
    check_round_trip(&[
        column("a", Dtype::Float64, &[9000]),
        column("b", Dtype::Bool8, &[9000, 2]),
        column("empty", Dtype::Int8, &[9000, 0]),
        column("c", Dtype::Complex128, &[9000]),
    ]);
    check_round_trip(&[
        column("a", Dtype::Float64, &[]),
        column("b", Dtype::Int8, &[1, 3]),
    ]);
    check_round_trip(&[
        column("a", Dtype::Float64, &[0]),
        column("b", Dtype::Int8, &[0, 3]),
    ]);
}

#[test]
fn the_body_starts_at_64_kib_unless_the_header_is_larger() {
    let layout = plan(&[column("x", Dtype::Float32, &[10])]);
    assert_eq!(layout.tensors[0].offset, 65536);
    assert_eq!(layout.footer_offset, 131_072);
    let many: Vec<Column> = (0..200)
        .map(|i| column(&format!("column {i}"), Dtype::Complex64, &[2, 3]))
        .collect();
    assert!(plan(&many).tensors[0].offset > 65536);
    check_round_trip(&many);
}

#[test]
fn the_widest_columns_fit_their_header() {
    let axis = i64::MAX.cast_unsigned();
    let shape = [1, axis, axis, axis, axis, axis, axis, 0];
    for dtype in [Dtype::Complex128, Dtype::Float8E4m3fn, Dtype::Bool8] {
        for count in [1, 2, 95, 1000] {
            let columns: Vec<Column> = (0..count)
                .map(|i| column(&i.to_string(), dtype, &shape))
                .collect();
            let layout = plan(&columns);
            check_plan(&columns, &layout);
            assert_eq!(layout.tensors[0].offset == 65536, count <= 95, "{count}");
        }
    }
}

#[test]
fn a_tensor_of_4_mib_starts_on_a_huge_page() {
    let below = plan(&[column("x", Dtype::Int8, &[HUGE_MIN_BYTES - 1])]);
    assert_eq!(below.tensors[0].offset, TENSOR_ALIGN_BYTES);
    let at = plan(&[column("x", Dtype::Int8, &[HUGE_MIN_BYTES])]);
    assert_eq!(at.tensors[0].offset, HUGE_ALIGN_BYTES);
    check_round_trip(&[column("x", Dtype::Int8, &[HUGE_MIN_BYTES])]);
}

#[test]
fn sizes_beyond_32_bits() {
    let columns = [
        column("a", Dtype::Float64, &[3 << 30]),
        column("b", Dtype::Float32, &[3 << 30, 2]),
        column("c", Dtype::Uint8, &[3 << 30]),
    ];
    let layout = plan(&columns);
    check_plan(&columns, &layout);
    let offsets: Vec<u64> = layout.tensors.iter().map(|tensor| tensor.offset).collect();
    let huge = HUGE_ALIGN_BYTES;
    assert_eq!(offsets, [huge, huge + (24 << 30), huge + (48 << 30)]);
    assert_eq!(layout.footer_offset, huge + (51 << 30));

    // The footer is right too: read as a file whose body is left out.
    let single = plan(&[column("x", Dtype::Float64, &[1 << 30])]);
    assert_eq!(single.tensors[0].length, 8 << 30);
    let footer_bytes = &single.footer[8..single.footer.len() - 10];
    let footer = arrow_ipc::root_as_footer(footer_bytes).expect("a footer");
    let block = footer.recordBatches().expect("batches").get(0);
    assert_eq!(
        block.bodyLength(),
        i64::try_from(single.footer_offset).expect("fits") - 65536
    );
    assert_eq!(block.offset() + i64::from(block.metaDataLength()), 65536);
}

#[test]
fn a_smaller_result_stays_in_place() {
    let reserve = |shapes: [&[u64]; 2]| {
        let names = ["a", "b"];
        let columns: Vec<Column> = names
            .iter()
            .zip(shapes)
            .map(|(name, shape)| Column {
                reserve_bytes: 6 << 20,
                ..column(name, Dtype::Float64, shape)
            })
            .collect();
        let layout = plan(&columns);
        check_plan(&columns, &layout);
        layout
    };
    let bound = reserve([&[300_000], &[300_000, 2]]);
    for shapes in [
        [&[100_000][..], &[100_000, 2][..]],
        [&[1], &[1, 2]],
        [&[0], &[0, 2]],
    ] {
        let smaller = reserve(shapes);
        assert_eq!(smaller.capacity, bound.capacity);
        assert!(smaller.bytes < bound.bytes);
        for (tensor, before) in smaller.tensors.iter().zip(&bound.tensors) {
            assert_eq!(tensor.offset, before.offset);
        }
        let bytes = file(&smaller);
        assert_eq!(read_layout(&bytes).expect("our own file"), smaller.tensors);
        read_by_arrow(&bytes);
    }
}

#[test]
fn what_cannot_be_planned_says_why() {
    let error = |columns: &[Column]| FileLayout::plan(columns).expect_err("no plan").to_string();
    assert_eq!(FileLayout::plan(&[]), Err(LayoutError::NoTensors));
    let text = error(&[
        column("a", Dtype::Int8, &[3, 2]),
        column("b", Dtype::Int8, &[4]),
    ]);
    assert!(
        text.starts_with(r#""a" has 3 rows and "b" has 4; "#),
        "{text}"
    );
    let text = error(&[
        column("a", Dtype::Int8, &[3]),
        column("b", Dtype::Int8, &[]),
    ]);
    assert!(
        text.starts_with(r#""a" has 3 rows and "b" has 1; "#),
        "{text}"
    );
    let text = error(&[
        column("a", Dtype::Int8, &[3]),
        column("a", Dtype::Int8, &[3]),
    ]);
    assert!(text.contains(r#"two tensors are called "a""#), "{text}");
    let text = error(&[column("row", Dtype::Int8, &[1, 1 << 31])]);
    assert!(
        text.contains("2147483648 values") && text.contains("reshape"),
        "{text}"
    );
    let text = error(&[column("row", Dtype::Complex64, &[1, 1 << 30])]);
    assert!(text.contains("2147483648 values"), "{text}");
    let text = error(&[Column {
        name: "x".to_owned(),
        spec: spec(Dtype::Float64, &[10]),
        reserve_bytes: 79,
    }]);
    assert_eq!(text, r#""x" reserves 79 bytes but float64[10] needs 80"#);
    let text = error(&[Column {
        reserve_bytes: u64::MAX,
        ..column("x", Dtype::Float64, &[10])
    }]);
    assert!(
        text.contains("more than 9223372036854775807 bytes"),
        "{text}"
    );
    let name = "n".repeat(70 << 20);
    assert!(error(&[column(&name, Dtype::Int8, &[1])]).contains("of header"));
}

#[test]
fn columns_that_arrow_rs_made_are_found() {
    let x: ArrayRef = Arc::new(arrow_array::Float64Array::from(vec![1.0, 2.0, 3.0]));
    let names: ArrayRef = Arc::new(arrow_array::StringArray::from(vec!["a", "b", "c"]));
    let holes: ArrayRef = Arc::new(arrow_array::Int32Array::from(vec![Some(1), None, None]));
    let write = |columns: Vec<(&str, &ArrayRef)>, batches: usize| {
        let columns = columns
            .into_iter()
            .map(|(name, array)| (name, Arc::clone(array)));
        let batch = RecordBatch::try_from_iter(columns).expect("columns of one length");
        let mut bytes = Vec::new();
        let mut writer = arrow_ipc::writer::FileWriter::try_new(&mut bytes, &batch.schema())
            .expect("a writer into memory");
        for _ in 0..batches {
            writer.write(&batch).expect("writes into memory");
        }
        writer.finish().expect("writes into memory");
        drop(writer);
        bytes
    };
    let bytes = write(vec![("x", &x)], 1);
    let places = read_layout(&bytes).expect("one column of numbers");
    assert_eq!(places[0].spec, spec(Dtype::Float64, &[3]));
    let start = usize::try_from(places[0].offset).expect("a small file");
    assert_eq!(&bytes[start + 8..start + 16], 2.0_f64.to_le_bytes());

    let text = |bytes: &[u8]| read_layout(bytes).expect_err("no tensors").to_string();
    let two = text(&write(vec![("x", &x)], 2));
    assert!(two.starts_with("2 record batches"), "{two}");
    let holes = text(&write(vec![("x", &x), ("holes", &holes)], 1));
    assert!(
        holes.starts_with(r#"column "holes" has 2 nulls"#),
        "{holes}"
    );
    let names = text(&write(vec![("names", &names), ("x", &x)], 1));
    assert!(
        names.contains(r#"column "names" cannot be a tensor"#),
        "{names}"
    );
}

#[test]
fn a_schema_of_the_callers_is_kept() {
    use arrow_schema::{Field, Schema};
    let note =
        |value: &str| std::collections::HashMap::from([("note".to_owned(), value.to_owned())]);
    let inner = Arc::new(Field::new("v", DataType::Float32, false).with_metadata(note("inner")));
    let lists = DataType::FixedSizeList(
        Arc::new(Field::new("row", DataType::FixedSizeList(inner, 3), true)),
        2,
    );
    let fields = vec![
        Field::new("t", lists, true).with_metadata(note("outer")),
        Field::new("x", DataType::Float64, true),
    ];
    // So much that the body starts later than usual.
    let schema = Schema::new_with_metadata(fields, note(&"n".repeat(70 << 10)));
    let columns = [
        column("t", Dtype::Float32, &[5, 2, 3]),
        column("x", Dtype::Float64, &[5]),
    ];
    let layout = FileLayout::plan_as(&columns, &schema).expect("a schema of these columns");
    check_plan(&columns, &layout);
    assert!(layout.tensors[0].offset > TENSOR_ALIGN_BYTES);
    let bytes = file(&layout);
    assert_eq!(read_layout(&bytes).expect("our own file"), layout.tensors);
    assert_eq!(*read_by_arrow(&bytes).schema(), schema);

    let message = SchemaMessage::in_header(&layout.header, &layout.tensors).expect("its schema");
    assert_eq!(message.levels, [vec![1, 2, 6], vec![1]]);
    let read = arrow_ipc::convert::try_schema_from_ipc_buffer(&message.bytes).expect("a schema");
    assert_eq!(read, schema);
    // Of other tensors, cut off, or of other bytes: not this file's.
    assert_eq!(
        SchemaMessage::in_header(&layout.header, &layout.tensors[..1]),
        None
    );
    let mut other = layout.tensors.clone();
    other[1].spec.dtype = Dtype::Int64;
    assert_eq!(SchemaMessage::in_header(&layout.header, &other), None);
    for end in [0, 7, 8, 15, 16, 70 << 10] {
        assert_eq!(
            SchemaMessage::in_header(&layout.header[..end], &layout.tensors),
            None
        );
    }
    assert_eq!(
        SchemaMessage::in_header(&[0xff; 4096], &layout.tensors),
        None
    );

    // Lists of empty lists have values without bytes.
    let empty = Arc::new(Field::new("v", DataType::Int8, true));
    let empty = DataType::FixedSizeList(empty, 0);
    let lists = DataType::FixedSizeList(Arc::new(Field::new("l", empty, true)), i32::MAX);
    let schema = Schema::new(vec![Field::new("t", lists, true)]);
    let columns = [column(
        "t",
        Dtype::Int8,
        &[1 << 40, i32::MAX.cast_unsigned().into(), 0],
    )];
    let refused = FileLayout::plan_as(&columns, &schema);
    assert!(
        matches!(refused, Err(LayoutError::Overflow { .. })),
        "{refused:?}"
    );
}

fn any_dtype() -> impl Strategy<Value = Dtype> {
    proptest::sample::select(Dtype::ALL.to_vec())
}

fn any_columns() -> impl Strategy<Value = Vec<Column>> {
    let any_column = (
        any_dtype(),
        prop::collection::vec(0_u64..5, 0..7),
        any::<bool>(),
        0_u64..6 << 20,
    );
    (0_u64..700, prop::collection::vec(any_column, 1..6)).prop_map(|(rows, columns)| {
        columns
            .into_iter()
            .enumerate()
            .map(|(index, (dtype, mut shape, is_0d, spare_bytes))| {
                if !is_0d || rows != 1 {
                    shape.insert(0, rows);
                } else {
                    shape.clear();
                }
                let mut column = column(&format!("c{index}"), dtype, &shape);
                column.reserve_bytes += spare_bytes;
                column
            })
            .collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_plan_holds_and_reads_back(columns in any_columns()) {
        check_round_trip(&columns);
    }

    #[test]
    fn any_shape_is_planned_or_refused(
        dtype in any_dtype(),
        shape in prop::collection::vec(prop_oneof![0_u64..9, any::<u64>()], 0..10),
        reserve_bytes in any::<u64>(),
    ) {
        let spec = TensorSpec { dtype, shape };
        let columns = [Column { name: "x".to_owned(), spec, reserve_bytes }];
        if let Ok(layout) = FileLayout::plan(&columns) {
            check_plan(&columns, &layout);
        }
    }
}
