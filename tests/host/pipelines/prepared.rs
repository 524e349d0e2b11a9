//! Pipelines that are prepared once and called again and again.

use serde_json::json;
use strait_client::wire::{self, Op};

use super::{SHIFTS, shifted};
use crate::guest;
use crate::prepared::{Prepared, brought, floats};
use crate::served::{Served, number, put, ramp};

#[test]
fn each_call_goes_through_all_stages() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    let mut watcher = host.greeted();
    client.ok(
        Op::Pipelines,
        json!({"publish": {"name": "shifts", "kernel": SHIFTS}}),
    );
    for kernel in [SHIFTS, "shifts"] {
        let asked = json!({"kernel": kernel, "inputs": {"x": brought(100)}});
        let prepared = Prepared::by(&mut client, asked);
        // Each fills as many bytes of the payload as the largest.
        for count in [100, 97, 99, 100, 98] {
            let x = ramp(count);
            assert_eq!(prepared.call(&x), shifted(&x), "{kernel}: {count}");
        }
        let late = prepared.ask(&[0; 64]);
        late.refused("INVALID_ARGUMENT", "BAD_FRAME");
    }
    client.ok(Op::Pipelines, json!({"drop": "shifts"}));
    drop(client);
    let after = host.settled(&mut watcher);
    for nothing in ["/segments", "/leases", "/account/names", "/account/bytes"] {
        assert_eq!(number(&after, nothing), 0, "{nothing} {after}");
    }
}

#[test]
fn a_graph_has_inputs_that_stay_and_outputs_of_several_stages() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    put(&mut client, "taps", 2);
    let text = "low: clip(hi=2) | f: filter-finite | fir -> low: low, smooth: .y";
    let asked = json!({"kernel": text, "inputs": {"x": brought(8), "taps": "taps"}});
    let prepared = Prepared::by(&mut client, asked);
    for x in [
        vec![1.0, f64::NAN, 2.0, 3.0, f64::INFINITY],
        vec![1.0; 8],
        vec![f64::NAN; 2],
    ] {
        let reply = prepared.ask(&prepared.payload(&x));
        assert_eq!(reply.op(), Op::Ok, "{}", reply.text);
        let low: Vec<f64> = x.iter().map(|x| x.clamp(f64::NEG_INFINITY, 2.0)).collect();
        let kept: Vec<f64> = low.iter().copied().filter(|x| x.is_finite()).collect();
        let taps = ramp(2);
        let smooth: Vec<f64> = (0..kept.len())
            .map(|i| kept[i] * taps[0] + if i > 0 { kept[i - 1] * taps[1] } else { 0.0 })
            .collect();
        let shapes: Vec<_> = reply.payload[..128]
            .chunks_exact(64)
            .map(|sizes| wire::shape(sizes, 1).unwrap()[0])
            .collect();
        assert_eq!(shapes, [low.len() as u64, kept.len() as u64]);
        let first = floats(&reply.payload[128..128 + 8 * low.len()]);
        assert!(
            first
                .iter()
                .zip(&low)
                .all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan())
        );
        assert_eq!(floats(&reply.payload[192..192 + 8 * kept.len()]), smooth);
        let dropped = (x.len() - kept.len()).to_string();
        assert_eq!(
            reply.body()["notes"],
            json!([{"key": "f.dropped", "text": dropped}])
        );
    }
}

#[test]
fn what_fails_is_told_by_its_stage() {
    let text = std::fs::read_to_string("tests/guests/traps.wat").unwrap();
    let host = Served::with_plugin(&guest::component("traps", &text), &[]);
    let mut client = host.greeted();
    let asked = |kernel: &str| json!({"kernel": kernel, "inputs": {"x": brought(4)}});
    let prepared = Prepared::by(&mut client, asked("clip | traps/k | clip"));
    for _ in 0..3 {
        let reply = prepared.ask(&prepared.payload(&ramp(4)));
        let message = reply.refused("INTERNAL", "GUEST_TRAP");
        assert!(
            message.starts_with("stage 2 (`k`): kernel `k` trapped"),
            "{message}"
        );
        assert_eq!(number(&reply.body(), "/details/stage"), 2);
    }
    for (kernel, reason, says) in [
        ("clip | cast", "MISSING_PARAMETER", "stage 2 (`cast`)"),
        (
            "clip | cast(to=complex64) | clip",
            "BAD_INPUT",
            "stage 3 (`clip`)",
        ),
        ("clip | fir", "MISSING_INPUT", "needs input `taps`"),
    ] {
        let message = client
            .ask(Op::Prepare, asked(kernel))
            .refused("INVALID_ARGUMENT", reason);
        assert!(message.contains(says), "{message}");
    }
}
