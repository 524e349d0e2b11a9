//! `strait doctor` by the real binary: what it finds here, under limits, and in places that do not do.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

/// A shell that runs `before` and becomes `strait doctor`, without what this machine's environment
/// would tell it.
fn doctor(place: &Path, before: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new("sh");
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("STRAIT_")) {
        command.env_remove(name);
    }
    command
        .arg("-c")
        .arg(format!("{before}; exec \"$0\" doctor \"$@\""))
        .arg(env!("CARGO_BIN_EXE_strait"))
        .args(arguments)
        .current_dir(place)
        .env_remove("RUNTIME_DIRECTORY")
        .env("XDG_RUNTIME_DIR", place)
        .env("XDG_CACHE_HOME", place.join("cache"))
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn stdout(output: &Output) -> String {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!error.contains("panicked"), "{error}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Its JSON object, after it ended with `exit`.
fn json(place: &Path, before: &str, arguments: &[&str], exit: i32) -> Value {
    let output = doctor(place, before, &[arguments, &["--json"]].concat());
    let text = stdout(&output);
    assert_eq!(
        output.status.code(),
        Some(exit),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_str(&text).unwrap()
}

fn check<'a>(report: &'a Value, name: &str) -> &'a Value {
    let checks = report["checks"].as_array().unwrap();
    let found = checks.iter().find(|check| check["name"] == name);
    found.unwrap_or_else(|| panic!("no check {name:?} in {report}"))
}

fn is(report: &Value, name: &str, status: &str, part: &str) {
    let check = check(report, name);
    assert_eq!(check["status"], status, "{check}");
    assert!(check.to_string().contains(part), "{check} lacks {part:?}");
}

#[test]
fn a_machine_that_runs_these_tests_can_run_a_host() {
    let place = TempDir::new().unwrap();
    let users = match rustix::process::geteuid().is_root() {
        true => {
            // Root's workers are to be nobody else's.
            let report = json(place.path(), ":", &[], 0);
            is(&report, "worker walls", "warn", "workers.uids");
            "export STRAIT__WORKERS__UIDS=300000-300063"
        }
        false => ":",
    };
    let report = json(place.path(), users, &[], 0);
    for name in [
        "seals",
        "future-write seal",
        "descriptor passing",
        "moves",
        "guest addresses",
        "executable memory",
        "worker walls",
        "runtime directory",
        "cache",
    ] {
        is(&report, name, "ok", "");
    }
    // It looked, and made nothing.
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);
    is(&report, "host", "info", "none in");
}

#[test]
fn the_json_has_the_form_of_the_documentation() {
    let place = TempDir::new().unwrap();
    let report = json(place.path(), ":", &[], 0);
    assert_eq!(report["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(report["uid"], rustix::process::geteuid().as_raw());
    assert!(report["kernel"].as_str().unwrap().contains('.'), "{report}");
    let checks = report["checks"].as_array().unwrap();
    assert!(checks.len() > 25, "{report}");
    for check in checks {
        let text = |key: &str| {
            check[key]
                .as_str()
                .unwrap_or_else(|| panic!("{key}: {check}"))
        };
        let groups = ["linux", "limits", "cpu", "users", "places", "speed"];
        assert!(groups.contains(&text("group")), "{check}");
        assert!(!text("found").is_empty() && !text("why").is_empty() && !text("name").is_empty());
        let asks = match text("status") {
            "ok" | "info" => false,
            "warn" | "fail" => true,
            other => panic!("{other}: {check}"),
        };
        assert_eq!(check["change"].is_string(), asks, "{check}");
        assert_eq!(check["change"].is_null(), !asks, "{check}");
    }
    let warned = checks.iter().any(|check| check["status"] == "warn");
    assert_eq!(report["status"], if warned { "warn" } else { "ok" });

    let rows = report["copy_and_move"].as_array().unwrap();
    let sizes: Vec<u64> = rows
        .iter()
        .map(|row| row["bytes"].as_u64().unwrap())
        .collect();
    assert_eq!(sizes, (16..24).map(|bits| 1 << bits).collect::<Vec<u64>>());
    for row in rows {
        for key in ["copy_us", "move_us"] {
            assert!(row[key].as_f64().unwrap() > 0.0, "{row}");
        }
    }
    is(
        &report,
        "copy or move",
        check(&report, "copy or move")["status"].as_str().unwrap(),
        "512.00 KiB",
    );
}

#[test]
fn a_person_gets_lines_without_colours_or_a_bar_in_a_pipe() {
    let place = TempDir::new().unwrap();
    let output = doctor(place.path(), "ulimit -n 64", &[]);
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(
        output.stderr.is_empty(),
        "{:?}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(!text.contains('\u{1b}'), "{text:?}");
    for part in [
        "\nlinux\n",
        "\nlimits\n",
        "\ncpu\n",
        "\nusers\n",
        "\nplaces\n",
        "\nspeed\n",
        "  warn  open files",
        "soft 64, hard 64: 32 segments",
        "        change: ulimit -Hn 65536",
        "\na host can run here; ",
    ] {
        assert!(text.contains(part), "{text}\nlacks {part:?}");
    }
    let reasons = |text: &str| text.matches("        why:    ").count();
    let more = stdout(&doctor(place.path(), ":", &["--why"]));
    assert!(
        reasons(&more) > 25 && reasons(&text) < reasons(&more),
        "{more}"
    );
}

#[test]
fn limits_are_judged_by_what_a_host_needs() {
    let place = TempDir::new().unwrap();
    let report = json(place.path(), "ulimit -n 64", &[], 0);
    is(&report, "open files", "warn", "LimitNOFILE=65536");
    assert_eq!(report["status"], "warn");

    let report = json(place.path(), "ulimit -n 24", &[], 6);
    is(&report, "open files", "fail", "hard 24");
    assert_eq!(report["status"], "fail");

    let report = json(place.path(), "ulimit -v 3000000", &[], 6);
    is(&report, "guest addresses", "fail", "ulimit -v unlimited");
    is(&report, "address space", "warn", "LimitAS");
    is(&report, "moves", "ok", "");
}

#[test]
fn a_limit_of_file_sizes_is_told_and_not_run_into() {
    let place = TempDir::new().unwrap();
    // Blocks of 512 bytes: 1 MiB. A memfd beyond it would end the process by SIGXFSZ.
    let report = json(place.path(), "ulimit -f 2048", &[], 6);
    is(&report, "file size", "fail", "ulimit -f unlimited");
    assert_eq!(report["copy_and_move"], Value::Array(Vec::new()));
}

#[test]
fn a_failure_says_on_stderr_what_failed_and_on_stdout_only_the_report() {
    let place = TempDir::new().unwrap();
    let output = doctor(place.path(), "ulimit -n 24", &[]);
    assert_eq!(output.status.code(), Some(6));
    let error = String::from_utf8(output.stderr.clone()).unwrap();
    assert!(
        error.starts_with("strait: a host cannot run here: open files;") && error.contains("UNFIT"),
        "{error}"
    );
    assert!(stdout(&output).contains("  fail  open files"));
    let output = doctor(place.path(), "ulimit -n 24", &["--json"]);
    assert_eq!(stdout(&output).lines().count(), 1);
}

#[test]
fn a_directory_that_serve_would_refuse_is_a_failure() {
    let place = TempDir::new().unwrap();
    let open = place.path().join("open");
    fs::create_dir(&open).unwrap();
    fs::set_permissions(&open, fs::Permissions::from_mode(0o755)).unwrap();
    let report = json(place.path(), ":", &["--directory", "open"], 6);
    is(&report, "runtime directory", "fail", "chmod 700");

    fs::write(place.path().join("file"), "").unwrap();
    let report = json(place.path(), ":", &["--directory", "file"], 6);
    is(&report, "runtime directory", "fail", "not a directory");

    let long = "d".repeat(100);
    let report = json(place.path(), ":", &["--directory", &long], 6);
    is(&report, "runtime directory", "fail", "take a shorter one");
    assert!(!place.path().join(long).exists());
}

#[test]
fn a_cache_that_others_can_write_to_is_a_warning() {
    let place = TempDir::new().unwrap();
    let cache = place.path().join("cache/strait");
    fs::create_dir_all(&cache).unwrap();
    fs::set_permissions(&cache, fs::Permissions::from_mode(0o777)).unwrap();
    let report = json(place.path(), ":", &[], 0);
    is(&report, "cache", "warn", "0777");
}

#[test]
fn settings_are_those_of_the_host_that_is_to_run() {
    let place = TempDir::new().unwrap();
    let file = place.path().join("strait.toml");
    fs::write(
        &file,
        "[server]\ndirectory = \"elsewhere\"\n[engine]\nmove_min_bytes = 1073741824\n[memory]\nsegments = 19999999\n",
    )
    .unwrap();
    let report = json(
        place.path(),
        "ulimit -n 8192",
        &["--config", "strait.toml"],
        0,
    );
    is(&report, "copy or move", "warn", "1.00 GiB");
    is(&report, "open files", "warn", "memory.segments = 4096");
    is(&report, "runtime directory", "ok", "/elsewhere");

    fs::write(&file, "[engine]\nno_such = 1\n").unwrap();
    let output = doctor(place.path(), ":", &["--config", "strait.toml"]);
    assert_eq!(output.status.code(), Some(3), "{}", stdout(&output));
}

#[test]
fn a_host_that_runs_is_found() {
    let place = TempDir::new().unwrap();
    let mut host = Command::new(env!("CARGO_BIN_EXE_strait"))
        .args(["serve", "--directory", "strait", "--until-stdin-ends"])
        .current_dir(place.path())
        .env(
            "XDG_CACHE_HOME",
            concat!(env!("CARGO_TARGET_TMPDIR"), "/cache"),
        )
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut ready = String::new();
    let mut lines = std::io::BufReader::new(host.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut lines, &mut ready).unwrap();
    // As a client's environment leads there: $XDG_RUNTIME_DIR/strait.
    let report = json(place.path(), ":", &[], 0);
    let other = json(place.path(), ":", &["--directory", "another"], 0);
    drop(host.stdin.take());
    assert!(host.wait().unwrap().success());
    let version = format!("strait {} answers", env!("CARGO_PKG_VERSION"));
    is(&report, "host", "ok", &version);
    is(&report, "where clients look", "ok", "/strait");
    is(
        &other,
        "where clients look",
        "warn",
        "STRAIT_ADDRESS=unix://",
    );
}
