//! A token: 256 random bits that are shown once, and the hash by which a host knows it again.

use std::fmt;
use std::io;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rustix::rand::{GetRandomFlags, getrandom};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq;

use crate::plugin::hex;

/// What every token begins with, so that one that got into a log or a repository is recognised.
const PREFIX: &str = "strait_";
/// Longest text that is hashed: a longer one is no token.
const TEXT_BYTES_MAX: usize = 128;

/// A token's text. Neither kept nor logged: its `Debug` does not show it.
pub struct Token(String);

impl Token {
    /// A new one.
    ///
    /// # Errors
    /// If Linux gives no random bytes.
    pub fn generate() -> io::Result<Self> {
        let mut bytes = [0_u8; 32];
        let mut filled = 0;
        while filled < bytes.len() {
            filled += getrandom(&mut bytes[filled..], GetRandomFlags::empty())?;
        }
        Ok(Self(format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes))))
    }

    /// For whoever asked for it.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token")
    }
}

/// The sha256 of a token's text. Without salt: nobody guesses 256 bits.
#[derive(Clone, Copy)]
pub struct TokenHash([u8; 32]);

impl TokenHash {
    /// Of what somebody sent. None: it is too long to be a token.
    #[must_use]
    pub fn of(text: &str) -> Option<Self> {
        (text.len() <= TEXT_BYTES_MAX).then(|| Self(Sha256::digest(text).into()))
    }

    /// From 64 hex digits.
    #[must_use]
    pub fn from_hex(text: &str) -> Option<Self> {
        let mut bytes = [0; 32];
        let digits = text.as_bytes();
        if digits.len() != 64 {
            return None;
        }
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let digit = |c: u8| {
                char::from(c)
                    .to_digit(16)
                    .and_then(|d| u8::try_from(d).ok())
            };
            *byte = digit(pair[0])? << 4 | digit(pair[1])?;
        }
        Some(Self(bytes))
    }

    /// As 64 hex digits.
    #[must_use]
    pub fn hex(&self) -> String {
        hex(&self.0)
    }

    /// By which tokens are told apart for people, and found. It says nothing about the token.
    #[must_use]
    pub fn id(&self) -> String {
        hex(&self.0)[..ID_DIGITS].to_owned()
    }
}

/// Digits of a token's id.
const ID_DIGITS: usize = 12;

impl PartialEq for TokenHash {
    /// In the same time wherever they differ.
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for TokenHash {}

impl fmt::Debug for TokenHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TokenHash({})", self.id())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_differ_and_are_known_by_their_hash() {
        let [one, other] = [(); 2].map(|()| Token::generate().expect("random bytes"));
        assert_ne!(one.text(), other.text());
        assert_eq!(one.text().len(), PREFIX.len() + 43);
        let hash = TokenHash::of(one.text()).expect("short");
        assert_eq!(TokenHash::from_hex(&hash.hex()), Some(hash));
        assert_ne!(TokenHash::of(other.text()), Some(hash));
        assert!(hash.hex().starts_with(&hash.id()));
        assert_eq!(format!("{one:?}"), "Token");
        assert!(TokenHash::of(&"x".repeat(129)).is_none());
        for wrong in ["", "0", &"g".repeat(64), &"é".repeat(32), &"0".repeat(66)] {
            assert!(TokenHash::from_hex(wrong).is_none(), "{wrong}");
        }
    }
}
