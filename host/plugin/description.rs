//! Whether a plugin's description makes sense in itself, when it is loaded.

use std::cmp::Ordering;
use std::collections::BTreeSet;

use super::check::list;
use super::{
    BlockTree, Combine, Description, Kernel, Number, ParameterDeclaration, ParameterKind, Port,
    Role, Value,
};

/// Most ports, parameters or kernels that one declaration may list.
pub const ITEMS_MAX: usize = 256;
/// Most outputs: each one's descriptor goes beside the reply.
pub const OUTPUTS_MAX: usize = 16;

/// Whether a description makes sense in itself.
pub(super) fn check(description: &Description) -> Result<(), String> {
    if description.abi != 1 {
        return Err(format!(
            "contract revision {}, this host speaks 1",
            description.abi
        ));
    }
    word("plugin name", &description.name)?;
    word("plugin version", &description.version)?;
    count("kernels", description.kernels.len(), ITEMS_MAX)?;
    if description.kernels.is_empty() {
        return Err("it has no kernels".to_owned());
    }
    unique(
        "kernel",
        description.kernels.iter().map(|k| k.name.as_str()),
    )?;
    for kernel in &description.kernels {
        kernel_makes_sense(kernel)
            .and_then(|()| slices_make_sense(kernel, &description.kernels))
            .map_err(|e| format!("kernel `{}`: {e}", kernel.name))?;
    }
    Ok(())
}

/// Whether what a kernel says about slices is a way to put them together.
fn slices_make_sense(kernel: &Kernel, kernels: &[Kernel]) -> Result<(), String> {
    let Some(axis) = kernel.split_axis else {
        return match kernel.combine {
            Combine::None => Ok(()),
            _ => Err(format!(
                "its slices are combined by `{}` and it has no split axis",
                kernel.combine.name()
            )),
        };
    };
    if axis >= 8 {
        return Err(format!(
            "its split axis is {axis}, a tensor has at most 8 axes"
        ));
    }
    match &kernel.combine {
        Combine::None => Err(format!(
            "it splits along axis {axis} and does not say how slices are combined"
        )),
        Combine::Concatenate => Ok(()),
        Combine::Tree(_) if axis != 0 => Err(format!(
            "its block tree counts rows of axis 0 and it splits along axis {axis}"
        )),
        Combine::Tree(tree) => tree_makes_sense(kernel, tree, kernels),
    }
}

fn tree_makes_sense(kernel: &Kernel, tree: &BlockTree, kernels: &[Kernel]) -> Result<(), String> {
    if tree.block_rows == 0 {
        return Err("the blocks of its tree have no rows".to_owned());
    }
    let named = |role: &str, name: &str| {
        kernels
            .iter()
            .find(|k| k.name == name && k.name != kernel.name)
            .ok_or_else(|| {
                format!(
                    "its tree's `{role}` is {name:?}, which is not another kernel of the plugin"
                )
            })
    };
    let (partials, merge) = (
        named("partials", &tree.partials)?,
        named("merge", &tree.merge)?,
    );
    if (partials.split_axis, &partials.combine) != (Some(0), &Combine::Concatenate) {
        return Err(format!(
            "its tree's `partials`, `{}`, must split along axis 0 and concatenate",
            partials.name
        ));
    }
    for (what, these, those) in [
        (
            "inputs of `partials` and its own",
            &partials.inputs,
            &kernel.inputs,
        ),
        (
            "outputs of `partials` and inputs of `merge`",
            &partials.outputs,
            &merge.inputs,
        ),
        (
            "outputs of `merge` and its own",
            &merge.outputs,
            &kernel.outputs,
        ),
    ] {
        if !these
            .iter()
            .map(|p| &p.name)
            .eq(those.iter().map(|p| &p.name))
        {
            let names = |ports: &[Port]| list(ports.iter().map(|p| p.name.as_str()));
            return Err(format!(
                "in its tree the {what} must be the same ports: {} and {}",
                names(these),
                names(those)
            ));
        }
    }
    Ok(())
}

fn kernel_makes_sense(kernel: &Kernel) -> Result<(), String> {
    count("inputs", kernel.inputs.len(), ITEMS_MAX)?;
    count("outputs", kernel.outputs.len(), OUTPUTS_MAX)?;
    count("parameters", kernel.parameters.len(), ITEMS_MAX)?;
    unique("input", kernel.inputs.iter().map(|p| p.name.as_str()))?;
    unique("output", kernel.outputs.iter().map(|p| p.name.as_str()))?;
    unique(
        "parameter",
        kernel.parameters.iter().map(|p| p.name.as_str()),
    )?;
    if kernel.outputs.is_empty() {
        return Err("it has no outputs".to_owned());
    }
    for port in kernel.inputs.iter().chain(&kernel.outputs) {
        if port.dtypes.is_empty() {
            return Err(format!("port `{}` takes no dtype", port.name));
        }
        if port.rank_min > port.rank_max {
            return Err(format!(
                "port `{}` takes ranks {} to {}",
                port.name, port.rank_min, port.rank_max
            ));
        }
        if port.role == Role::Mask && port.dtypes != [strait_tensor::Dtype::Bool8] {
            return Err(format!(
                "mask port `{}` must take bool8 and nothing else",
                port.name
            ));
        }
    }
    if let Some(port) = kernel.outputs.iter().find(|p| p.whole) {
        return Err(format!(
            "output `{}` is whole, which only an input can be",
            port.name
        ));
    }
    signature_makes_sense(kernel)?;
    for parameter in &kernel.parameters {
        parameter
            .makes_sense()
            .map_err(|e| format!("parameter `{}`: {e}", parameter.name))?;
    }
    Ok(())
}

/// Whether the signature is one of these ports.
fn signature_makes_sense(kernel: &Kernel) -> Result<(), String> {
    let Some(signature) = &kernel.signature else {
        return Ok(());
    };
    let (inputs, outputs) = signature.named();
    for (side, ports, named) in [
        ("inputs", &kernel.inputs, inputs),
        ("outputs", &kernel.outputs, outputs),
    ] {
        if ports.len() != named.len() {
            return Err(format!(
                "its signature {signature} has {} {side}, it has {}",
                named.len(),
                ports.len()
            ));
        }
        for (port, named) in ports.iter().zip(named) {
            let (least, most) = (port.rank_min as usize, port.rank_max as usize);
            if least < named || (port.whole && most > named) {
                return Err(format!(
                    "its signature {signature} names {named} axes of port `{}`, which takes ranks {least} to {most}{}",
                    port.name,
                    if port.whole { " and is whole" } else { "" }
                ));
            }
        }
    }
    Ok(())
}

fn count(what: &str, n: usize, max: usize) -> Result<(), String> {
    if n > max {
        Err(format!("{n} {what}, at most {max} are allowed"))
    } else {
        Ok(())
    }
}

fn word(what: &str, text: &str) -> Result<(), String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-+".contains(c);
    if text.is_empty() || text.len() > 64 || !text.chars().all(allowed) {
        return Err(format!(
            "{what} {text:?}: 1 to 64 characters from A-Z a-z 0-9 . _ - +"
        ));
    }
    Ok(())
}

fn unique<'a>(what: &str, names: impl Iterator<Item = &'a str>) -> Result<(), String> {
    let mut seen = BTreeSet::new();
    for name in names {
        word(&format!("{what} name"), name)?;
        if !seen.insert(name) {
            return Err(format!("two of {what} `{name}`"));
        }
    }
    Ok(())
}

impl ParameterDeclaration {
    /// Whether bounds and default fit the kind and each other.
    fn makes_sense(&self) -> Result<(), String> {
        for (what, bound) in [("minimum", self.minimum), ("maximum", self.maximum)] {
            if let Some(bound) = bound.filter(|v| !v.to_f64().is_finite()) {
                return Err(format!(
                    "its {what} is {bound}; leave it out if there is none"
                ));
            }
        }
        if let (Some(minimum), Some(maximum)) = (self.minimum, self.maximum)
            && minimum.compare(maximum) == Some(Ordering::Greater)
        {
            return Err(format!(
                "its minimum {minimum} is above its maximum {maximum}"
            ));
        }
        let Some(default) = &self.default else {
            return Ok(());
        };
        if !self.kind.takes(default) {
            return Err(format!(
                "it is of type {} and its default is {}",
                self.kind.name(),
                default.to_json()
            ));
        }
        self.in_range(default, None)
            .map_err(|e| format!("its default: {e}"))
    }
}

impl ParameterKind {
    /// Whether it is the type of a value in the form that a kernel gets.
    fn takes(self, value: &Value) -> bool {
        match value {
            Value::Boolean(_) => self == Self::Boolean,
            Value::Number(Number::Real(_)) => matches!(self, Self::Real | Self::Number),
            Value::Number(_) => matches!(self, Self::Integer | Self::Number),
            Value::Axis(_) => self == Self::Axis,
            Value::Text(_) => self == Self::Text,
            Value::Numbers(v) => match self {
                Self::Integers => v.iter().all(|v| !matches!(v, Number::Real(_))),
                Self::Reals => v.iter().all(|v| matches!(v, Number::Real(_))),
                _ => false,
            },
        }
    }
}

/// A parameter of that kind, for tests.
#[cfg(test)]
pub(super) fn declaration(kind: ParameterKind) -> ParameterDeclaration {
    ParameterDeclaration {
        name: "p".to_owned(),
        kind,
        default: None,
        minimum: None,
        maximum: None,
        choices: Vec::new(),
        doc: String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugin::Signature;

    fn port(name: &str) -> Port {
        Port {
            name: name.to_owned(),
            dtypes: vec![strait_tensor::Dtype::Float64],
            rank_min: 1,
            rank_max: 2,
            role: Role::Data,
            whole: false,
            doc: String::new(),
        }
    }

    fn kernel(name: &str, inputs: &[&str], outputs: &[&str]) -> Kernel {
        Kernel {
            name: name.to_owned(),
            doc: String::new(),
            inputs: inputs.iter().map(|name| port(name)).collect(),
            outputs: outputs.iter().map(|name| port(name)).collect(),
            parameters: Vec::new(),
            signature: None,
            split_axis: None,
            combine: Combine::None,
            streaming: false,
            in_place: false,
        }
    }

    /// What is wrong with a plugin of a reduction and its two kernels, changed like this.
    fn refused(change: impl FnOnce(&mut [Kernel])) -> String {
        let mut kernels = vec![
            kernel("mean", &["x"], &["y"]),
            kernel("mean-partials", &["x"], &["sums", "counts"]),
            kernel("mean-merge", &["sums", "counts"], &["y"]),
        ];
        kernels[0].split_axis = Some(0);
        kernels[0].combine = Combine::Tree(BlockTree {
            block_rows: 4096,
            partials: "mean-partials".to_owned(),
            merge: "mean-merge".to_owned(),
        });
        kernels[1].split_axis = Some(0);
        kernels[1].combine = Combine::Concatenate;
        change(&mut kernels);
        let plugin = Description {
            abi: 1,
            name: "statistics".to_owned(),
            version: "1".to_owned(),
            kernels,
            panic_record: 0,
        };
        check(&plugin).err().unwrap_or_default()
    }

    #[test]
    fn a_block_tree_is_two_kernels_that_fit() {
        assert_eq!(refused(|_| {}), "");
        let tree = |change: &dyn Fn(&mut BlockTree)| {
            refused(|kernels| {
                if let Combine::Tree(tree) = &mut kernels[0].combine {
                    change(tree);
                }
            })
        };
        assert!(tree(&|tree| tree.block_rows = 0).contains("no rows"));
        let text = tree(&|tree| tree.partials = "nowhere".to_owned());
        assert!(text.contains("`partials` is \"nowhere\""), "{text}");
        let text = tree(&|tree| tree.merge = "mean".to_owned());
        assert!(text.contains("`merge` is \"mean\""), "{text}");
        for (change, word) in [
            (
                (|k| k[0].split_axis = None) as fn(&mut [Kernel]),
                "no split axis",
            ),
            (|k| k[0].split_axis = Some(1), "along axis 1"),
            (|k| k[0].split_axis = Some(8), "at most 8 axes"),
            (|k| k[0].combine = Combine::None, "how slices are combined"),
            (
                |k| (k[1].split_axis, k[1].combine) = (None, Combine::None),
                "must split along axis 0",
            ),
            (|k| k[1].inputs[0] = port("z"), "`z` and `x`"),
            (|k| drop(k[2].inputs.pop()), "`sums`, `counts` and `sums`"),
            (|k| k[2].outputs[0] = port("z"), "`z` and `y`"),
        ] {
            let text = refused(change);
            assert!(text.contains(word), "{word}: {text}");
        }
    }

    #[test]
    fn a_signature_is_one_of_the_ports() {
        let signed = |text: &str, whole: bool| {
            refused(|kernels| {
                kernels[0].inputs[0].whole = whole;
                kernels[0].signature = Signature::parse(text).expect("well-formed");
            })
        };
        assert_eq!(signed("(n)->(m)", false), "");
        assert_eq!(signed("()->()", false), "");
        let text = signed("(n),(n)->(n)", false);
        assert!(text.contains("has 2 inputs, it has 1"), "{text}");
        let text = signed("(n)->", false);
        assert!(text.contains("has 0 outputs, it has 1"), "{text}");
        let text = signed("(m,n)->(m)", false);
        assert!(
            text.contains("names 2 axes of port `x`, which takes ranks 1 to 2"),
            "{text}"
        );
        let text = signed("(n)->(n)", true);
        assert!(text.contains("and is whole"), "{text}");
        let text = refused(|kernels| kernels[0].outputs[0].whole = true);
        assert!(text.contains("output `y` is whole"), "{text}");
    }

    #[test]
    fn a_declaration_that_contradicts_itself_is_refused() {
        let refused = |change: &dyn Fn(&mut ParameterDeclaration), kind| {
            let mut changed = declaration(kind);
            change(&mut changed);
            changed.makes_sense().expect_err("refused")
        };
        let text = refused(
            &|p| p.minimum = Some(Number::Real(f64::NAN)),
            ParameterKind::Real,
        );
        assert!(text.contains("minimum is NaN"), "{text}");
        let text = refused(
            &|p| {
                p.minimum = Some(Number::Unsigned(u64::MAX));
                p.maximum = Some(Number::Integer(1));
            },
            ParameterKind::Integer,
        );
        assert!(text.contains("18446744073709551615 is above"), "{text}");
        let text = refused(
            &|p| p.default = Some(Value::Number(Number::Integer(1))),
            ParameterKind::Real,
        );
        assert!(text.contains("type real and its default is 1"), "{text}");
        let text = refused(
            &|p| {
                p.maximum = Some(Number::Integer(1 << 53));
                p.default = Some(Value::Number(Number::Integer((1 << 53) + 1)));
            },
            ParameterKind::Integer,
        );
        assert!(text.contains("its default: 9007199254740993"), "{text}");
        assert_eq!(
            ParameterDeclaration {
                default: Some(Value::Number(Number::Unsigned(u64::MAX))),
                ..declaration(ParameterKind::Number)
            }
            .makes_sense(),
            Ok(())
        );
    }
}
