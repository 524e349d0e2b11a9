//! Buffers of a record batch that are compressed, each for itself.

use std::io::Read;

/// How buffers are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// LZ4 frames.
    Lz4Frame,
    /// Zstandard frames.
    Zstd,
}

/// Fills `into` with what comes of `stored`: a length (`i64`, -1: plain bytes follow), then a frame. Nothing is decoded beyond what
/// `into` holds. An empty buffer has no length in front of it.
///
/// # Errors
/// What is wrong with `stored`.
pub fn inflate(compression: Compression, stored: &[u8], into: &mut [u8]) -> Result<(), String> {
    if into.is_empty() {
        return Ok(());
    }
    let short = || format!("{} bytes are too short for a length", stored.len());
    let (length, frame) = stored.split_first_chunk::<8>().ok_or_else(short)?;
    let wanted = into.len();
    match i64::from_le_bytes(*length) {
        // "Not compressed after all", as writers do where it does not pay.
        -1 => {
            let plain = frame.get(..wanted);
            let missing = || format!("{} plain bytes where {wanted} belong", frame.len());
            into.copy_from_slice(plain.ok_or_else(missing)?);
            Ok(())
        }
        length if u64::try_from(length).is_ok_and(|length| length >= wanted as u64) => {
            let read = match compression {
                Compression::Lz4Frame => lz4_flex::frame::FrameDecoder::new(frame).read_exact(into),
                Compression::Zstd => ruzstd::decoding::StreamingDecoder::new(frame)
                    .map_err(|error| error.to_string())?
                    .read_exact(into),
            };
            read.map_err(|error| error.to_string())
        }
        length => Err(format!(
            "{length} bytes are announced where {wanted} belong"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lz4(values: &[u8]) -> Vec<u8> {
        use std::io::Write;
        let mut frame = lz4_flex::frame::FrameEncoder::new(Vec::new());
        frame.write_all(values).expect("memory");
        let frame = frame.finish().expect("memory");
        [&(values.len() as u64).to_le_bytes()[..], &frame].concat()
    }

    fn zstd(values: &[u8]) -> Vec<u8> {
        let level = ruzstd::encoding::CompressionLevel::Fastest;
        let frame = ruzstd::encoding::compress_to_vec(values, level);
        [&(values.len() as u64).to_le_bytes()[..], &frame].concat()
    }

    #[test]
    fn what_was_compressed_comes_back() {
        let values: Vec<u8> = (0..100_000_u32).map(|n| (n / 7).to_le_bytes()[0]).collect();
        for (how, stored) in [
            (Compression::Lz4Frame, lz4(&values)),
            (Compression::Zstd, zstd(&values)),
        ] {
            let mut into = vec![0; values.len()];
            inflate(how, &stored, &mut into).expect("whole");
            assert!(into == values, "{how:?}");
            // Of what is padded only what belongs to it.
            let mut into = vec![0; 1000];
            inflate(how, &stored, &mut into).expect("whole");
            assert!(into == values[..1000], "{how:?}");
            let plain = [&(-1_i64).to_le_bytes()[..], &values].concat();
            inflate(how, &plain, &mut into).expect("plain");
            assert!(into == values[..1000], "{how:?}");
            inflate(how, &[], &mut []).expect("nothing");
        }
    }

    #[test]
    fn what_is_damaged_is_refused() {
        let values = vec![7; 100_000];
        for (how, stored) in [
            (Compression::Lz4Frame, lz4(&values)),
            (Compression::Zstd, zstd(&values)),
        ] {
            let mut into = vec![0; values.len()];
            for end in [0, 7, 8, 12, stored.len() / 2] {
                inflate(how, &stored[..end], &mut into).expect_err("cut");
            }
            let mut into = vec![0; values.len() + 1];
            inflate(how, &stored, &mut into).expect_err("less is announced");
            let mut lies = stored.clone();
            lies[..8].copy_from_slice(&u64::MAX.to_le_bytes().map(|byte| byte >> 1));
            inflate(how, &lies, &mut into).expect_err("less comes than is announced");
            for at in 0..stored.len().min(64) {
                let mut wrong = stored.clone();
                wrong[at] ^= 0x55;
                // An error or other values, and no panic.
                let _ = inflate(how, &wrong, &mut into[..1000]);
            }
        }
    }
}
