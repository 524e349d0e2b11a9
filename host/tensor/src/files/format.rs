//! Which format a file has.

use std::path::Path;

/// The format of a tensor file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// numpy's, of one array.
    Npy,
    /// numpy's, of several: a zip archive of `.npy` files.
    Npz,
    /// Hugging Face's.
    Safetensors,
    /// Numbers as text.
    Csv,
    /// Arrow IPC, file or stream.
    Arrow,
}

impl Format {
    /// The extensions that are known, for people.
    pub const EXTENSIONS: &str = ".npy, .npz, .safetensors, .csv, .arrow or .feather";

    /// What the extension of `path` stands for.
    pub fn of(path: &Path) -> Option<Format> {
        let extension = path.extension()?.to_ascii_lowercase();
        match extension.to_str()? {
            "npy" => Some(Format::Npy),
            "npz" => Some(Format::Npz),
            "safetensors" => Some(Format::Safetensors),
            "csv" => Some(Format::Csv),
            "arrow" | "feather" => Some(Format::Arrow),
            _ => None,
        }
    }

    /// Whether a file may have more than one tensor.
    pub const fn holds_several(self) -> bool {
        !matches!(self, Format::Npy)
    }
}
