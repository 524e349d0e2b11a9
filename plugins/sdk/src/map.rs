//! Loops that become wide SIMD code.

/// `y[i] = f(x[i])`, for as many elements as the shorter slice has.
///
/// A plain loop: with the flags in `plugins/.cargo/config.toml` LLVM makes four `v128` operations a round of it.
/// Without `force-vector-interleave` it makes one, and then the host's deadline check in each round is felt.
/// (Blocks with a fixed trip count, unrolled by hand, come out as scalar code for `f64`.)
#[inline]
pub fn map<A: Copy, B: Copy>(x: &[A], y: &mut [B], f: impl Fn(A) -> B) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = f(*x);
    }
}

#[cfg(test)]
mod tests {
    use super::map;
    use alloc::vec::Vec;

    #[test]
    fn every_length_and_the_shorter_slice() {
        for x_len in 0..70u16 {
            for y_len in [x_len, x_len.saturating_sub(9), x_len + 70] {
                let x: Vec<u16> = (0..x_len).collect();
                let mut y = alloc::vec![u32::MAX; y_len.into()];
                map(&x, &mut y, |v| u32::from(v) + 1);
                for (i, &y) in (0..).zip(&y) {
                    let expected = if i < x_len {
                        u32::from(i) + 1
                    } else {
                        u32::MAX
                    };
                    assert_eq!(y, expected, "{x_len} {y_len} {i}");
                }
            }
        }
    }
}
