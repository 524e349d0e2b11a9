//! Keys, deadlines and cancels of calls that wait for a worker or for each other: each caller is
//! answered once, in its time, by the outcome of its own request.

use std::sync::{Arc, mpsc};
use std::time::Duration;

use serde_json::{Value, json};
use strait::error::Status;
use strait::session::{Call, Invoked};

use crate::support::{Rig, bytes_of, f64s, guest};

/// Long enough for a loaded machine; nothing here waits for it unless it fails.
const PATIENCE: Duration = Duration::from_secs(60);

type Waiting = (Call, mpsc::Receiver<Result<Arc<Invoked>, Status>>);

/// A host with the kernels `spins/k` and `works/k`, which takes as long as its first element says,
/// in about a tenth of a millisecond.
fn rig(workers: usize, queue_len: usize) -> Rig {
    let rig = Rig::with(|config| {
        config.engine.workers = Some(workers);
        config.engine.queue_len = queue_len;
    });
    let spins = std::fs::read_to_string("tests/guests/spins.wat").unwrap();
    let works = "(func $run (param i32) (result i32) (local $left i64)
          (local.set $left (i64.mul (i64.const 100000) (i64.trunc_f64_s (f64.load (i32.wrap_i64 (global.get $x))))))
          (loop $on (local.set $left (i64.sub (local.get $left) (i64.const 1)))
            (br_if $on (i64.gt_s (local.get $left) (i64.const 0))))
          (memory.copy (i32.wrap_i64 (global.get $y)) (i32.wrap_i64 (global.get $x)) (i32.wrap_i64 (global.get $bytes)))
          i32.const 0)";
    for (name, text) in [("spins", spins.as_str()), ("works", works)] {
        rig.host
            .own_caller()
            .load_plugin(&guest::component(name, text))
            .unwrap();
    }
    rig.put_f64("x", &[1.0, 7.0]);
    rig
}

fn spin(key: Option<&str>, deadline_ms: u64) -> Value {
    let mut call = json!({"kernel": "spins/k", "inputs": {"x": "x"}, "deadline_ms": deadline_ms});
    if let Some(key) = key {
        call["idempotency_key"] = key.into();
    }
    call
}

fn reason((_, answer): &Waiting) -> &'static str {
    match answer.recv_timeout(PATIENCE).expect("an answer") {
        Ok(_) => "OK",
        Err(status) => status.reason.name(),
    }
}

fn waits((_, answer): &Waiting) -> bool {
    matches!(answer.try_recv(), Err(mpsc::TryRecvError::Empty))
}

#[test]
fn a_key_belongs_to_one_request() {
    let rig = rig(2, 10);
    rig.put_f64("z", &[1.0, 8.0]);
    let first = json!({"kernel": "scale-shift", "inputs": {"x": "x"}, "parameters": {"a": 2}, "idempotency_key": "k"});
    let done = rig.invoke(first.clone()).unwrap();
    let again = rig.invoke(first.clone()).unwrap();
    assert!(Arc::ptr_eq(
        done.results[0].segment().unwrap(),
        again.results[0].segment().unwrap()
    ));
    for (field, value) in [
        ("kernel", json!("clip")),
        ("inputs", json!({"x": "z"})),
        ("parameters", json!({"a": 3})),
        ("parameters", json!({"a": 2.0})),
        ("publish", json!({"y": "y"})),
        ("seal", json!(true)),
        ("limits", json!({"log_bytes": 1})),
    ] {
        let mut other = first.clone();
        other[field] = value;
        let status = rig.invoke(other).unwrap_err();
        assert_eq!(status.reason, "IDEMPOTENCY_KEY_REUSED", "{field}: {status}");
        assert!(status.message.contains(field), "{status}");
    }
    // How long one waits and how one gets it is not the request.
    for (field, value) in [
        ("deadline_ms", json!(1000)),
        ("map", json!(false)),
        ("lease_ms", json!(5)),
    ] {
        let mut same = first.clone();
        same[field] = value;
        let same = rig.invoke(same).unwrap();
        assert!(
            Arc::ptr_eq(
                done.results[0].segment().unwrap(),
                same.results[0].segment().unwrap()
            ),
            "{field}"
        );
    }
    rig.put_f64("x", &[1.0, 9.0]);
    assert_eq!(
        rig.invoke(first.clone()).unwrap_err().reason.name(),
        "IDEMPOTENCY_KEY_REUSED"
    );
    // A name that is gone is no other tensor.
    rig.me().drop_flight("x").unwrap();
    assert!(rig.invoke(first).is_ok());
}

#[test]
fn those_who_share_a_run_leave_it_one_by_one() {
    let rig = rig(1, 10);
    let first = rig.start(spin(Some("k"), 60_000));
    let second = rig.start(spin(Some("k"), 60_000));
    let late = rig.start(spin(Some("k"), 30));
    assert_eq!(reason(&late), "DEADLINE");
    first.0.cancel();
    assert_eq!(reason(&first), "CANCELLED");
    assert!(waits(&second), "its run goes on without the first");
    assert_eq!(
        rig.invoke(spin(Some("k"), 20)).unwrap_err().reason.name(),
        "DEADLINE"
    );
    second.0.cancel();
    assert_eq!(reason(&second), "CANCELLED");
    // Nothing is kept of a failure, and nothing holds the only worker.
    let other = json!({"kernel": "works/k", "inputs": {"x": "x"}, "idempotency_key": "k"});
    assert_eq!(
        f64s(&bytes_of(
            rig.invoke(other).unwrap().results[0].segment().unwrap()
        )),
        [1.0, 7.0]
    );
}

#[test]
fn the_firsts_deadline_is_its_own() {
    let rig = rig(1, 10);
    let busy = rig.start(spin(None, 60_000));
    let call = |deadline_ms: u64| json!({"kernel": "works/k", "inputs": {"x": "x"}, "idempotency_key": "k", "deadline_ms": deadline_ms});
    let first = rig.start(call(20));
    let second = rig.start(call(60_000));
    assert_eq!(reason(&first), "DEADLINE");
    assert!(waits(&second));
    busy.0.cancel();
    assert_eq!(reason(&second), "OK");
    assert_eq!(reason(&busy), "CANCELLED");
}

#[test]
fn deadlines_and_cancels_count_in_the_queue() {
    let rig = rig(1, 2);
    assert_eq!(rig.invoke(spin(None, 0)).unwrap_err().reason, "BAD_LIMIT");
    let busy = rig.start(spin(None, 60_000));
    while rig.stats()["running"] != 1 {
        std::thread::yield_now();
    }
    let cancelled = rig.start(spin(Some("k"), 60_000));
    let other = rig.start(spin(None, 60_000));
    assert_eq!(reason(&rig.start(spin(None, 1000))), "BUDGET_EXCEEDED");
    let joined = rig.start(spin(Some("k"), 60_000));
    other.0.cancel();
    assert_eq!(reason(&other), "CANCELLED");
    let late = rig.start(spin(None, 20));
    assert_eq!(reason(&late), "DEADLINE");
    cancelled.0.cancel();
    assert_eq!(reason(&cancelled), "CANCELLED");
    assert!(waits(&joined) && waits(&busy));
    joined.0.cancel();
    assert_eq!(reason(&joined), "CANCELLED");
    // Their places are free again while the worker is still busy.
    let places = [rig.start(spin(None, 60_000)), rig.start(spin(None, 60_000))];
    assert!(places.iter().all(waits));
    places.iter().for_each(|(call, _)| call.cancel());
    assert!(places.iter().all(|waiting| reason(waiting) == "CANCELLED"));
    busy.0.cancel();
    assert_eq!(reason(&busy), "CANCELLED");
}

#[test]
fn a_storm_of_calls_is_answered_call_by_call() {
    let rig = rig(2, 6);
    let lengths = [0.0, 1.0, 5.0, 20.0, 80.0];
    for (index, length) in lengths.iter().enumerate() {
        rig.put_f64(&format!("x{index}"), &[*length, index as f64]);
    }
    std::thread::scope(|scope| {
        for thread in 1..=3_u64 {
            let rig = &rig;
            scope.spawn(move || {
                let mut drawn = thread.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                let mut below = |end: u64| {
                    drawn ^= drawn << 13;
                    drawn ^= drawn >> 7;
                    drawn ^= drawn << 17;
                    drawn % end
                };
                let mut under_way = Vec::new();
                for _ in 0..400 {
                    let input = below(lengths.len() as u64);
                    let mut call = json!({"kernel": "works/k", "inputs": {"x": format!("x{input}")}, "deadline_ms": 1 + below(40)});
                    if below(4) > 0 {
                        call["idempotency_key"] = format!("{input}-{}", below(3)).into();
                    }
                    let waiting = rig.start(call);
                    if below(3) == 0 {
                        std::thread::sleep(Duration::from_micros(below(2000)));
                        waiting.0.cancel();
                    }
                    under_way.push((input, waiting));
                    if under_way.len() > 4 {
                        let (input, (_call, answer)) = under_way.swap_remove(usize::try_from(below(5)).unwrap());
                        match answer.recv_timeout(PATIENCE).expect("an answer") {
                            Ok(done) => assert_eq!(f64s(&bytes_of(done.results[0].segment().unwrap()))[1], input as f64),
                            Err(status) => assert!(
                                ["CANCELLED", "DEADLINE", "BUDGET_EXCEEDED"].contains(&status.reason.name()),
                                "thread {thread}: {status}"
                            ),
                        }
                        assert_eq!(answer.recv().err(), Some(mpsc::RecvError), "answered twice");
                    }
                }
                for (_, waiting) in under_way {
                    reason(&waiting);
                }
            });
        }
    });
    // Nothing runs on for nobody.
    while rig.stats()["running"] != 0 {
        std::thread::yield_now();
    }
}
