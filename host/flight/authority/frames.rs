//! Frames of HTTP/2 (RFC 9113) and the header blocks in them, followed byte by byte.

use super::hpack::{Fields, Malformed, take};

const FRAME_HEADER_BYTES: usize = 9;
pub(super) const HEADERS: u8 = 1;
pub(super) const SETTINGS: u8 = 4;
pub(super) const CONTINUATION: u8 = 9;
pub(super) const ACK: u8 = 0x1;
pub(super) const END_HEADERS: u8 = 0x4;
pub(super) const PADDED: u8 = 0x8;
pub(super) const PRIORITY: u8 = 0x20;
/// Stream dependency and weight.
const PRIORITY_BYTES: u32 = 5;
/// An identifier and a value.
const SETTING_BYTES: usize = 6;
pub(super) const MAX_FRAME_SIZE: u16 = 5;

#[derive(Debug, Default)]
pub(super) struct Frames {
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
    fields: Fields,
}

impl Frames {
    /// A frame has begun that is not whole, or a header block.
    pub(super) fn is_midway(&self) -> bool {
        self.header_len > 0 || self.block.is_some() || !matches!(self.payload, Payload::None)
    }

    /// Handles at least one of `bytes` (not empty): how many, and whether a frame's header ended with them. `frame_bytes`
    /// becomes what a setting says of the longest frame.
    pub(super) fn step(
        &mut self,
        bytes: &mut [u8],
        frame_bytes: &mut u32,
    ) -> Result<(usize, bool), Malformed> {
        let in_header = self.header_len > 0;
        let done = self.handle(bytes, frame_bytes)?;
        Ok((done, in_header && self.header_len == 0))
    }

    fn handle(&mut self, bytes: &mut [u8], frame_bytes: &mut u32) -> Result<usize, Malformed> {
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
                block.fields.pass(&mut bytes[..done])?;
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
                    fields: Fields::default(),
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
        if let Some(Block { ends: true, fields }) = &self.block {
            if fields.is_midway() {
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
