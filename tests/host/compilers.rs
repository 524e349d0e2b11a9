//! Compiled plugins on disk, where plugins are compiled in processes of their own.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde_json::json;
use tempfile::TempDir;

use crate::served::{Served, check_call, put, ramp};

/// A host with that cache; how many plugins it compiled.
fn compiled(cache: &Path) -> (usize, String) {
    let settings = [
        ("STRAIT__WORKERS__ENABLED", "true"),
        ("STRAIT__ENGINE__CACHE", cache.to_str().unwrap()),
    ];
    let host = Served::with(&[], &settings);
    let mut client = host.greeted();
    put(&mut client, "x", 1000);
    check_call(&mut client, json!("x"), &ramp(1000));
    let log = host.log();
    (log.matches("a plugin was compiled").count(), log)
}

fn artifacts(cache: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(cache).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn a_plugin_is_compiled_once_and_a_false_artifact_is_not_believed() {
    let directory = TempDir::new().unwrap();
    let cache = directory.path().join("cache");
    assert_eq!(compiled(&cache).0, 1, "nothing was kept yet");
    let (again, log) = compiled(&cache);
    assert_eq!(again, 0, "{log}");
    let kept = artifacts(&cache);
    assert_eq!(kept.len(), 1, "{kept:?}");
    let whole = fs::read(&kept[0]).unwrap();
    for (what, bytes) in [
        ("nothing", Vec::new()),
        ("noise", vec![7; 5000]),
        ("a half", whole[..whole.len() / 2].to_vec()),
    ] {
        fs::write(&kept[0], bytes).unwrap();
        let (anew, log) = compiled(&cache);
        assert_eq!(anew, 1, "{what}: {log}");
        assert!(log.contains("is compiled anew"), "{what}: {log}");
        assert_eq!(fs::read(&kept[0]).unwrap(), whole, "{what} was replaced");
    }
    // Others could have written it.
    fs::set_permissions(&kept[0], fs::Permissions::from_mode(0o666)).unwrap();
    assert_eq!(compiled(&cache).0, 1);
}
