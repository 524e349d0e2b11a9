//! Plugins that cost too much before they are loaded: their own processes end, and others are served meanwhile.
//! (With kernels in workers, whatever `STRAIT_TEST_WORKERS` says.)

use std::fmt::Write;
use std::thread;

use serde_json::json;
use strait::config::Config;
use strait::error::{Code, Status};

use crate::support::{Rig, guest};

/// One function of so many steps that compiling it takes many seconds, and hundreds of megabytes.
fn bomb() -> Vec<u8> {
    let mut text =
        String::from("(func $run (param i32) (result i32) (local $a i32) (local $b i32)\n");
    for step in 0..200_000 {
        let _ = writeln!(
            text,
            "(local.set $a (i32.add (local.get $b) (i32.mul (local.get $a) (i32.const {step}))))(local.set $b (i32.xor (local.get $a) (i32.const {step})))"
        );
    }
    text.push_str("(i32.store (i32.const 600) (local.get $b)) i32.const 0)");
    guest::component("bomb", &text)
}

fn rig(change: impl FnOnce(&mut Config)) -> Rig {
    Rig::with(|config| {
        config.workers.enabled = true;
        change(config);
    })
}

/// The standard plugin is in the cache from here on: small limits are not about it.
fn warm() {
    drop(rig(|_| {}));
}

fn refused(rig: &Rig, plugin: &[u8], words: &[&str]) {
    let loads = |plugin| rig.host.own_caller().load_plugin(plugin).map(drop);
    let status: Status = loads(plugin).expect_err("it is refused");
    assert_eq!(
        (status.code, status.reason.name()),
        (Code::InvalidArgument, "BAD_PLUGIN"),
        "{status}"
    );
    for word in words {
        assert!(status.message.contains(word), "{word:?} in {status}");
    }
}

fn served(rig: &Rig) {
    let call =
        json!({"kernel": "scale-shift", "inputs": {"x": "x"}, "parameters": {"a": 2.0, "b": 1.0}});
    rig.invoke(call).expect("others are served");
}

/// `plugin` is refused with `words`, which takes its time, in which others are served.
fn refused_while_others_are_served(rig: &Rig, plugin: &[u8], words: &[&str]) {
    rig.put_f64("x", &[1.0; 100]);
    served(rig);
    thread::scope(|scope| {
        let loading = scope.spawn(|| refused(rig, plugin, words));
        loop {
            // At least once, and for as long as it takes.
            served(rig);
            if loading.is_finished() {
                break;
            }
        }
        loading.join().expect("no panic");
    });
    served(rig);
}

#[test]
fn what_takes_long_to_compile_is_refused() {
    warm();
    let rig = rig(|config| config.workers.compile_ms = 1000);
    let words = [
        "compiling the plugin took more than 1 s",
        "workers.compile_ms",
    ];
    refused_while_others_are_served(&rig, &bomb(), &words);
}

#[test]
fn what_takes_much_to_compile_is_refused() {
    warm();
    let rig = rig(|config| config.workers.compile_bytes = 160 << 20);
    let words = [
        "memory or stack",
        "167772160 bytes",
        "workers.compile_bytes",
    ];
    refused_while_others_are_served(&rig, &bomb(), &words);
}

#[test]
fn a_description_without_end_is_killed_where_nothing_checks() {
    let rig = rig(|config| config.engine.epoch_interruption = false);
    let spins = guest::component(
        "spins",
        "(func $describe (result i32) (loop $l (br $l)) unreachable)",
    );
    refused_while_others_are_served(&rig, &spins, &["`describe`", "deadline"]);
}

#[test]
fn a_description_that_wants_all_memory_meets_the_limit() {
    let rig = rig(|_| {});
    let text =
        "(func $describe (result i32) (drop (memory.grow (i32.const 30000))) i32.const 1024)";
    refused_while_others_are_served(&rig, &guest::component("wants", text), &["`describe`"]);
}

#[test]
fn a_load_waits_for_a_turn_no_longer_than_its_limit() {
    warm();
    let rig = rig(|config| {
        config.workers.compilers = 1;
        config.workers.compile_ms = 1000;
        config.engine.epoch_interruption = true;
    });
    let (bomb, small) = (bomb(), guest::component("copies", ""));
    thread::scope(|scope| {
        let bombs = [&bomb, &bomb]
            .map(|bomb| scope.spawn(|| rig.host.own_caller().load_plugin(bomb).map(drop)));
        for bomb in bombs {
            let status = bomb.join().expect("no panic").expect_err("it is refused");
            let words = ["took more than 1 s", "others were for 2 s"];
            assert!(
                words.iter().any(|word| status.message.contains(word)),
                "{status}"
            );
        }
    });
    // The turns were given back.
    let _ = rig.host.own_caller().load_plugin(&small);
    rig.put_f64("x", &[1.0; 100]);
    served(&rig);
}
