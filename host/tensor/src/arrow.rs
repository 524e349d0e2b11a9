//! Tensors in Arrow: the field that stands for a tensor, and the tensor that a field declares.
//!
//! Nothing else knows how dtype and shape are said there.

use std::collections::HashMap;

use arrow_ipc::{Precision, Type};
use arrow_schema::{ArrowError, DataType, Field, Schema};

use crate::{Dtype, LayoutError, RANK_MAX, TensorSpec};

/// Field metadata: a dtype that Arrow has no type for.
const DTYPE_KEY: &str = "strait.dtype";
/// Field metadata: a shape that the storage cannot tell, which is only the 0-d one.
const SHAPE_KEY: &str = "strait.shape";
/// The value of [`SHAPE_KEY`] for a 0-d tensor.
const SHAPE_0D: &str = "[]";
/// Field metadata: the name of an extension type, and its parameters.
const EXTENSION_NAME: &str = "ARROW:extension:name";
const EXTENSION_METADATA: &str = "ARROW:extension:metadata";
const FIXED_SHAPE_TENSOR: &str = "arrow.fixed_shape_tensor";
const BOOL8: &str = "arrow.bool8";

/// A tensor without its leading axis, the rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// The type of the elements.
    pub dtype: Dtype,
    /// The axes after the first.
    pub shape: Vec<u64>,
    /// One row that is the only element.
    pub is_0d: bool,
}

impl Row {
    /// A tensor's row.
    pub fn of(spec: &TensorSpec) -> Row {
        Row {
            dtype: spec.dtype,
            shape: spec.shape.get(1..).unwrap_or_default().to_vec(),
            is_0d: spec.shape.is_empty(),
        }
    }

    /// The tensor of that many rows. None if it is 0-d and they are not one.
    pub fn spec(&self, rows: u64) -> Option<TensorSpec> {
        let leading = (!self.is_0d).then_some(rows);
        (!self.is_0d || rows == 1).then(|| TensorSpec {
            dtype: self.dtype,
            shape: leading
                .into_iter()
                .chain(self.shape.iter().copied())
                .collect(),
        })
    }

    /// Bytes of one row.
    ///
    /// # Errors
    /// As [`TensorSpec::bytes`].
    pub fn bytes(&self) -> Result<u64, LayoutError> {
        let row = TensorSpec {
            dtype: self.dtype,
            shape: self.shape.clone(),
        };
        row.bytes()
    }
}

/// Tensors as an Arrow schema. Their lengths may differ.
///
/// # Errors
/// [`LayoutError::RowTooLong`] for what Arrow has no type for.
pub(crate) fn schema<'a>(
    tensors: impl IntoIterator<Item = (&'a str, &'a TensorSpec)>,
) -> Result<Schema, LayoutError> {
    let field = |(name, spec)| {
        check_row(name, spec)?;
        Ok(field(name, spec))
    };
    let fields = tensors.into_iter().map(field);
    Ok(Schema::new(fields.collect::<Result<Vec<_>, _>>()?))
}

/// Whether Arrow has a type for rows of that many values.
///
/// # Errors
/// [`LayoutError::RowTooLong`].
pub fn check_row(name: &str, spec: &TensorSpec) -> Result<(), LayoutError> {
    let elements = row_elements(spec);
    if elements > i32::MAX.cast_unsigned().into() {
        return Err(LayoutError::RowTooLong {
            name: name.to_owned(),
            spec: spec.clone(),
            elements,
        });
    }
    Ok(())
}

/// Values that one row of storage has; `u128::MAX` stands for more.
fn row_elements(spec: &TensorSpec) -> u128 {
    let inner = spec.shape.get(1..).unwrap_or_default();
    if inner.contains(&0) {
        return 0;
    }
    let pair = if spec.dtype.is_complex() { 2 } else { 1 };
    inner
        .iter()
        .fold(pair, |product: u128, &n| product.saturating_mul(n.into()))
}

/// The shape of one row in storage, if a row is more than one primitive value: the axes after the
/// first, and for complex numbers a last one of 2.
fn row_shape(spec: &TensorSpec) -> Option<Vec<u64>> {
    let mut shape = spec.shape.get(1..).unwrap_or_default().to_vec();
    if spec.dtype.is_complex() {
        shape.push(2);
    }
    (!shape.is_empty()).then_some(shape)
}

/// Primitive values in a row of that shape. A zero axis makes it 0 however large the others are.
fn row_values(shape: &[u64]) -> u64 {
    if shape.contains(&0) {
        0
    } else {
        shape.iter().product()
    }
}

/// How a tensor is written in Arrow. Its rows have at most `i32::MAX` values.
fn field(name: &str, spec: &TensorSpec) -> Field {
    let (primitive, dtype_is_storage) = storage(spec.dtype);
    let mut metadata = HashMap::new();
    let mut note = |key: &str, value: String| metadata.insert(key.to_owned(), value);
    if spec.shape.is_empty() {
        note(SHAPE_KEY, SHAPE_0D.to_owned());
    }
    let data_type = match row_shape(spec) {
        None => {
            if spec.dtype == Dtype::Bool8 {
                note(EXTENSION_NAME, BOOL8.to_owned());
                note(EXTENSION_METADATA, String::new());
            } else if !dtype_is_storage {
                note(DTYPE_KEY, spec.dtype.name().to_owned());
            }
            primitive
        }
        Some(shape) => {
            // A field has one extension type; the tensor takes it, and the dtype goes beside it.
            note(EXTENSION_NAME, FIXED_SHAPE_TENSOR.to_owned());
            note(EXTENSION_METADATA, shape_json(&shape));
            if !dtype_is_storage {
                note(DTYPE_KEY, spec.dtype.name().to_owned());
            }
            let values = i32::try_from(row_values(&shape)).expect("the layout checked the row");
            // The item's name and nullability are those that pyarrow's own tensor type has.
            DataType::new_fixed_size_list(primitive, values, true)
        }
    };
    Field::new(name, data_type, false).with_metadata(metadata)
}

/// Parameters of `arrow.fixed_shape_tensor`, by hand: pyarrow refuses the nulls that
/// arrow-schema's own type writes.
fn shape_json(shape: &[u64]) -> String {
    let sizes: Vec<String> = shape.iter().map(u64::to_string).collect();
    format!("{{\"shape\":[{}]}}", sizes.join(","))
}

/// The primitive type that holds `dtype`'s values, and whether it tells the dtype already.
fn storage(dtype: Dtype) -> (DataType, bool) {
    match dtype {
        Dtype::Bool8 => (DataType::Int8, false),
        Dtype::Int8 => (DataType::Int8, true),
        Dtype::Int16 => (DataType::Int16, true),
        Dtype::Int32 => (DataType::Int32, true),
        Dtype::Int64 => (DataType::Int64, true),
        Dtype::Uint8 => (DataType::UInt8, true),
        Dtype::Uint16 => (DataType::UInt16, true),
        Dtype::Uint32 => (DataType::UInt32, true),
        Dtype::Uint64 => (DataType::UInt64, true),
        Dtype::Float16 => (DataType::Float16, true),
        Dtype::Bfloat16 => (DataType::UInt16, false),
        Dtype::Float8E4m3fn | Dtype::Float8E5m2 => (DataType::UInt8, false),
        Dtype::Float32 => (DataType::Float32, true),
        Dtype::Float64 => (DataType::Float64, true),
        Dtype::Complex64 => (DataType::Float32, false),
        Dtype::Complex128 => (DataType::Float64, false),
    }
}

/// Values of a column of `rows` rows, and of each list below it, if they can be counted in `i64`.
pub(crate) fn values(field: &Field, rows: u64) -> Option<Vec<u64>> {
    let countable = |count: u64| i64::try_from(count).is_ok().then_some(count);
    let mut counts = vec![countable(rows)?];
    let (mut count, mut level) = (rows, field.data_type());
    while let DataType::FixedSizeList(item, size) = level {
        count = count.checked_mul(u64::try_from(*size).ok()?)?;
        counts.push(countable(count)?);
        level = item.data_type();
    }
    Some(counts)
}

/// What a field declares, and the values that one row has at each level: 1, then those of each list.
pub(crate) fn read(field: arrow_ipc::Field<'_>) -> (Result<Row, String>, Vec<u64>) {
    let mut levels = Vec::new();
    (row(field, &mut levels), levels)
}

/// The same, as far as it is lists: `levels` are noted even if it is no tensor.
fn row(field: arrow_ipc::Field<'_>, levels: &mut Vec<u64>) -> Result<Row, String> {
    if field.dictionary().is_some() {
        return Err("it is dictionary-encoded; decode it first".to_owned());
    }
    let mut shape = Vec::new();
    let mut values = 1_u64;
    let mut leaf = field;
    while let Some(list) = leaf.type_as_fixed_size_list() {
        let size = u64::try_from(list.listSize())
            .map_err(|_| format!("a list of {} values", list.listSize()))?;
        levels.push(values);
        shape.push(size);
        values = values
            .checked_mul(size)
            .filter(|&values| values <= i64::MAX.cast_unsigned())
            .ok_or_else(|| format!("rows of {shape:?} values are too many to count"))?;
        let mut children = leaf.children().into_iter().flatten();
        leaf = match (children.next(), children.next()) {
            (Some(child), None) => child,
            _ => return Err("a fixed-size list without exactly one child".to_owned()),
        };
        if leaf.dictionary().is_some() {
            return Err("its values are dictionary-encoded".to_owned());
        }
    }
    levels.push(values);

    let primitive = primitive(leaf)?;
    match metadata(field, EXTENSION_NAME) {
        Some(FIXED_SHAPE_TENSOR) => shape = tensor_shape(field, &shape)?,
        Some(BOOL8) if !shape.is_empty() => return Err("arrow.bool8 over a list".to_owned()),
        _ => {}
    }
    let dtype = logical(field, primitive, &mut shape)?;
    let is_0d = match metadata(field, SHAPE_KEY) {
        None => false,
        Some(SHAPE_0D) if shape.is_empty() => true,
        Some(other) => {
            return Err(format!(
                "{SHAPE_KEY} {other:?} does not fit rows of shape {shape:?}"
            ));
        }
    };
    if shape.len() >= RANK_MAX {
        return Err(format!(
            "it has {} axes; at most {RANK_MAX} are possible",
            shape.len() + 1
        ));
    }
    Ok(Row {
        dtype,
        shape,
        is_0d,
    })
}

fn metadata<'a>(field: arrow_ipc::Field<'a>, key: &str) -> Option<&'a str> {
    let pairs = field.custom_metadata()?;
    pairs
        .iter()
        .find(|pair| pair.key() == Some(key))
        .map(|pair| pair.value().unwrap_or_default())
}

/// The type of the bits, or why there are none that a kernel can take.
fn primitive(field: arrow_ipc::Field<'_>) -> Result<Dtype, String> {
    if let Some(int) = field.type_as_int() {
        return match (int.bitWidth(), int.is_signed()) {
            (8, true) => Ok(Dtype::Int8),
            (16, true) => Ok(Dtype::Int16),
            (32, true) => Ok(Dtype::Int32),
            (64, true) => Ok(Dtype::Int64),
            (8, false) => Ok(Dtype::Uint8),
            (16, false) => Ok(Dtype::Uint16),
            (32, false) => Ok(Dtype::Uint32),
            (64, false) => Ok(Dtype::Uint64),
            (bits, _) => Err(format!("integers of {bits} bits")),
        };
    }
    if let Some(float) = field.type_as_floating_point() {
        return match float.precision() {
            Precision::HALF => Ok(Dtype::Float16),
            Precision::SINGLE => Ok(Dtype::Float32),
            Precision::DOUBLE => Ok(Dtype::Float64),
            other => Err(format!("floats of precision {}", other.0)),
        };
    }
    let name = field.type_type().variant_name().unwrap_or("unknown");
    Err(match field.type_type() {
        Type::Bool => {
            "its booleans are packed into bits; cast them to int8 (arrow.bool8), one byte each"
                .to_owned()
        }
        Type::Utf8 | Type::LargeUtf8 | Type::Utf8View => format!(
            "it is text ({name}); a tensor has numbers of a fixed width, so leave it out or encode it"
        ),
        Type::Date | Type::Time | Type::Timestamp | Type::Duration => {
            format!("it is a time ({name}); cast it to the integers that it stores")
        }
        _ => format!("its type, {name}, has no fixed-width numbers"),
    })
}

/// The shape of a row that `arrow.fixed_shape_tensor` declares over a list of that many values.
fn tensor_shape(field: arrow_ipc::Field<'_>, lists: &[u64]) -> Result<Vec<u64>, String> {
    #[derive(serde::Deserialize)]
    struct Parameters {
        shape: Vec<u64>,
        /// arrow-rs writes `permutations`, against the specification.
        #[serde(alias = "permutations")]
        permutation: Option<Vec<u64>>,
        dim_names: Option<Vec<String>>,
    }
    let json = metadata(field, EXTENSION_METADATA).unwrap_or_default();
    let Parameters {
        shape,
        permutation,
        dim_names,
    } = serde_json::from_str(json)
        .map_err(|error| format!("{FIXED_SHAPE_TENSOR} metadata {json:.100?}: {error}"))?;
    // Kept as it is, and pyarrow could not read it back.
    if let Some(names) = dim_names.filter(|names| names.len() != shape.len()) {
        return Err(format!(
            "{FIXED_SHAPE_TENSOR} has {} dim_names for a shape of {} axes; name each or none",
            names.len(),
            shape.len()
        ));
    }
    if let Some(permutation) = permutation
        && !permutation.iter().copied().eq(0..shape.len() as u64)
    {
        return Err(format!(
            "its axes are permuted ({permutation:?}); write it in row-major order"
        ));
    }
    let values = if shape.contains(&0) {
        Some(0)
    } else {
        shape
            .iter()
            .try_fold(1_u64, |values, &n| values.checked_mul(n))
    };
    match lists {
        &[size] if values == Some(size) => Ok(shape),
        _ => Err(format!(
            "{FIXED_SHAPE_TENSOR} of shape {shape:?} over lists of {lists:?}"
        )),
    }
}

/// The dtype that a column means by its primitive values; removes the last axis of complex ones.
fn logical(
    field: arrow_ipc::Field<'_>,
    stored: Dtype,
    shape: &mut Vec<u64>,
) -> Result<Dtype, String> {
    let Some(name) = metadata(field, DTYPE_KEY) else {
        let is_bool8 = metadata(field, EXTENSION_NAME) == Some(BOOL8);
        return match stored {
            Dtype::Int8 if is_bool8 => Ok(Dtype::Bool8),
            _ if is_bool8 => Err(format!("arrow.bool8 over {stored}")),
            _ => Ok(stored),
        };
    };
    let dtype: Dtype = name
        .parse()
        .map_err(|error| format!("{DTYPE_KEY}: {error}"))?;
    let fits = match dtype {
        Dtype::Bool8 => stored == Dtype::Int8,
        Dtype::Bfloat16 => stored == Dtype::Uint16,
        Dtype::Float8E4m3fn | Dtype::Float8E5m2 => stored == Dtype::Uint8,
        Dtype::Complex64 => stored == Dtype::Float32 && shape.pop() == Some(2),
        Dtype::Complex128 => stored == Dtype::Float64 && shape.pop() == Some(2),
        _ => stored == dtype,
    };
    if fits {
        Ok(dtype)
    } else {
        Err(format!(
            "{DTYPE_KEY} is {dtype} over {stored} values in rows of {shape:?}"
        ))
    }
}

/// A schema that others wrote, as it is kept in a file of ours: as it is, where pyarrow can read it.
///
/// # Errors
/// If it is not valid Arrow.
pub fn kept_schema(schema: arrow_ipc::Schema<'_>) -> Result<Schema, ArrowError> {
    let schema = arrow_ipc::convert::try_fb_to_schema(schema)?;
    let fields: Vec<Field> = schema.fields().iter().map(|field| kept(field)).collect();
    Ok(Schema::new_with_metadata(fields, schema.metadata().clone()))
}

/// The field as it is kept. arrow-rs writes nulls into the parameters of a fixed-shape tensor,
/// which pyarrow cannot read; what is null is as good as left out.
fn kept(field: &Field) -> Field {
    let metadata = field.metadata();
    let parameters = (metadata.get(EXTENSION_NAME).map(String::as_str) == Some(FIXED_SHAPE_TENSOR))
        .then(|| metadata.get(EXTENSION_METADATA))
        .flatten()
        .and_then(|json| serde_json::from_str(json).ok());
    match parameters {
        Some(serde_json::Value::Object(mut parameters))
            if parameters.values().any(serde_json::Value::is_null) =>
        {
            parameters.retain(|_, value| !value.is_null());
            let json = serde_json::Value::Object(parameters).to_string();
            let metadata = metadata.clone().with(EXTENSION_METADATA, json);
            field.clone().with_metadata(metadata)
        }
        _ => field.clone(),
    }
}
