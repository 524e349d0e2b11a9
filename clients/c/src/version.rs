//! Which library this is.

use crate::pointer::StaticText;

/// The version of this interface. It changes when programs compiled with the previous strait.h would no longer work.
pub const STRAIT_ABI_VERSION: u32 = 1;

/// The STRAIT_ABI_VERSION of the library that was loaded, to be compared with that of the header: STRAIT_ABI_MATCHES().
#[unsafe(no_mangle)]
pub extern "C" fn strait_abi_version() -> u32 {
    STRAIT_ABI_VERSION
}

/// The library's own version, such as "0.1.0".
#[unsafe(no_mangle)]
pub extern "C" fn strait_version() -> StaticText {
    StaticText::new(VERSION)
}

const VERSION: &std::ffi::CStr = match std::ffi::CStr::from_bytes_with_nul(
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes(),
) {
    Ok(version) => version,
    Err(_) => c"",
};
