//! The guests of `tests/guests` as files, for tests in other languages: `target/tmp/guests/NAME.wasm`.

use std::fs;
use std::path::Path;

use crate::guest;

#[test]
fn every_guest_becomes_a_component_in_a_file() {
    let folder = Path::new(concat!(env!("CARGO_TARGET_TMPDIR"), "/guests"));
    fs::create_dir_all(folder).unwrap();
    let mut names = Vec::new();
    for entry in fs::read_dir("tests/guests").unwrap() {
        let source = entry.unwrap().path();
        let name = source.file_stem().unwrap().to_str().unwrap().to_owned();
        let component = guest::component(&name, &fs::read_to_string(&source).unwrap());
        // Layer 1 of the binary format: a component and not a core module.
        assert_eq!(component[..8], *b"\0asm\x0d\0\x01\0", "{name}");
        // In one step, since another run's tests may be reading them.
        let partial = folder.join(format!("{name}.partial-{}", std::process::id()));
        fs::write(&partial, component).unwrap();
        fs::rename(&partial, folder.join(format!("{name}.wasm"))).unwrap();
        names.push(name);
    }
    for needed in ["copies", "spins", "traps"] {
        assert!(
            names.iter().any(|name| name == needed),
            "tests/conformance needs {needed}, there are {names:?}"
        );
    }
}
