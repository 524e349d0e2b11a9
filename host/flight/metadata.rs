//! The metadata of a schema: as much of it as can be kept, and each key once.

use std::collections::HashSet;

use arrow_ipc::KeyValue;

use super::refused::bad_tensor;
use crate::error::Status;

/// Most bytes of a schema's metadata, keys and values of all its fields together.
const METADATA_BYTES_MAX: usize = 64 << 10;
/// Holds a schema's metadata against what can be kept: a bounded amount, each key once.
#[derive(Debug, Default)]
pub(super) struct Metadata {
    bytes: usize,
}

impl Metadata {
    fn check<'a>(
        &mut self,
        whose: &str,
        pairs: impl IntoIterator<Item = KeyValue<'a>>,
    ) -> Result<(), Status> {
        let mut keys = HashSet::new();
        for pair in pairs {
            let (Some(key), Some(value)) = (pair.key(), pair.value()) else {
                return Err(bad_tensor(format!(
                    "{whose} has a metadata entry without a key or a value"
                )));
            };
            if !keys.insert(key) {
                return Err(bad_tensor(format!(
                    "{whose} has two metadata entries `{key:.100}`; one is kept for each key: join them"
                )));
            }
            self.bytes += key.len() + value.len();
        }
        Ok(())
    }

    fn check_field(&mut self, field: arrow_ipc::Field<'_>) -> Result<(), Status> {
        let whose = format!("column `{:.100}`", field.name().unwrap_or_default());
        // A tensor's fields lie in one another; the schema was read before, so not deeply.
        let mut inner = Some(field);
        while let Some(field) = inner {
            self.check(&whose, field.custom_metadata().into_iter().flatten())?;
            inner = field
                .children()
                .and_then(|children| children.into_iter().next());
            // The name of a column has a limit of its own.
            self.bytes += inner.and_then(|field| field.name()).map_or(0, str::len);
        }
        Ok(())
    }

    pub(super) fn check_schema(mut self, schema: arrow_ipc::Schema<'_>) -> Result<(), Status> {
        self.check("the schema", schema.custom_metadata().into_iter().flatten())?;
        for field in schema.fields().into_iter().flatten() {
            self.check_field(field)?;
        }
        if self.bytes > METADATA_BYTES_MAX {
            return Err(bad_tensor(format!(
                "the schema and its columns have {} bytes of metadata; {METADATA_BYTES_MAX} are kept: leave some out",
                self.bytes
            )));
        }
        Ok(())
    }
}
