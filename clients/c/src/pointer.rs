//! What C gives, as Rust may look at it, and what it is given. All of the library's `unsafe` is here.
//!
//! The types stand in the functions' signatures where strait.h has pointers. Each but a handle is made by a caller in C, who
//! promises what the head of strait.h asks for: a pointer is NULL, or it points to what its type says, for as long
//! as the function runs. Rust code of this crate makes none of them.

use std::ffi::{CStr, CString, c_char};
use std::mem::MaybeUninit;
use std::ptr;

use crate::failure::{Failure, c_text};

/// A text that C gives: NULL, or bytes that end with 0.
#[repr(transparent)]
#[derive(Debug)]
pub struct Text(*const c_char);

impl Text {
    /// The one that C put into a struct of its own.
    pub(crate) fn at(text: *const c_char) -> Self {
        Self(text)
    }

    /// The text, if there is one.
    pub(crate) fn optional(&self, what: &str) -> Result<Option<&str>, Failure> {
        if self.0.is_null() {
            return Ok(None);
        }
        // SAFETY: not NULL, so C says that it points to bytes that end with 0 and stay while the function runs; `self`, which
        // the result borrows, is its argument.
        let text = unsafe { CStr::from_ptr(self.0) };
        let text = text.to_str().map_err(|error| {
            Failure::argument(format!(
                "`{what}` is not UTF-8 from byte {} on",
                error.valid_up_to()
            ))
        })?;
        Ok(Some(text))
    }

    /// The text, which must be there.
    pub(crate) fn get(&self, what: &str) -> Result<&str, Failure> {
        self.optional(what)?.ok_or_else(|| Failure::null(what))
    }
}

/// Values that C gives one behind the other, their number beside it: NULL, or so many.
#[repr(transparent)]
#[derive(Debug)]
pub struct Many<T>(*const T);

impl<T> Many<T> {
    /// The `count` values that C says there are.
    pub(crate) fn of(&self, count: usize, what: &str) -> Result<&[T], Failure> {
        if count == 0 {
            return Ok(&[]);
        }
        check(self.0, count, what)?;
        // SAFETY: not NULL and aligned, `count` values are no more than there are addresses, and C says that so many are there and stay while the
        // function runs; `self`, which the result borrows, is its argument.
        Ok(unsafe { std::slice::from_raw_parts(self.0, count) })
    }
}

/// Room that C gives for values one behind the other, its number beside it.
#[repr(transparent)]
#[derive(Debug)]
pub struct Room<T>(*mut T);

impl<T: Copy> Room<T> {
    /// Writes as many as there is room for.
    pub(crate) fn write(self, count: usize, values: &[T], what: &str) -> Result<(), Failure> {
        if count == 0 {
            return Ok(());
        }
        check(self.0.cast_const(), count, what)?;
        // SAFETY: not NULL and aligned, and C says that there is room for `count`; `values` is memory of this library.
        unsafe { ptr::copy_nonoverlapping(values.as_ptr(), self.0, count.min(values.len())) };
        Ok(())
    }
}

fn check<T>(pointer: *const T, count: usize, what: &str) -> Result<(), Failure> {
    if pointer.is_null() {
        return Err(Failure::null(what));
    }
    if !pointer.is_aligned() {
        return Err(Failure::argument(format!("`{what}` is not aligned")));
    }
    match count.checked_mul(size_of::<T>()) {
        Some(bytes) if isize::try_from(bytes).is_ok() => Ok(()),
        _ => Err(Failure::argument(format!(
            "{count} values of `{what}` are more than there are addresses"
        ))),
    }
}

/// Where a function puts what it answers.
pub(crate) type Out<'a, T> = Option<&'a mut MaybeUninit<T>>;

/// Puts there what `make` gives, or `otherwise`, so that C never finds there what was in its variable before.
pub(crate) fn answer<T>(
    out: Out<'_, T>,
    otherwise: T,
    what: &str,
    make: impl FnOnce() -> Result<T, Failure>,
) -> Result<(), Failure> {
    let out = out.ok_or_else(|| Failure::null(what))?;
    // First: what `make` does may panic.
    let out = out.write(otherwise);
    *out = make()?;
    Ok(())
}

/// Puts a new handle there, or NULL.
pub(crate) fn hand_out<T>(
    out: Out<'_, *mut T>,
    what: &str,
    make: impl FnOnce() -> Result<T, Failure>,
) -> Result<(), Failure> {
    answer(out, ptr::null_mut(), what, || {
        make().map(|made| Box::into_raw(Box::new(made)))
    })
}

/// Puts a new text there, or NULL; `strait_text_free` takes it back.
pub(crate) fn hand_out_text(
    out: Out<'_, *mut c_char>,
    what: &str,
    make: impl FnOnce() -> Result<String, Failure>,
) -> Result<(), Failure> {
    answer(out, ptr::null_mut(), what, || {
        make().map(|made| c_text(made).into_raw())
    })
}

/// Ends a text.
pub(crate) fn free_text(text: *mut c_char) {
    if !text.is_null() {
        // SAFETY: C says that it came from `hand_out_text`, and was not freed before.
        drop(unsafe { CString::from_raw(text) });
    }
}

/// A text for C that lives as long as the handle from which it was asked, or for ever.
#[repr(transparent)]
#[derive(Debug)]
pub struct StaticText(*const c_char);

impl StaticText {
    pub(crate) const NULL: Self = Self(ptr::null());

    pub(crate) const fn new(text: &CStr) -> Self {
        Self(text.as_ptr())
    }
}

/// Elements in memory of C's, which promises that they stay, and are not written, until the operation that reads
/// them has been finished or freed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lent {
    data: *const u8,
    length: usize,
}

// SAFETY: it is read only, and C promises that nobody writes there meanwhile; which thread reads does not matter.
unsafe impl Send for Lent {}
// SAFETY: as above.
unsafe impl Sync for Lent {}

impl Lent {
    /// What a handle of this library shows, which stays as long as its description says.
    pub(crate) fn shown(bytes: &[u8]) -> Self {
        Self {
            data: bytes.as_ptr(),
            length: bytes.len(),
        }
    }

    /// Its address, for C.
    pub(crate) fn address(self) -> *const u8 {
        self.data
    }

    /// `length` bytes at `data`.
    pub(crate) fn new(data: *const u8, bytes: u64, what: &str) -> Result<Self, Failure> {
        let too_many = || {
            Failure::argument(format!(
                "{bytes} bytes of {what} are more than there are addresses"
            ))
        };
        let length = usize::try_from(bytes).map_err(|_| too_many())?;
        if isize::try_from(length).is_err() {
            return Err(too_many());
        }
        if data.is_null() && length > 0 {
            return Err(Failure::argument(format!(
                "{what}: its data is NULL, and it has {bytes} bytes"
            )));
        }
        Ok(Self { data, length })
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        if self.length == 0 {
            return &[];
        }
        // SAFETY: not NULL, `length` is at most `isize::MAX`, and C promises what `Lent` says.
        unsafe { std::slice::from_raw_parts(self.data, self.length) }
    }
}
