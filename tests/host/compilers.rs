//! Compiled plugins on disk, where plugins are compiled in processes of their own.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;
use tempfile::TempDir;

use crate::served::{PATIENCE, Served, check_call, put, ramp};

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

#[test]
fn a_compiler_that_lets_go_of_the_host_and_lives_on_is_not_waited_for() {
    let directory = TempDir::new().unwrap();
    // `/bin/sh worker OPTIONS`, in this directory.
    let script = "exec 0<&-\nexec /bin/sleep 600\n";
    fs::write(directory.path().join("worker"), script).unwrap();
    let mut host = Command::new(env!("CARGO_BIN_EXE_strait"))
        .args(["serve", "--directory", "host"])
        .current_dir(directory.path())
        .env("STRAIT__ENGINE__CACHE", directory.path().join("cache"))
        .env("STRAIT__WORKERS__ENABLED", "true")
        .env("STRAIT__WORKERS__PROGRAM", "/bin/sh")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let begin = Instant::now();
    while host.try_wait().unwrap().is_none() && begin.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(20));
    }
    // It may have ended.
    let _ = host.kill();
    let output = host.wait_with_output().unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{log}");
    assert!(log.contains("did not end"), "{log}");
}
