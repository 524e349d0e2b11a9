//! The fields of a header block (RFC 7541, HPACK), followed byte by byte.

pub(super) const NAME: &[u8] = b":authority";
/// `NAME` in HPACK's Huffman code (RFC 7541, appendix B).
pub(super) const NAME_HUFFMAN: &[u8] = &[0xb8, 0x3b, 0x53, 0x39, 0xec, 0x32, 0x7d, 0x7f];
/// Index of `:authority` in HPACK's static table.
const NAME_INDEX: u32 = 1;

/// Not HTTP/2 or not HPACK.
#[derive(Debug)]
pub(super) struct Malformed;

/// Where in a field of HPACK the next byte is.
#[derive(Debug, Clone, Copy, Default)]
enum Field {
    /// At the first byte of a field.
    #[default]
    Start,
    /// In the integer of an indexed field or a table size: no string follows.
    Index { shift: u32 },
    /// In the index of a literal's name.
    NameIndex { value: u32, shift: u32 },
    /// At the first byte of a string.
    String { part: Part },
    /// In the length of a string.
    Length {
        part: Part,
        huffman: bool,
        value: u32,
        shift: u32,
    },
    /// In a name of which `seen` bytes have passed, all of them those of `:authority` if `same`.
    Name {
        left: u32,
        huffman: bool,
        seen: usize,
        same: bool,
    },
    /// In a value.
    Value { left: u32, repair: bool },
}

/// Which string of a literal.
#[derive(Debug, Clone, Copy)]
enum Part {
    Name,
    Value { authority: bool },
}

/// The fields of one header block, which may span frames.
#[derive(Debug, Default)]
pub(super) struct Fields(Field);

impl Fields {
    /// Whether a field has begun that is not whole.
    pub(super) fn is_midway(&self) -> bool {
        !matches!(self.0, Field::Start)
    }

    /// Repairs the next bytes of the block.
    pub(super) fn pass(&mut self, fragment: &mut [u8]) -> Result<(), Malformed> {
        let mut rest = fragment;
        while !rest.is_empty() {
            let done = match &mut self.0 {
                Field::Value { left, repair } => {
                    let done = take(rest, left);
                    if *repair {
                        for byte in rest[..done].iter_mut().filter(|byte| !is_legal(**byte)) {
                            *byte = b'_';
                        }
                    }
                    if *left == 0 {
                        self.0 = Field::Start;
                    }
                    done
                }
                field => {
                    *field = field.next(rest[0])?;
                    1
                }
            };
            rest = &mut rest[done..];
        }
        Ok(())
    }
}

/// Whether http's `Authority` takes this byte outside a user name and password.
pub(super) fn is_legal(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@[]".contains(&byte)
}

/// The first `left` of `bytes`, and how many those are.
pub(super) fn take(bytes: &mut [u8], left: &mut u32) -> usize {
    let count = u32::try_from(bytes.len()).map_or(*left, |len| len.min(*left));
    *left -= count;
    count as usize
}

/// Adds seven more bits to an HPACK integer; answers whether it ends here.
fn extend(value: &mut u32, shift: &mut u32, byte: u8) -> Result<bool, Malformed> {
    let bits = u32::from(byte & 0x7f);
    // Four bytes hold every length that a frame can have; h2 stops reading there too.
    if *shift > 21 {
        return Err(Malformed);
    }
    *value = value.checked_add(bits << *shift).ok_or(Malformed)?;
    *shift += 7;
    Ok(byte & 0x80 == 0)
}

impl Field {
    /// What follows `byte`, for every place but a value's bytes.
    fn next(self, byte: u8) -> Result<Self, Malformed> {
        match self {
            Self::Start => Ok(Self::first(byte)),
            Self::Index { mut shift } => {
                let ends = extend(&mut 0, &mut shift, byte)?;
                Ok(if ends {
                    Self::Start
                } else {
                    Self::Index { shift }
                })
            }
            Self::NameIndex {
                mut value,
                mut shift,
            } => {
                let ends = extend(&mut value, &mut shift, byte)?;
                Ok(if ends {
                    Self::named(value)
                } else {
                    Self::NameIndex { value, shift }
                })
            }
            Self::String { part } => {
                let huffman = byte & 0x80 != 0;
                Ok(match u32::from(byte & 0x7f) {
                    0x7f => Self::Length {
                        part,
                        huffman,
                        value: 0x7f,
                        shift: 0,
                    },
                    length => Self::string(part, huffman, length),
                })
            }
            Self::Length {
                part,
                huffman,
                mut value,
                mut shift,
            } => {
                let ends = extend(&mut value, &mut shift, byte)?;
                Ok(if ends {
                    Self::string(part, huffman, value)
                } else {
                    Self::Length {
                        part,
                        huffman,
                        value,
                        shift,
                    }
                })
            }
            Self::Name {
                left,
                huffman,
                seen,
                same,
            } => {
                let name = if huffman { NAME_HUFFMAN } else { NAME };
                let same = same && name.get(seen) == Some(&byte);
                let seen = seen.saturating_add(1);
                Ok(if left > 1 {
                    Self::Name {
                        left: left - 1,
                        huffman,
                        seen,
                        same,
                    }
                } else {
                    Self::String {
                        part: Part::Value {
                            authority: same && seen == name.len(),
                        },
                    }
                })
            }
            // Only `Fields::pass` is in a value.
            Self::Value { .. } => Err(Malformed),
        }
    }

    fn first(byte: u8) -> Self {
        let (bits, literal) = match byte {
            0x80.. => (0x7f, false),
            0x40.. => (0x3f, true),
            0x20.. => (0x1f, false),
            _ => (0x0f, true),
        };
        let value = byte & bits;
        match (literal, value == bits) {
            (false, false) => Self::Start,
            (false, true) => Self::Index { shift: 0 },
            (true, false) => Self::named(value.into()),
            (true, true) => Self::NameIndex {
                value: value.into(),
                shift: 0,
            },
        }
    }

    fn named(index: u32) -> Self {
        let part = match index {
            0 => Part::Name,
            _ => Part::Value {
                authority: index == NAME_INDEX,
            },
        };
        Self::String { part }
    }

    fn string(part: Part, huffman: bool, length: u32) -> Self {
        match (part, length) {
            (Part::Name, 0) => Self::String {
                part: Part::Value { authority: false },
            },
            (Part::Name, left) => Self::Name {
                left,
                huffman,
                seen: 0,
                same: true,
            },
            (Part::Value { .. }, 0) => Self::Start,
            (Part::Value { authority }, left) => Self::Value {
                left,
                repair: authority && !huffman,
            },
        }
    }
}
