//! What a call finds in the guest's memory, whatever the ones before it did and however large they were.

use serde_json::json;
use strait_client::wire::{self, Op};

use super::{Prepared, brought, bytes, scale_shift, shifted};
use crate::guest;
use crate::served::{Served, number, ramp};

/// What a call does is its first element. Its output: how often it was here by a word of its first page, by the last
/// word of its second, and by one in the room where tensors are; the size of its memory; the last word of that.
pub(super) const REMEMBERS: &str = "
(func $more (param $at i32) (result f64)
  (i32.store (local.get $at) (i32.add (i32.load (local.get $at)) (i32.const 1)))
  (f64.convert_i32_u (i32.load (local.get $at))))
(func $run (param i32) (result i32)
  (local $x i32) (local $y i32) (local $what f64)
  (local.set $x (i32.wrap_i64 (global.get $x)))
  (local.set $y (i32.wrap_i64 (global.get $y)))
  (local.set $what (f64.load (local.get $x)))
  (if (f64.eq (local.get $what) (f64.const 1)) (then (return (i32.const 0))))
  (if (f64.eq (local.get $what) (f64.const 2)) (then unreachable))
  (if (f64.eq (local.get $what) (f64.const 3)) (then (loop $on (br $on))))
  (if (f64.eq (local.get $what) (f64.const 4)) (then (drop (memory.grow (i32.const 1)))))
  (f64.store (local.get $y) (call $more (i32.const 3000)))
  (f64.store offset=8 (local.get $y) (call $more (i32.const 131000)))
  (f64.store offset=16 (local.get $y) (call $more (i32.add (i32.wrap_i64 (global.get $in)) (i32.const 4000))))
  (f64.store offset=24 (local.get $y) (f64.convert_i32_u (memory.size)))
  (f64.store offset=32 (local.get $y) (call $more (i32.sub (i32.mul (memory.size) (i32.const 65536)) (i32.const 4))))
  i32.const 0)";
pub(super) const COUNTS: f64 = 0.0;
const WRITES_NOTHING: f64 = 1.0;
const TRAPS: f64 = 2.0;
pub(super) const SPINS: f64 = 3.0;
const GROWS: f64 = 4.0;

/// Elements of [`REMEMBERS`]' tensors: few that are taken back page by page, and more that are overwritten.
const SIZES: [u64; 2] = [8, 4000];

#[test]
fn each_call_finds_the_memory_that_bind_left() {
    // One whose globals are in its memory is brought back to that, the other is made anew.
    let plugins = [
        guest::component_without_globals("kept", REMEMBERS),
        guest::component("anew", REMEMBERS),
    ];
    let host = Served::with_plugins(&plugins, &[]);
    let mut client = host.greeted();
    for (plugin, count) in ["kept", "anew"]
        .into_iter()
        .flat_map(|p| SIZES.map(|n| (p, n)))
    {
        let request = json!({"kernel": format!("{plugin}/k"), "inputs": {"x": brought(count)},
            "deadline_ms": 300});
        let prepared = Prepared::by(&mut client, request);
        let x = |what: f64| {
            let mut x = vec![0.0; usize::try_from(count).unwrap()];
            x[0] = what;
            // Whatever a call leaves in its output's place, the next does not find it there.
            x[5] = 77.0;
            x
        };
        let mut pages = None;
        let order = [
            COUNTS,
            COUNTS,
            WRITES_NOTHING,
            COUNTS,
            TRAPS,
            COUNTS,
            WRITES_NOTHING,
            GROWS,
            COUNTS,
            SPINS,
            WRITES_NOTHING,
            COUNTS,
            COUNTS,
        ];
        for (step, what) in order.into_iter().enumerate() {
            let reply = prepared.ask(&prepared.payload(&x(what)));
            let told = format!("{plugin} {count} step {step}");
            if what == TRAPS {
                reply.refused("INTERNAL", "GUEST_TRAP");
            } else if what == SPINS {
                reply.refused("DEADLINE_EXCEEDED", "DEADLINE");
            } else {
                let y = prepared.output(&reply);
                let (head, rest) = y.split_at(5);
                assert!(rest.iter().all(|y| *y == 0.0), "{told}: {rest:?}");
                if what == WRITES_NOTHING {
                    assert_eq!(head, [0.0; 5], "{told}");
                } else {
                    let first = *pages.get_or_insert(head[3]);
                    let pages = if what == GROWS { first + 1.0 } else { first };
                    assert_eq!(head, [1.0, 1.0, 1.0, pages, 1.0], "{told}");
                }
            }
        }
    }
}

#[test]
fn a_call_may_bring_less_than_was_prepared() {
    let plugin = guest::component_without_globals("kept", REMEMBERS);
    let host = Served::with_plugin(&plugin, &[]);
    let mut client = host.greeted();
    for most in [40, 4000] {
        let request = json!({"kernel": "kept/k", "inputs": {"x": brought(most)}});
        let counts = Prepared::by(&mut client, request);
        let shifts = Prepared::by(&mut client, scale_shift(brought(most)));
        let mut pages = None;
        for count in [most, 5, most, 6, 39, 1, 0, most - 1, 8, most] {
            let x = ramp(count);
            let payload = |prepared: &Prepared, x: &[f64]| {
                let mut payload = wire::sizes(&[count]).to_vec();
                payload.extend(bytes(x));
                payload.resize(
                    usize::try_from(number(&prepared.told, "/request_bytes")).unwrap(),
                    // What lies behind the tensor is not looked at.
                    0xaa,
                );
                payload
            };
            let y = shifts.output(&shifts.ask(&payload(&shifts, &x)));
            assert_eq!(y, shifted(&x), "{most} {count}");
            if count >= 5 {
                let zeros = vec![0.0; usize::try_from(count).unwrap()];
                let y = counts.output(&counts.ask(&payload(&counts, &zeros)));
                let pages = *pages.get_or_insert(y[3]);
                assert_eq!(y[..5], [1.0, 1.0, 1.0, pages, 1.0], "{most} {count}");
                assert!(y[5..].iter().all(|y| *y == 0.0), "{most} {count}");
            }
        }
    }
    // Two axes, and a signature that both inputs must fit.
    let zscore = json!({"kernel": "zscore", "inputs": {"x": {"dtype": "float64", "shape": [6, 4]}},
        "parameters": {"axis": 0}});
    let prepared = Prepared::by(&mut client, zscore);
    for shape in [[6, 4], [3, 4], [6, 2], [2, 3], [0, 4], [6, 0]] {
        let count = shape[0] * shape[1];
        let mut payload = wire::sizes(&shape).to_vec();
        payload.extend(bytes(&ramp(count)));
        payload.resize(64 + 6 * 4 * 8, 0);
        let reply = prepared.ask(&payload);
        assert_eq!(reply.op(), Op::Ok, "{shape:?} {}", reply.text);
        assert_eq!(wire::shape(&reply.payload[..64], 2), Some(shape.to_vec()));
        // As one that was prepared for just that.
        let request = json!({"kernel": "zscore", "inputs": {"x": {"dtype": "float64", "shape": shape}},
            "parameters": {"axis": 0}});
        let own = Prepared::by(&mut client, request);
        payload.truncate(usize::try_from(number(&own.told, "/request_bytes")).unwrap());
        let bytes = 8 * usize::try_from(count).unwrap();
        assert_eq!(
            reply.payload[64..64 + bytes],
            own.ask(&payload).payload[64..64 + bytes],
            "{shape:?}"
        );
    }
}
