//! Results: their sizes, who may use them, and when their memory is recycled.

use serde_json::json;
use strait::error::{Code, Status};
use strait::session::Caller;
use strait_client::wire;
use strait_memory::{Copied, InputSource};
use strait_tensor::{Column, Dtype, FileLayout};

use super::{MB, values};
use crate::support::{Rig, bytes_of, f64s, guest};

#[test]
fn a_result_in_use_is_not_recycled() {
    let rig = Rig::new();
    rig.put_f64("x", &values(MB / 8));
    let first = rig.scale_shift("x", 1.0, 0.0);
    let held = bytes_of(first.results[0].segment().unwrap());
    let second = rig.scale_shift("x", 5.0, 0.0);
    assert_ne!(
        first.results[0].segment().unwrap().inode(),
        second.results[0].segment().unwrap().inode()
    );
    assert_eq!(bytes_of(first.results[0].segment().unwrap()), held);
    // Given back by a holder that may still have it mapped.
    let inode = first.results[0].segment().unwrap().inode();
    first.results[0].segment().unwrap().never_recycle();
    drop(first);
    for _ in 0..4 {
        assert_ne!(
            rig.scale_shift("x", 1.0, 0.0).results[0]
                .segment()
                .unwrap()
                .inode(),
            inode
        );
    }
}

#[test]
fn an_output_whose_size_the_data_decides() {
    let rig = Rig::new();
    for n in [0_usize, 1, 1000, 200_000] {
        let mut x = values(n);
        for i in (0..n).step_by(3) {
            x[i] = if i % 2 == 0 {
                f64::NAN
            } else {
                f64::NEG_INFINITY
            };
        }
        rig.put_f64("x", &x);
        // A recycled result held something else before.
        drop(rig.invoke(json!({"kernel": "scale-shift", "inputs": {"x": "x"}, "parameters": {"a": 0, "b": 77}})).unwrap());
        let invoked = rig
            .invoke(json!({"kernel": "filter-finite", "inputs": {"x": "x"}}))
            .unwrap();
        let expected: Vec<f64> = x.iter().copied().filter(|v| v.is_finite()).collect();
        let segment = invoked.results[0].segment().unwrap();
        assert_eq!(segment.tensors()[0].spec.shape, [expected.len() as u64]);
        assert_eq!(f64s(&bytes_of(segment)), expected);
        // What lies behind the tensor is zero up to the footer.
        let place = &segment.tensors()[0];
        let end = (place.offset + place.length)
            .next_multiple_of(65536)
            .max(place.offset + 65536)
            .min(segment.bytes());
        let tail = usize::try_from(end - place.offset - place.length).unwrap();
        let mut padding = vec![1; tail.min(65536)];
        if !padding.is_empty() && place.length > 0 {
            segment
                .read_at(
                    place.offset + place.length,
                    &mut padding,
                    &strait_memory::Copied::new(),
                )
                .unwrap();
            let footer = padding
                .len()
                .min(usize::try_from(65536 - place.length % 65536).unwrap() % 65536);
            assert!(
                padding[..footer].iter().all(|b| *b == 0),
                "{n} elements: stale bytes behind the tensor"
            );
        }
    }
}

#[test]
fn a_sealed_result_can_be_asked_for() {
    let rig = Rig::new();
    let x = values(MB / 8);
    rig.put_f64("x", &x);
    let invoked = rig.invoke(json!({"kernel": "scale-shift", "inputs": {"x": "x"}, "parameters": {"a": 3}, "seal": true, "verify": true})).unwrap();
    let segment = invoked.results[0].segment().unwrap();
    assert_eq!(rig.host.mapping(segment).writers, wire::Writers::None);
    assert_eq!(invoked.report.pages[1].inode, Some(segment.inode()));
    assert!(
        f64s(&bytes_of(segment))
            .iter()
            .zip(&x)
            .all(|(y, x)| *y == 3.0 * x)
    );
}

#[test]
fn results_feed_the_next_kernel() {
    let rig = Rig::new();
    let x = values(MB / 8);
    rig.put_f64("x", &x);
    for round in 0..3 {
        let first = json!({"kernel": "scale-shift", "inputs": {"x": "x"}, "parameters": {"a": 2}, "publish": {"y": "half"}, "replace": true});
        rig.invoke(first).unwrap();
        let invoked = rig.scale_shift("half", 0.5, 1.0);
        assert_eq!(invoked.report.copied_bytes, 0, "round {round}");
        let y = f64s(&bytes_of(invoked.results[0].segment().unwrap()));
        assert!(
            y.iter().zip(&x).all(|(y, x)| *y == (2.0 * x) * 0.5 + 1.0),
            "round {round}"
        );
    }
    let taken = rig
        .invoke(json!({"kernel": "scale-shift", "inputs": {"x": "x"}, "publish": {"y": "half"}}))
        .unwrap_err();
    assert_eq!(
        (taken.code, taken.reason.name()),
        (Code::AlreadyExists, "NAME_TAKEN")
    );
}

#[test]
fn a_repeat_with_the_same_key_is_not_run_again() {
    let rig = Rig::new();
    rig.put_f64("x", &values(100));
    let call = json!({"kernel": "scale-shift", "inputs": {"x": "x"}, "idempotency_key": "k-1"});
    let (first, again) = (rig.invoke(call.clone()).unwrap(), rig.invoke(call).unwrap());
    assert_eq!(
        first.results[0].segment().unwrap().id(),
        again.results[0].segment().unwrap().id()
    );
    assert_eq!(rig.host.runner().counts().invocations, 1);
}

/// Numbers that look random, the same for the same seed.
struct Draws(u64);

impl Draws {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % end as u64).unwrap()
    }
}

#[test]
fn a_recycled_result_is_a_whole_file_with_nothing_of_earlier_ones_around_it() {
    const WAYS: usize = 6;
    // Around guest pages, size classes, the smallest window and the smallest huge page.
    const SIZES: [usize; 12] = [
        1, 1000, 8191, 8192, 8193, 65_535, 65_536, 65_537, 73_000, 81_919, 524_287, 524_289,
    ];
    let rig = Rig::new();
    let smears = std::fs::read_to_string("tests/guests/smears.wat").unwrap();
    rig.host
        .own_caller()
        .load_plugin(&guest::component("smears", &smears))
        .unwrap();
    for n in SIZES {
        for way in 0..WAYS {
            let mut values = vec![1.5; n];
            values[0] = way as f64;
            rig.put_f64(&format!("{n}-{way}"), &values);
        }
    }
    let mut draws = Draws(0x9e37_79b9_7f4a_7c15);
    for round in 0..250 {
        let (n, way) = (SIZES[draws.below(SIZES.len())], draws.below(WAYS));
        let (plain, seal) = (draws.below(3) == 0, draws.below(6) == 0);
        let kernel = if plain { "scale-shift" } else { "smears/k" };
        let call = json!({"kernel": kernel, "inputs": {"x": format!("{n}-{way}")}, "seal": seal});
        let at = format!("round {round}: {call}");
        let done = match rig.invoke(call) {
            Ok(done) => done,
            Err(status) => {
                assert!(!plain && [1, 2, 5].contains(&way), "{at}: {status}");
                continue;
            }
        };
        let segment = done.results[0].segment().unwrap();
        let column = Column {
            name: "y".to_owned(),
            spec: segment.tensors()[0].spec.clone(),
            reserve_bytes: n as u64 * 8,
        };
        let layout = FileLayout::plan(&[column]).unwrap();
        let mut file = vec![0xAA; usize::try_from(segment.bytes()).unwrap()];
        segment.read_at(0, &mut file, &Copied::new()).unwrap();
        let place = &layout.tensors[0];
        let body = usize::try_from(place.offset).unwrap();
        let end = body + usize::try_from(place.length).unwrap();
        let footer = usize::try_from(layout.footer_offset).unwrap();
        let zeros = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
        let (header, padding) = file[..body].split_at(layout.header.len());
        assert!(header == layout.header && zeros(padding), "{at}: header");
        assert!(zeros(&file[end..footer]), "{at}: behind the tensor");
        assert!(file[footer..] == layout.footer, "{at}: footer");
        if plain {
            assert!(
                f64s(&file[body..end])[1..].iter().all(|v| *v == 1.5),
                "{at}"
            );
        } else {
            assert!(file[body..end].iter().all(|byte| *byte == 0xEE), "{at}");
        }
    }
    assert!(rig.stats()["pool"]["segments"].as_u64().unwrap() > 0);
}

#[test]
fn a_principal_that_has_its_quota_leaves_the_rest_to_others() {
    let rig = Rig::with(|config| {
        config.quota.bytes = Some(2 << 20);
        config.quota.segments = Some(3);
    });
    let me = rig.me();
    let other = rig.host.caller(Some(4243)).unwrap();
    let create = |caller: &Caller, elements: u64| {
        let tensor = wire::NewTensor {
            name: "x".to_owned(),
            dtype: Dtype::Float64,
            shape: vec![elements],
        };
        // Without the descriptor: a segment that somebody has open stays charged.
        let created = caller.create(vec![tensor]);
        created.map(|(segment, _)| segment)
    };
    let refused = |status: Status, what: &str| {
        assert_eq!(
            (status.code, status.reason.name()),
            (Code::ResourceExhausted, "QUOTA_EXCEEDED"),
            "{status}"
        );
        assert!(status.message.contains(what), "{status}");
    };
    // A MiB of numbers, and the file around them.
    let x = rig.put_f64("x", &vec![1.0; 1 << 17]);
    refused(
        create(&me, 1 << 17).unwrap_err(),
        &format!("segment bytes of {}", me.principal()),
    );
    let call =
        json!({"kernel": "scale-shift", "inputs": {"x": "x"}, "parameters": {"a": 2.0, "b": 0.0}});
    refused(
        rig.invoke(call.clone()).unwrap_err(),
        &format!("segment bytes of {}", me.principal()),
    );
    let theirs = create(&other, 1 << 17).unwrap();
    assert_eq!(
        rig.host.budget().used(),
        me.account().segments().used() + other.account().segments().used()
    );
    // By number, too; and what is let go of is had again.
    let few: Vec<_> = (0..2).map(|_| create(&me, 1).unwrap()).collect();
    refused(
        create(&me, 1).unwrap_err(),
        &format!("segments of {}", me.principal()),
    );
    drop((few, x));
    rig.me().drop_flight("x").unwrap();
    // A worker process may have to let go of them first.
    while me.account().segments().used() > 0 {
        std::thread::yield_now();
    }
    let again = rig.put_f64("x", &[1.0, 2.0]);
    // An idle result of its own makes room, nobody else's.
    drop(rig.invoke(call).unwrap());
    let idle = rig.host.pool().stats().idle_segments;
    assert_eq!(idle, 1);
    let last = [create(&me, 1).unwrap(), create(&me, 1).unwrap()];
    assert_eq!(rig.host.pool().stats().idle_segments, 0);
    let account = me.stats(0).account.unwrap();
    assert_eq!((account.segments, account.refused), (3, 3), "{account:?}");
    drop((theirs, again, last));
}
