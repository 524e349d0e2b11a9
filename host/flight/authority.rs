//! Repairs the `:authority` that gRPC C++ sends over unix sockets.
//!
//! For `unix:///run/strait/flight.sock` it sends `run%2Fstrait%2Fflight.sock`, and the h2 crate
//! refuses `%` in an authority, so stock pyarrow could not connect. [`AuthorityRepair`] follows the
//! HTTP/2 frames of a connection as they arrive and overwrites such bytes in place:
//!
//! ```text
//! bytes ─▶ preface ─▶ frame header ─▶ HEADERS, CONTINUATION ─▶ HPACK fields ─▶ value of `:authority`
//!                         ├─▶ SETTINGS ─▶ the longest frame that the client takes
//!                         └─▶ every other frame is skipped
//! ```
//! A byte is replaced by one byte, so frame lengths, string lengths and the sizes in the HPACK
//! table stay right, and nothing is ever held back: there is no buffer. A value that was repaired
//! on its way into the dynamic table is right when a later request refers to it by index.
//!
//! Left alone, and then judged by h2: Huffman-coded values, and values whose name is an index into
//! the dynamic table (no client known sends either for this name). After anything that is not
//! HTTP/2 the rest of the connection is left alone too; h2 closes it.

/// What every client sends first.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const FRAME_HEADER_BYTES: usize = 9;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const CONTINUATION: u8 = 9;
const ACK: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
/// Stream dependency and weight.
const PRIORITY_BYTES: u32 = 5;
/// An identifier and a value.
const SETTING_BYTES: usize = 6;
const MAX_FRAME_SIZE: u16 = 5;
/// The longest frame that a peer takes which says nothing.
const FRAME_BYTES: u32 = 16 << 10;

const NAME: &[u8] = b":authority";
/// `NAME` in HPACK's Huffman code (RFC 7541, appendix B).
const NAME_HUFFMAN: &[u8] = &[0xb8, 0x3b, 0x53, 0x39, 0xec, 0x32, 0x7d, 0x7f];
/// Index of `:authority` in HPACK's static table.
const NAME_INDEX: u32 = 1;

/// Whether http's `Authority` takes this byte outside a user name and password.
fn is_legal(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@[]".contains(&byte)
}

/// Follows the bytes of one connection from its client.
#[derive(Debug)]
pub(super) struct AuthorityRepair {
    at: At,
    frames: u64,
    /// The longest frame that the client takes.
    frame_bytes: u32,
}

impl Default for AuthorityRepair {
    fn default() -> Self {
        Self {
            at: At::default(),
            frames: 0,
            frame_bytes: FRAME_BYTES,
        }
    }
}

/// What the next byte belongs to.
#[derive(Debug, Default)]
enum At {
    /// The start: so many bytes of the preface have passed.
    #[default]
    Start,
    Preface(usize),
    Frames(Frames),
    /// Not HTTP/2 that we understand.
    Elsewhere,
}

#[derive(Debug, Default)]
struct Frames {
    header: [u8; FRAME_HEADER_BYTES],
    header_len: usize,
    payload: Payload,
    /// A header block has begun and not ended: only its CONTINUATIONs may follow.
    block: Option<Block>,
}

/// The rest of a frame.
#[derive(Debug, Default)]
enum Payload {
    /// None: the next byte belongs to a frame header.
    #[default]
    None,
    /// Bytes of no interest.
    Skip(u32),
    /// Settings, of one of which some bytes have passed.
    Settings {
        left: u32,
        setting: [u8; SETTING_BYTES],
        seen: usize,
    },
    /// A padded HEADERS frame of `left` bytes, before its length of padding.
    PadLength { left: u32, priority: bool },
    /// So many bytes of priority, then a fragment, then padding.
    Priority {
        left: u32,
        fragment: u32,
        padding: u32,
    },
    /// A fragment of a header block, then padding.
    Fragment { left: u32, padding: u32 },
}

/// A header block, which may span frames.
#[derive(Debug)]
struct Block {
    /// The frame at hand is its last.
    ends: bool,
    field: Field,
}

/// Where in a field of HPACK the next byte is.
#[derive(Debug, Clone, Copy)]
enum Field {
    /// At the first byte of a field.
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

/// Not HTTP/2 or not HPACK.
#[derive(Debug)]
struct Malformed;

impl AuthorityRepair {
    /// Frames that began so far.
    pub(super) fn frames(&self) -> u64 {
        self.frames
    }

    /// The longest frame that the client takes, by its settings so far.
    pub(super) fn frame_bytes(&self) -> u32 {
        self.frame_bytes
    }

    /// Whether something has begun that is not whole: the preface with its first frame, any other
    /// frame, a header block.
    pub(super) fn is_midway(&self) -> bool {
        match &self.at {
            At::Start | At::Preface(_) | At::Elsewhere => true,
            At::Frames(frames) => {
                self.frames == 0
                    || frames.header_len > 0
                    || frames.block.is_some()
                    || !matches!(frames.payload, Payload::None)
            }
        }
    }

    /// Repairs the next bytes of the connection, however they were cut.
    pub(super) fn pass(&mut self, mut bytes: &mut [u8]) {
        while !bytes.is_empty() {
            match self.step(bytes) {
                Ok(done) => bytes = &mut bytes[done..],
                Err(Malformed) => {
                    self.at = At::Elsewhere;
                    return;
                }
            }
        }
    }

    /// Handles at least one of `bytes` (not empty) and answers how many.
    fn step(&mut self, bytes: &mut [u8]) -> Result<usize, Malformed> {
        match &mut self.at {
            At::Elsewhere => Ok(bytes.len()),
            At::Start => {
                self.at = At::Preface(0);
                self.step(bytes)
            }
            At::Preface(seen) => {
                if bytes[0] != PREFACE[*seen] {
                    return Err(Malformed);
                }
                *seen += 1;
                if *seen == PREFACE.len() {
                    self.at = At::Frames(Frames::default());
                }
                Ok(1)
            }
            At::Frames(frames) => {
                let in_header = frames.header_len > 0;
                let done = frames.step(bytes, &mut self.frame_bytes)?;
                if in_header && frames.header_len == 0 {
                    self.frames += 1;
                }
                Ok(done)
            }
        }
    }
}

/// The first `left` of `bytes`, and how many those are.
fn take(bytes: &mut [u8], left: &mut u32) -> usize {
    let count = u32::try_from(bytes.len()).map_or(*left, |len| len.min(*left));
    *left -= count;
    count as usize
}

impl Frames {
    fn step(&mut self, bytes: &mut [u8], frame_bytes: &mut u32) -> Result<usize, Malformed> {
        match &mut self.payload {
            Payload::Settings {
                left,
                setting,
                seen,
            } => {
                setting[*seen] = bytes[0];
                (*seen, *left) = (*seen + 1, *left - 1);
                if *seen == SETTING_BYTES {
                    let [a, b, value @ ..] = *setting;
                    if u16::from_be_bytes([a, b]) == MAX_FRAME_SIZE {
                        *frame_bytes = u32::from_be_bytes(value);
                    }
                    *seen = 0;
                }
                if *left == 0 {
                    self.payload = Payload::None;
                }
                Ok(1)
            }
            Payload::None => {
                self.header[self.header_len] = bytes[0];
                self.header_len += 1;
                if self.header_len == FRAME_HEADER_BYTES {
                    self.header_len = 0;
                    self.begin_frame()?;
                }
                Ok(1)
            }
            Payload::Skip(left) => {
                let done = take(bytes, left);
                if *left == 0 {
                    self.payload = Payload::None;
                }
                Ok(done)
            }
            Payload::PadLength { left, priority } => {
                let padding = u32::from(bytes[0]);
                let (left, priority) = (*left - 1, *priority);
                self.begin_fragment(left, padding, priority)?;
                Ok(1)
            }
            Payload::Priority {
                left,
                fragment,
                padding,
            } => {
                let done = take(bytes, left);
                if *left == 0 {
                    let (fragment, padding) = (*fragment, *padding);
                    self.enter_fragment(fragment, padding)?;
                }
                Ok(done)
            }
            Payload::Fragment { left, padding } => {
                let done = take(bytes, left);
                let block = self.block.as_mut().ok_or(Malformed)?;
                block.pass(&mut bytes[..done])?;
                if *left == 0 {
                    let padding = *padding;
                    self.end_fragment(padding)?;
                }
                Ok(done)
            }
        }
    }

    fn begin_frame(&mut self) -> Result<(), Malformed> {
        let [a, b, c, kind, flags, ..] = self.header;
        let length = u32::from_be_bytes([0, a, b, c]);
        let ends = flags & END_HEADERS != 0;
        match (kind, &mut self.block) {
            (HEADERS, None) => {
                self.block = Some(Block {
                    ends,
                    field: Field::Start,
                });
                let priority = flags & PRIORITY != 0;
                if flags & PADDED == 0 {
                    return self.begin_fragment(length, 0, priority);
                }
                if length == 0 {
                    return Err(Malformed);
                }
                self.payload = Payload::PadLength {
                    left: length,
                    priority,
                };
                Ok(())
            }
            (CONTINUATION, Some(block)) => {
                block.ends = ends;
                self.enter_fragment(length, 0)
            }
            (HEADERS, Some(_)) | (CONTINUATION, None) | (_, Some(_)) => Err(Malformed),
            (SETTINGS, None) if flags & ACK == 0 && length > 0 => {
                self.payload = Payload::Settings {
                    left: length,
                    setting: [0; SETTING_BYTES],
                    seen: 0,
                };
                Ok(())
            }
            (_, None) => {
                self.skip(length);
                Ok(())
            }
        }
    }

    /// `left` bytes of HEADERS are to come, `padding` of them at the end.
    fn begin_fragment(&mut self, left: u32, padding: u32, priority: bool) -> Result<(), Malformed> {
        let before = if priority { PRIORITY_BYTES } else { 0 };
        let fragment = left.checked_sub(padding + before).ok_or(Malformed)?;
        if before == 0 {
            return self.enter_fragment(fragment, padding);
        }
        self.payload = Payload::Priority {
            left: before,
            fragment,
            padding,
        };
        Ok(())
    }

    fn enter_fragment(&mut self, left: u32, padding: u32) -> Result<(), Malformed> {
        if left == 0 {
            return self.end_fragment(padding);
        }
        self.payload = Payload::Fragment { left, padding };
        Ok(())
    }

    fn end_fragment(&mut self, padding: u32) -> Result<(), Malformed> {
        if let Some(Block { ends: true, field }) = self.block {
            if !matches!(field, Field::Start) {
                return Err(Malformed);
            }
            self.block = None;
        }
        self.skip(padding);
        Ok(())
    }

    fn skip(&mut self, bytes: u32) {
        self.payload = if bytes == 0 {
            Payload::None
        } else {
            Payload::Skip(bytes)
        };
    }
}

impl Block {
    fn pass(&mut self, fragment: &mut [u8]) -> Result<(), Malformed> {
        let mut rest = fragment;
        while !rest.is_empty() {
            let done = match &mut self.field {
                Field::Value { left, repair } => {
                    let done = take(rest, left);
                    if *repair {
                        for byte in rest[..done].iter_mut().filter(|byte| !is_legal(**byte)) {
                            *byte = b'_';
                        }
                    }
                    if *left == 0 {
                        self.field = Field::Start;
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
            // Only `Block::pass` is in a value.
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).expect("small").to_be_bytes();
        [&length[1..], &[kind, flags, 0, 0, 0, 1], payload].concat()
    }

    /// A string without Huffman coding.
    fn string(text: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        if text.len() < 0x7f {
            out.push(u8::try_from(text.len()).expect("below 127"));
        } else {
            out.push(0x7f);
            let mut rest = text.len() - 0x7f;
            while rest >= 0x80 {
                out.push(u8::try_from(rest % 0x80).expect("7 bits") | 0x80);
                rest /= 0x80;
            }
            out.push(u8::try_from(rest).expect("7 bits"));
        }
        out.extend_from_slice(text);
        out
    }

    /// gRPC C++: literal with incremental indexing, name as text.
    fn by_text(value: &[u8]) -> Vec<u8> {
        [vec![0x40], string(NAME), string(value)].concat()
    }

    fn by_huffman_name(value: &[u8]) -> Vec<u8> {
        [vec![0x00, 0x80 | 8], NAME_HUFFMAN.to_vec(), string(value)].concat()
    }

    fn by_index(value: &[u8]) -> Vec<u8> {
        [vec![0x41], string(value)].concat()
    }

    fn connection(frames: &[Vec<u8>]) -> Vec<u8> {
        [PREFACE.to_vec(), frames.concat()].concat()
    }

    fn repaired(bytes: &[u8]) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        AuthorityRepair::default().pass(&mut bytes);
        bytes
    }

    #[track_caller]
    fn check(input: &[Vec<u8>], expected: &[Vec<u8>]) {
        assert_eq!(repaired(&connection(input)), connection(expected));
    }

    const BAD: &[u8] = b"tmp%2Fa b%2Fflight.sock";
    const GOOD: &[u8] = b"tmp_2Fa_b_2Fflight.sock";

    #[test]
    fn the_value_is_repaired_however_its_name_is_written() {
        for write in [by_text, by_index, by_huffman_name] {
            check(
                &[frame(HEADERS, END_HEADERS, &write(BAD))],
                &[frame(HEADERS, END_HEADERS, &write(GOOD))],
            );
        }
    }

    #[test]
    fn legal_authorities_stay() {
        for legal in ["localhost", "127.0.0.1:443", "[::1]:80", "a-b.c_d~e"] {
            let frames = [frame(HEADERS, END_HEADERS, &by_text(legal.as_bytes()))];
            check(&frames, &frames);
        }
    }

    #[test]
    fn the_longest_frame_is_what_the_settings_say_last() {
        let setting = |id: u16, value: u32| [&id.to_be_bytes()[..], &value.to_be_bytes()].concat();
        let some = [setting(4, 1 << 24), setting(MAX_FRAME_SIZE, 1 << 20)].concat();
        let bytes = connection(&[
            frame(SETTINGS, 0, &some),
            frame(SETTINGS, ACK, &[]),
            frame(0, 0, &setting(MAX_FRAME_SIZE, 7)),
            frame(HEADERS, END_HEADERS, &by_text(BAD)),
            frame(SETTINGS, 0, &[]),
            frame(SETTINGS, 0, &setting(MAX_FRAME_SIZE, 1 << 15)),
        ]);
        let mut repair = AuthorityRepair::default();
        let mut seen = vec![repair.frame_bytes()];
        for mut byte in bytes {
            repair.pass(std::slice::from_mut(&mut byte));
            if seen.last() != Some(&repair.frame_bytes()) {
                seen.push(repair.frame_bytes());
            }
        }
        assert_eq!(seen, [1 << 14, 1 << 20, 1 << 15]);
        assert!(!repair.is_midway());
    }

    #[test]
    fn nothing_else_is_touched() {
        // :path, another literal name, a name with `:authority` as its beginning, and the reverse.
        let fields = [
            vec![0x83, 0x86, 0x3f, 0xe1, 0x1f],
            [vec![0x44], string(b"/a%2Fb")].concat(),
            [vec![0x40], string(b"x-note"), string(b"%")].concat(),
            [vec![0x10], string(b":authority2"), string(b"%")].concat(),
            [vec![0x10], string(b":author"), string(b"%")].concat(),
            vec![0x41, 0x83, b'%', b'%', b'%'], // a Huffman-coded value
            [vec![0x0f, 0x80, 0x01], string(b"%")].concat(), // a name of the dynamic table
        ]
        .concat();
        let frames = [
            frame(4, 0, b"\x00\x04\x00\x10\x00\x00"),
            frame(HEADERS, END_HEADERS, &fields),
            frame(0, 1, &by_text(BAD)),
        ];
        check(&frames, &frames);
    }

    #[test]
    fn several_requests_padding_priority_and_continuations() {
        let headers = |value: &[u8]| {
            let block = by_text(value);
            let (first, rest) = block.split_at(4);
            let (second, third) = rest.split_at(17);
            [
                frame(4, 0, b""),
                frame(
                    HEADERS,
                    PADDED | PRIORITY,
                    &[b"\x03\x00\x00\x00\x00\x10".as_slice(), first, b"%%%"].concat(),
                ),
                frame(CONTINUATION, 0, second),
                frame(CONTINUATION, 0, b""),
                frame(CONTINUATION, END_HEADERS, third),
                frame(0, 0, b"%%"),
                frame(HEADERS, END_HEADERS, &[0x82, 0xbe]), // by its index in the table
                frame(
                    HEADERS,
                    END_HEADERS | PADDED,
                    &[b"\x02".as_slice(), &by_index(value), b"%%"].concat(),
                ),
            ]
        };
        check(&headers(BAD), &headers(GOOD));
    }

    #[test]
    fn it_says_whether_something_has_begun() {
        let bytes = connection(&[
            frame(4, 0, b""),
            frame(HEADERS, 0, &[0x82]),
            frame(CONTINUATION, END_HEADERS, &[0x83]),
            frame(0, 1, b"data"),
        ]);
        // Where each of them ends; between the parts of a header block nothing is whole.
        let whole = [24 + 9, 24 + 9 + 2 * 10, 24 + 9 + 2 * 10 + 13];
        let mut repair = AuthorityRepair::default();
        assert!(repair.is_midway());
        for (at, byte) in bytes.iter().enumerate() {
            repair.pass(&mut [*byte]);
            assert_eq!(!repair.is_midway(), whole.contains(&(at + 1)), "{at}");
        }
        assert_eq!(repair.frames(), 4);
        let mut other = AuthorityRepair::default();
        other.pass(&mut b"GET / HTTP/1.1\r\n\r\n".to_vec());
        assert!(other.is_midway(), "it never becomes a frame");
    }

    #[test]
    fn long_values() {
        let long = b"%2F".repeat(5000);
        let good = b"_2F".repeat(5000);
        check(
            &[frame(HEADERS, END_HEADERS, &by_text(&long))],
            &[frame(HEADERS, END_HEADERS, &by_text(&good))],
        );
    }

    #[test]
    fn what_is_not_http2_is_left_alone() {
        let request = b"GET / HTTP/1.1\r\nHost: a%2Fb\r\n\r\n";
        assert_eq!(repaired(request), request);
        // A frame between HEADERS and its CONTINUATION, padding beyond the frame, a block that
        // ends in a field: from there on nothing is changed.
        let after = frame(HEADERS, END_HEADERS, &by_text(BAD));
        for broken in [
            vec![frame(HEADERS, 0, &[0x82]), frame(0, 0, b"x")],
            vec![frame(HEADERS, END_HEADERS | PADDED, &[9, 0x82])],
            vec![frame(HEADERS, END_HEADERS | PADDED, &[])],
            vec![frame(HEADERS, END_HEADERS, &[0x41, 5, b'a'])],
            vec![frame(
                HEADERS,
                END_HEADERS,
                &[0x41, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01],
            )],
            vec![frame(CONTINUATION, END_HEADERS, &by_text(BAD))],
        ] {
            let frames = [broken, vec![after.clone()]].concat();
            check(&frames, &frames);
        }
    }

    fn cut(bytes: &[u8], cuts: &[prop::sample::Index]) -> Vec<u8> {
        let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
        at.sort_unstable();
        let mut repair = AuthorityRepair::default();
        let mut out = bytes.to_vec();
        let mut rest = &mut out[..];
        let mut start = 0;
        for end in at {
            let (part, more) = rest.split_at_mut(end - start);
            repair.pass(part);
            (rest, start) = (more, end);
        }
        repair.pass(rest);
        out
    }

    fn any_frame() -> impl Strategy<Value = Vec<u8>> {
        let bytes = || prop::collection::vec(any::<u8>(), 0..40);
        prop_oneof![
            bytes().prop_map(|value| frame(HEADERS, END_HEADERS, &by_text(&value))),
            bytes().prop_map(|value| frame(HEADERS, END_HEADERS, &by_index(&value))),
            (bytes(), 0_usize..40).prop_map(|(value, at)| {
                let block = by_text(&value);
                let (first, second) = block.split_at(at.min(block.len()));
                [
                    frame(HEADERS, 0, first),
                    frame(CONTINUATION, END_HEADERS, second),
                ]
                .concat()
            }),
            bytes().prop_map(|data| frame(0, 0, &data)),
            (any::<u8>(), any::<u8>(), bytes())
                .prop_map(|(kind, flags, data)| frame(kind, flags, &data)),
        ]
    }

    proptest! {
        #[test]
        fn where_the_reads_cut_does_not_matter(
            frames in prop::collection::vec(any_frame(), 0..8),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        ) {
            let bytes = connection(&frames);
            prop_assert_eq!(cut(&bytes, &cuts), repaired(&bytes));
        }

        #[test]
        fn hostile_bytes_pass_and_a_second_repair_changes_nothing(
            prefaced: bool,
            bytes in prop::collection::vec(any::<u8>(), 0..600),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        ) {
            let bytes = if prefaced { [PREFACE, &bytes].concat() } else { bytes };
            let once = cut(&bytes, &cuts);
            prop_assert_eq!(once.len(), bytes.len());
            prop_assert_eq!(repaired(&once), once);
        }

        #[test]
        fn every_value_becomes_legal(value in prop::collection::vec(any::<u8>(), 0..300)) {
            let good: Vec<u8> = value.iter().map(|b| if is_legal(*b) { *b } else { b'_' }).collect();
            let input = connection(&[frame(HEADERS, END_HEADERS, &by_text(&value))]);
            let expected = connection(&[frame(HEADERS, END_HEADERS, &by_text(&good))]);
            prop_assert_eq!(repaired(&input), expected);
        }
    }
}
