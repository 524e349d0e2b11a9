//! Alone in its process, since it counts what the process has.

mod peer;

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use peer::{connected, invoked, segment};
use serde_json::json;
use strait_client::wire::Op;
use strait_client::{Dtype, Options, TensorSpec};

/// Descriptors, lines of the memory map that are shared memory, threads.
fn counts() -> [usize; 3] {
    let entries = |path: &str| std::fs::read_dir(path).expect("/proc is mounted").count();
    let maps = std::fs::read_to_string("/proc/self/maps").expect("/proc is mounted");
    let shared = maps.lines().filter(|line| line.contains("memfd:")).count();
    [entries("/proc/self/fd"), shared, entries("/proc/self/task")]
}

#[test]
fn nothing_is_left_of_what_was_used() {
    let before = counts();
    for round in 0..200 {
        let (client, peer) = connected(&Options::default());
        let spec = TensorSpec {
            dtype: Dtype::Float64,
            shape: vec![2],
        };
        std::thread::scope(|scope| {
            let client = &client;
            let using = scope.spawn(move || {
                client
                    .put("x", &spec, &[1.0, 2.0], false)
                    .expect("it is published");
                let x = client.map("x").expect("it is granted");
                let result = client.call("clip").input("x", &x).send().expect("it ran");
                assert_eq!(result.tensor("y").expect("a port").bytes().len(), 8);
                client.call("trap").send().expect_err("it traps");
            });
            let made = segment("1", "x", &[0.0; 2], "anyone");
            peer.grant(&peer.expect(Op::Create), &made, 1, 60_000);
            peer.ok(&peer.expect(Op::Publish), json!({"mapping": made.mapping}));
            peer.expect(Op::Release);
            peer.grant(
                &peer.expect(Op::Map),
                &segment("2", "x", &[1.0], "none"),
                2,
                60_000,
            );
            let asked = peer.expect(Op::Invoke);
            let result = segment("3", "y", &[3.0], "host");
            let mut body = invoked(json!([{
                "port": "y", "mapping": result.mapping, "lease": 3, "expires_ms": 9000, "fd": 0,
            }]));
            body["request_id"] = json!("r");
            // One descriptor more than the results name: closed, not kept.
            peer.send(
                Op::Ok,
                asked.sequence,
                &body,
                &[result.fd.as_fd(), made.fd.as_fd()],
            );
            peer.error(
                &peer.expect(Op::Invoke),
                "INTERNAL",
                "GUEST_TRAP",
                "unreachable",
            );
            using.join().expect("no panic");
        });
        match round % 3 {
            0 => client.close(),
            1 => drop(client),
            // The host goes first.
            _ => drop(peer),
        }
    }
    // Threads that were told to end need a moment to be gone.
    let patience = Instant::now() + Duration::from_secs(10);
    while counts() != before && Instant::now() < patience {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(counts(), before, "descriptors, shared mappings, threads");
}
