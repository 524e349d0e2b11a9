//! The contract of `wit/kernel.wit` as Rust types, and their conversion to the host's own.

use strait_tensor::{Dtype, TensorSpec};

use crate::plugin::{
    BlockTree, Combine, Description, Kernel, Number, ParameterDeclaration, ParameterKind, Port,
    Role, Signature, Value,
};

mod generated {
    wasmtime::component::bindgen!({
        path: "wit",
        world: "plugin",
        imports: { default: trappable },
    });
}

pub(super) use generated::PluginPre;
pub(super) use generated::exports::strait::kernel::kernels::Guest;
pub(super) use generated::strait::kernel::log_sink;
pub(super) use generated::strait::kernel::types;

pub(super) fn dtype_of(dtype: Dtype) -> types::Dtype {
    match dtype {
        Dtype::Bool8 => types::Dtype::Bool8,
        Dtype::Int8 => types::Dtype::Int8,
        Dtype::Int16 => types::Dtype::Int16,
        Dtype::Int32 => types::Dtype::Int32,
        Dtype::Int64 => types::Dtype::Int64,
        Dtype::Uint8 => types::Dtype::Uint8,
        Dtype::Uint16 => types::Dtype::Uint16,
        Dtype::Uint32 => types::Dtype::Uint32,
        Dtype::Uint64 => types::Dtype::Uint64,
        Dtype::Float16 => types::Dtype::Float16,
        Dtype::Bfloat16 => types::Dtype::Bfloat16,
        Dtype::Float8E4m3fn => types::Dtype::Float8E4m3fn,
        Dtype::Float8E5m2 => types::Dtype::Float8E5m2,
        Dtype::Float32 => types::Dtype::Float32,
        Dtype::Float64 => types::Dtype::Float64,
        Dtype::Complex64 => types::Dtype::Complex64,
        Dtype::Complex128 => types::Dtype::Complex128,
    }
}

fn dtype(dtype: types::Dtype) -> Dtype {
    match dtype {
        types::Dtype::Bool8 => Dtype::Bool8,
        types::Dtype::Int8 => Dtype::Int8,
        types::Dtype::Int16 => Dtype::Int16,
        types::Dtype::Int32 => Dtype::Int32,
        types::Dtype::Int64 => Dtype::Int64,
        types::Dtype::Uint8 => Dtype::Uint8,
        types::Dtype::Uint16 => Dtype::Uint16,
        types::Dtype::Uint32 => Dtype::Uint32,
        types::Dtype::Uint64 => Dtype::Uint64,
        types::Dtype::Float16 => Dtype::Float16,
        types::Dtype::Bfloat16 => Dtype::Bfloat16,
        types::Dtype::Float8E4m3fn => Dtype::Float8E4m3fn,
        types::Dtype::Float8E5m2 => Dtype::Float8E5m2,
        types::Dtype::Float32 => Dtype::Float32,
        types::Dtype::Float64 => Dtype::Float64,
        types::Dtype::Complex64 => Dtype::Complex64,
        types::Dtype::Complex128 => Dtype::Complex128,
    }
}

pub(super) fn spec_of(spec: &TensorSpec, role: Role) -> types::Spec {
    types::Spec {
        dtype: dtype_of(spec.dtype),
        role: role_of(role),
        shape: spec.shape.clone(),
    }
}

pub(super) fn spec(spec: types::Spec) -> TensorSpec {
    TensorSpec {
        dtype: dtype(spec.dtype),
        shape: spec.shape,
    }
}

fn role_of(role: Role) -> types::Role {
    match role {
        Role::Data => types::Role::Data,
        Role::Mask => types::Role::Mask,
    }
}

pub(super) fn parameter_of(name: &str, value: &Value) -> types::Parameter {
    let value = match value {
        Value::Boolean(v) => types::Value::Boolean(*v),
        Value::Number(v) => types::Value::Number(number_of(*v)),
        Value::Axis(v) => types::Value::Axis(*v),
        Value::Text(v) => types::Value::Text(v.clone()),
        Value::Numbers(v) => types::Value::Numbers(v.iter().copied().map(number_of).collect()),
    };
    types::Parameter {
        name: name.to_owned(),
        value,
    }
}

fn number_of(number: Number) -> types::Number {
    match number {
        Number::Integer(v) => types::Number::Integer(v),
        Number::Unsigned(v) => types::Number::Unsigned(v),
        Number::Real(v) => types::Number::Real(v),
    }
}

fn number(number: types::Number) -> Number {
    match number {
        types::Number::Integer(v) => Number::Integer(v),
        types::Number::Unsigned(v) => v.into(),
        types::Number::Real(v) => Number::Real(v),
    }
}

fn value(value: types::Value) -> Value {
    match value {
        types::Value::Boolean(v) => Value::Boolean(v),
        types::Value::Number(v) => Value::Number(number(v)),
        types::Value::Axis(v) => Value::Axis(v),
        types::Value::Text(v) => Value::Text(v),
        types::Value::Numbers(v) => Value::Numbers(v.into_iter().map(number).collect()),
    }
}

fn kind(kind: types::ParameterKind) -> ParameterKind {
    match kind {
        types::ParameterKind::Boolean => ParameterKind::Boolean,
        types::ParameterKind::Integer => ParameterKind::Integer,
        types::ParameterKind::Real => ParameterKind::Real,
        types::ParameterKind::Number => ParameterKind::Number,
        types::ParameterKind::Axis => ParameterKind::Axis,
        types::ParameterKind::Text => ParameterKind::Text,
        types::ParameterKind::Integers => ParameterKind::Integers,
        types::ParameterKind::Reals => ParameterKind::Reals,
    }
}

fn port(port: types::Port) -> Port {
    Port {
        name: port.name,
        dtypes: port.dtypes.into_iter().map(dtype).collect(),
        rank_min: port.rank_min,
        rank_max: port.rank_max,
        role: match port.role {
            types::Role::Data => Role::Data,
            types::Role::Mask => Role::Mask,
        },
        whole: port.whole,
        doc: port.doc,
    }
}

fn combine(combine: types::Combine) -> Combine {
    match combine {
        types::Combine::None => Combine::None,
        types::Combine::Concatenate => Combine::Concatenate,
        types::Combine::Tree(tree) => Combine::Tree(BlockTree {
            block_rows: tree.block_rows,
            partials: tree.partials,
            merge: tree.merge,
        }),
    }
}

fn kernel(k: types::Kernel) -> Result<Kernel, String> {
    let signature =
        Signature::parse(&k.signature).map_err(|e| format!("kernel `{}`: {e}", k.name))?;
    Ok(Kernel {
        name: k.name,
        doc: k.doc,
        inputs: k.inputs.into_iter().map(port).collect(),
        outputs: k.outputs.into_iter().map(port).collect(),
        parameters: k
            .parameters
            .into_iter()
            .map(|p| ParameterDeclaration {
                name: p.name,
                kind: kind(p.kind),
                default: p.default.map(value),
                minimum: p.minimum.map(number),
                maximum: p.maximum.map(number),
                choices: p.choices,
                doc: p.doc,
            })
            .collect(),
        signature,
        split_axis: k.split_axis,
        combine: combine(k.combine),
        streaming: k.streaming,
        in_place: k.in_place,
    })
}

/// # Errors
/// Which kernel's signature cannot be read, and why.
pub(super) fn description(description: types::Description) -> Result<Description, String> {
    Ok(Description {
        abi: description.abi,
        name: description.name,
        version: description.version,
        kernels: description
            .kernels
            .into_iter()
            .map(kernel)
            .collect::<Result<_, _>>()?,
        panic_record: description.panic_record,
    })
}
