//! Which axes of a kernel's tensors are equal: gufunc signatures, such as `(n),(k)->(m)`.

use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fmt;

/// Longest signature, in bytes; numpy's longest has a few dozen.
const TEXT_BYTES_MAX: usize = 1024;
/// Most axes that one port names: a tensor has no more.
const AXES_MAX: usize = 8;

/// One axis in a port's parentheses.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Axis {
    /// Equal wherever the name stands.
    Name(String),
    /// Of this size.
    Size(u64),
}

/// A kernel's rule about axes, for its inputs and then its outputs. What is named are the last axes of a
/// tensor; those before them are the same for every port that is not whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Signature {
    text: String,
    inputs: Vec<Vec<Axis>>,
    outputs: Vec<Vec<Axis>>,
}

/// A tensor that is held against a signature.
pub(super) struct Shaped<'a> {
    /// In messages, as in "input `x`".
    pub(super) port: String,
    /// Has only the axes that are named.
    pub(super) whole: bool,
    /// Its dimensions.
    pub(super) shape: &'a [u64],
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl From<Signature> for String {
    fn from(signature: Signature) -> Self {
        signature.text
    }
}

impl TryFrom<String> for Signature {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text)?.ok_or_else(|| "its signature is empty".to_owned())
    }
}

impl Signature {
    /// The rule that `text` says; none if it is empty.
    ///
    /// # Errors
    /// What cannot be read in it.
    pub fn parse(text: &str) -> Result<Option<Self>, String> {
        if text.is_empty() {
            return Ok(None);
        }
        if text.len() > TEXT_BYTES_MAX {
            return Err(format!(
                "its signature has {} bytes, at most {TEXT_BYTES_MAX} are allowed",
                text.len()
            ));
        }
        let wrong = |what: String| {
            format!("its signature {text:?}: {what}; write one such as (n),(k)->(m)")
        };
        let Some((inputs, outputs)) = text.split_once("->") else {
            return Err(wrong("there is no ->".to_owned()));
        };
        Ok(Some(Self {
            text: text.to_owned(),
            inputs: groups(inputs).map_err(wrong)?,
            outputs: groups(outputs).map_err(wrong)?,
        }))
    }

    /// How many axes each input and each output names.
    pub(super) fn named(&self) -> (Vec<usize>, Vec<usize>) {
        let count = |ports: &[Vec<Axis>]| ports.iter().map(Vec::len).collect();
        (count(&self.inputs), count(&self.outputs))
    }

    /// Holds inputs, and outputs after them if they are known, against the rule. Each has as many axes as
    /// it names, or more.
    ///
    /// # Errors
    /// The index of the first tensor that does not fit, and why.
    pub(super) fn check(&self, tensors: &[Shaped<'_>]) -> Result<(), (usize, String)> {
        let mut sizes: HashMap<&str, (usize, usize, u64)> = HashMap::new();
        let mut leading: Option<(usize, &[u64])> = None;
        let ports = self.inputs.iter().chain(&self.outputs);
        for (index, (tensor, axes)) in tensors.iter().zip(ports).enumerate() {
            let (before, named) = tensor
                .shape
                .split_at(tensor.shape.len().saturating_sub(axes.len()));
            if !tensor.whole {
                let (first, expected) = *leading.get_or_insert((index, before));
                if before != expected {
                    return Err((index, self.leading(before, expected, &tensors[first].port)));
                }
            }
            for (offset, (axis, &size)) in axes.iter().zip(named).enumerate() {
                let number = before.len() + offset;
                match axis {
                    Axis::Size(expected) if size != *expected => {
                        return Err((
                            index,
                            format!(
                                "axis {number} has size {size}, the signature {self} asks for {expected}"
                            ),
                        ));
                    }
                    Axis::Size(_) => {}
                    Axis::Name(name) => {
                        let &mut (other, other_number, expected) =
                            sizes.entry(name).or_insert((index, number, size));
                        if size != expected {
                            let other = &tensors[other].port;
                            return Err((
                                index,
                                format!(
                                    "axis {number} has size {size} and axis {other_number} of {other} has size {expected}; \
                                     both are `{name}` in the signature {self} and must be equal"
                                ),
                            ));
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// The axes before those that are named differ.
    fn leading(&self, before: &[u64], expected: &[u64], other: &str) -> String {
        let differing = before.iter().zip(expected).position(|(a, b)| a != b);
        match differing {
            Some(axis) => format!(
                "axis {axis} has size {} and axis {axis} of {other} has size {}; by the signature {self} they must be equal",
                before[axis], expected[axis]
            ),
            None => format!(
                "it has {} axes before those that the signature {self} names, {other} has {}; they must be equal",
                before.len(),
                expected.len()
            ),
        }
    }
}

/// The parentheses of one side.
fn groups(side: &str) -> Result<Vec<Vec<Axis>>, String> {
    if side.is_empty() {
        return Ok(Vec::new());
    }
    side.strip_prefix('(')
        .and_then(|side| side.strip_suffix(')'))
        .ok_or_else(|| format!("{side:?} is not a list of parentheses"))?
        .split("),(")
        .map(group)
        .collect()
}

fn group(inside: &str) -> Result<Vec<Axis>, String> {
    if inside.is_empty() {
        return Ok(Vec::new());
    }
    let axes: Vec<Axis> = inside.split(',').map(axis).collect::<Result<_, _>>()?;
    if axes.len() > AXES_MAX {
        return Err(format!(
            "({inside}) names {} axes, a tensor has at most {AXES_MAX}",
            axes.len()
        ));
    }
    Ok(axes)
}

fn axis(text: &str) -> Result<Axis, String> {
    if let Ok(size) = text.parse() {
        return Ok(Axis::Size(size));
    }
    let letter = |c: char| c.is_ascii_alphabetic() || c == '_';
    let name = text.starts_with(letter) && text.chars().all(|c| letter(c) || c.is_ascii_digit());
    if !name || text.len() > 32 {
        return Err(format!(
            "{text:?} is neither a size nor a name of letters, digits and _"
        ));
    }
    Ok(Axis::Name(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(signature: &str, shapes: &[&[u64]]) -> Result<(), String> {
        let signature = Signature::parse(signature)
            .expect("well-formed")
            .expect("a rule");
        let tensors: Vec<Shaped<'_>> = shapes
            .iter()
            .enumerate()
            .map(|(index, shape)| Shaped {
                port: format!("input `p{index}`"),
                whole: false,
                shape,
            })
            .collect();
        signature
            .check(&tensors)
            .map_err(|(index, reason)| format!("p{index}: {reason}"))
    }

    #[test]
    fn equal_axes_are_equal() {
        assert_eq!(
            check("(m,n),(n,p)->(m,p)", &[&[2, 3], &[3, 4], &[2, 4]]),
            Ok(())
        );
        assert_eq!(check("(n)->(m)", &[&[7], &[3]]), Ok(()));
        assert_eq!(check("(),()->()", &[&[7, 2], &[7, 2], &[7, 2]]), Ok(()));
        assert_eq!(check("(n,3)->(n)", &[&[9, 2, 3], &[9, 2]]), Ok(()));
        assert_eq!(
            check("(m,n),(n,p)->(m,p)", &[&[2, 3], &[4, 4]]),
            Err("p1: axis 0 has size 4 and axis 1 of input `p0` has size 3; both are `n` in the signature \
                 (m,n),(n,p)->(m,p) and must be equal"
                .to_owned())
        );
        assert_eq!(
            check("(n,3)->(n)", &[&[9, 4]]),
            Err("p0: axis 1 has size 4, the signature (n,3)->(n) asks for 3".to_owned())
        );
        assert_eq!(
            check("(),()->()", &[&[7, 2], &[7, 3]]),
            Err("p1: axis 1 has size 3 and axis 1 of input `p0` has size 2; by the signature (),()->() they must be equal"
                .to_owned())
        );
        assert!(check("(),()->()", &[&[7, 2], &[7]]).is_err_and(|e| e.contains("has 2;")));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "n",
            "->",
            "(n)",
            "(n)->m",
            "(n->(m)",
            "(n) ->(m)",
            "(n,)->(m)",
            "(-1)->()",
            "(é)->()",
            "((n))->()",
            "(n)(m)->()",
            "(a,b,c,d,e,f,g,h,i)->()",
            "(n)->(m)->(k)",
            "\u{1b}[2J",
        ] {
            let parsed = Signature::parse(text);
            if text == "->" {
                // For a kernel without ports, which is refused for that.
                assert!(parsed.is_ok());
            } else {
                assert!(parsed.is_err(), "{text}: {parsed:?}");
            }
        }
        assert_eq!(Signature::parse(""), Ok(None));
        let long = format!("({})->()", "n".repeat(2000));
        assert!(Signature::parse(&long).is_err_and(|e| e.contains("2006 bytes")));
    }
}
