//! Several kernels in one INVOKE: what goes between them, what is refused before any of them runs, and that nothing is left.

mod ends;
mod named;
mod prepared;
mod wrong;

use std::os::fd::AsFd;

use serde_json::{Value, json};
use strait_client::wire::Op;

use crate::served::{Frame, Raw, Served, number, numbers, put, ramp, read};

/// Elements of a tensor that is moved, not copied.
const MOVED: u64 = 100_000;
const SHIFTS: &str = "clip(lo=0, hi=20000) | scale-shift(a=2, b=1) | scale-shift(b=0.5)";

fn call(kernel: &str) -> Value {
    json!({"kernel": kernel, "inputs": {"x": "x"}})
}

fn shifted(x: &[f64]) -> Vec<f64> {
    let each = x.iter();
    each.map(|x| 2.0 * x.clamp(0.0, 20000.0) + 1.0 + 0.5)
        .collect()
}

fn release(client: &mut Raw, reply: &Frame) {
    let body = reply.body();
    let results = body["results"].as_array().unwrap().iter();
    let leases: Vec<_> = results.map(|result| result["lease"].clone()).collect();
    client.ok(Op::Release, json!({ "leases": leases }));
}

/// The float64 numbers of an output.
fn output(reply: &Frame, name: &str) -> Vec<f64> {
    let body = reply.accepted();
    let mut results = body["results"].as_array().unwrap().iter();
    let result = results.find(|result| result["port"] == name).unwrap();
    let fd = usize::try_from(number(result, "/fd")).unwrap();
    let place = &result["mapping"]["tensors"][0];
    let count = usize::try_from(number(place, "/length") / 8).unwrap();
    read(reply.fds[fd].as_fd(), number(place, "/offset"), count)
}

#[test]
fn three_stages_copy_nothing_and_leave_nothing() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    put(&mut client, "x", MOVED);
    let before = host.settled(&mut client);
    for _ in 0..2 {
        let mut call = call(SHIFTS);
        call["verify"] = json!(true);
        let reply = client.ask(Op::Invoke, call);
        assert_eq!(numbers(&reply), shifted(&ramp(MOVED)));
        let body = reply.body();
        assert_eq!(number(&body, "/copied_bytes"), 0, "{body}");
        let stages: Vec<_> = body["stages"]
            .as_array()
            .unwrap()
            .iter()
            .map(|stage| {
                assert!(stage["seconds"].as_f64().unwrap() > 0.0, "{stage}");
                (
                    stage["stage"].as_str().unwrap(),
                    stage["kernel"].as_str().unwrap(),
                )
            })
            .collect();
        assert_eq!(
            stages,
            [("1", "clip"), ("2", "scale-shift"), ("3", "scale-shift")]
        );
        let inode = |port: &str| {
            let mut pages = body["pages"].as_array().unwrap().iter();
            let pages = pages.find(|pages| pages["port"] == port);
            number(
                pages.unwrap_or_else(|| panic!("{port} in {body}")),
                "/inode",
            )
        };
        // One file for what goes from a stage to the next, as what each kernel saw says.
        assert_eq!(inode("1.y"), inode("2.x"));
        assert_eq!(inode("2.y"), inode("3.x"));
        assert!(inode("1.x") != inode("1.y") && inode("2.y") != inode("3.y"));
        release(&mut client, &reply);
    }
    let after = host.settled(&mut client);
    for same in ["/segments", "/segment_bytes", "/leases"] {
        assert_eq!(number(&after, same), number(&before, same), "{same}");
    }
    let beside_idle =
        |stats: &Value| number(stats, "/account/bytes") - number(stats, "/pool/idle_bytes");
    assert_eq!(beside_idle(&after), beside_idle(&before), "{after}");
    let count = |stats: &Value| number(stats, "/account/invocations");
    assert_eq!(count(&after) - count(&before), 2);
}

#[test]
fn small_tensors_need_no_segment() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    let x = ramp(8);
    let bytes: Vec<u8> = x.iter().flat_map(|x| x.to_le_bytes()).collect();
    let mut call = call(SHIFTS);
    call["inputs"]["x"] =
        json!({"inline": {"dtype": "float64", "shape": [8], "offset": 0, "length": 64}});
    call["inline_bytes"] = json!(4096);
    for _ in 0..2 {
        let reply = client.ask_inline(Op::Invoke, &call, &bytes);
        let entry = reply.accepted()["results"][0].clone();
        assert_eq!(
            (&entry["port"], &entry["inline"]["shape"]),
            (&json!("y"), &json!([8]))
        );
        let y = reply.payload[..64]
            .as_chunks::<8>()
            .0
            .iter()
            .map(|b| f64::from_le_bytes(*b));
        assert_eq!(y.collect::<Vec<_>>(), shifted(&x));
        assert_eq!(number(&reply.body(), "/copied_bytes"), 3 * 128);
    }
    let stats = client.ok(Op::Stats, json!({}));
    for nothing in ["/segments", "/leases", "/account/bytes", "/pool/segments"] {
        assert_eq!(number(&stats, nothing), 0, "{nothing} {stats}");
    }
    assert!(
        number(&stats, "/copied/frame_in") == 128 && number(&stats, "/copied/frame_out") == 128,
        "{stats}"
    );
}

/// x, both shifted and clipped, and the product of the two.
fn diamond() -> Value {
    json!({
        "stages": [
            {"name": "up", "kernel": "standard/scale-shift", "parameters": {"b": 1}},
            {"name": "low", "kernel": "clip", "parameters": {"hi": 2}, "inputs": {"x": "x"}},
            {"kernel": "matmul", "inputs": {"a": "up", "b": "low.y"}},
        ],
        "outputs": {"product": ".y", "up": "up.y", "again": "up"},
    })
}

#[test]
fn a_graph_fans_out_and_in() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    for side in [3, 300_usize] {
        let x = ramp((side * side) as u64);
        let body = json!({"tensors": [{"name": "x", "dtype": "float64", "shape": [side, side]}]});
        let mut reply = client.ask(Op::Create, body);
        let made = reply.accepted();
        let fd = reply.fds.pop().unwrap();
        let bytes: Vec<u8> = x.iter().flat_map(|x| x.to_le_bytes()).collect();
        crate::served::write(
            fd.as_fd(),
            number(&made, "/mapping/tensors/0/offset"),
            &bytes,
        );
        let up: Vec<f64> = x.iter().map(|x| x + 1.0).collect();
        let low: Vec<f64> = x.iter().map(|x| x.min(2.0)).collect();
        let mut product = vec![0.0; side * side];
        for (i, row) in product.chunks_mut(side).enumerate() {
            for (j, y) in row.iter_mut().enumerate() {
                *y = (0..side)
                    .map(|k| up[i * side + k] * low[k * side + j])
                    .sum();
            }
        }
        let close = |a: &[f64], b: &[f64]| {
            a.iter()
                .zip(b)
                .all(|(a, b)| (a - b).abs() <= 1e-9 * b.abs().max(1.0))
        };
        let input = json!({"segment": made["mapping"]["segment"]});
        for seal in [false, true] {
            let call = json!({"pipeline": diamond(), "inputs": {"x": input}, "publish": {"up": "up"}, "replace": true, "seal": seal});
            let reply = client.ask(Op::Invoke, call);
            let body = reply.accepted();
            let names: Vec<_> = body["results"]
                .as_array()
                .unwrap()
                .iter()
                .map(|r| r["port"].clone())
                .collect();
            assert_eq!(names, ["again", "product", "up"]);
            assert_eq!(output(&reply, "up"), up);
            assert_eq!(output(&reply, "again"), up);
            assert!(close(&output(&reply, "product"), &product));
            if side > 256 {
                assert_eq!(number(&body, "/copied_bytes"), 0);
            }
            if seal {
                for result in body["results"].as_array().unwrap() {
                    assert_eq!(result["mapping"]["writers"], "none", "{result}");
                }
            }
            release(&mut client, &reply);
        }
        // The same as text, of a flight, with the one result in the reply, if it is small.
        let text = "up: scale-shift(b=1) | low: clip(x: x, hi=2) | matmul(a: up, b: low)";
        let call = json!({"kernel": text, "inputs": {"x": "up"}, "inline_bytes": 4096});
        let reply = client.ask(Op::Invoke, call);
        assert_eq!(
            reply.accepted()["results"][0]["inline"].is_object(),
            side == 3
        );
        client.ok(Op::Release, json!({"leases": [made["lease"]]}));
    }
}

#[test]
fn data_may_decide_sizes_between_stages() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    for count in [5, MOVED] {
        let created = client.create(count);
        let x: Vec<f64> = (0..count)
            .map(|i| if i % 3 == 0 { f64::NAN } else { i as f64 })
            .collect();
        created.fill(&x);
        let kept: Vec<f64> = x
            .iter()
            .filter(|x| x.is_finite())
            .map(|x| x + 1.0)
            .collect();
        let mut call = call("f: filter-finite | scale-shift(b=1) | g: filter-finite");
        call["inputs"]["x"] = json!({"segment": created.segment});
        let reply = client.ask(Op::Invoke, call);
        assert_eq!(numbers(&reply), kept);
        let notes = reply.body()["notes"].clone();
        let dropped = count.div_ceil(3).to_string();
        let noted =
            json!([{"key": "f.dropped", "text": dropped}, {"key": "g.dropped", "text": "0"}]);
        assert_eq!(notes, noted);
    }
}

#[test]
fn a_pipeline_is_described_as_a_kernel_is() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    let described = |client: &mut Raw, asked: Value| {
        let list = client.ok(Op::Kernels, asked);
        assert_eq!(
            (&list["more"], list["kernels"].as_array().unwrap().len()),
            (&json!(false), 1)
        );
        list["kernels"][0].clone()
    };
    let ports = |kernel: &Value, side: &str| {
        let ports = kernel[side].as_array().unwrap().iter();
        ports
            .map(|port| port["name"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    let kernel = described(
        &mut client,
        json!({"kernel": "fir | clip | fir -> low: .y"}),
    );
    assert_eq!(kernel["plugin"], "pipeline");
    assert_eq!(kernel["name"], "fir | clip | fir");
    assert_eq!(kernel["doc"], "fir | clip | fir -> low: .y");
    assert_eq!(ports(&kernel, "inputs"), ["x", "1.taps", "3.taps"]);
    assert_eq!(ports(&kernel, "outputs"), ["low"]);
    assert_eq!(kernel["parameters"], json!([]));
    let kernel = described(&mut client, json!({"pipeline": diamond()}));
    assert_eq!(
        (ports(&kernel, "inputs"), ports(&kernel, "outputs")),
        (
            vec!["x".to_owned()],
            ["again", "product", "up"].map(str::to_owned).to_vec()
        )
    );
    // What both of its takers take.
    let kernel = described(
        &mut client,
        json!({"kernel": "a: matmul(a: m, b: m) | cast(x: m, to=int8) -> p: a, q: .y"}),
    );
    assert_eq!(kernel["inputs"][0]["dtypes"], json!(["float32", "float64"]));
    assert_eq!(
        (
            number(&kernel, "/inputs/0/rank_min"),
            number(&kernel, "/inputs/0/rank_max")
        ),
        (2, 2)
    );
    client
        .ask(Op::Kernels, json!({"kernel": "clip |"}))
        .refused("INVALID_ARGUMENT", "BAD_PIPELINE");
}

#[test]
fn a_repeat_of_a_key_is_one_run() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    put(&mut client, "x", 100);
    let mut keyed = call(SHIFTS);
    keyed["idempotency_key"] = json!("k");
    for _ in 0..2 {
        let reply = client.ask(Op::Invoke, keyed.clone());
        assert_eq!(numbers(&reply), shifted(&ramp(100)));
        assert_eq!(reply.body()["stages"].as_array().unwrap().len(), 3);
    }
    assert_eq!(
        number(&client.ok(Op::Stats, json!({})), "/account/invocations"),
        1
    );
    keyed["kernel"] = json!("clip | scale-shift");
    let message = client
        .ask(Op::Invoke, keyed.clone())
        .refused("FAILED_PRECONDITION", "IDEMPOTENCY_KEY_REUSED");
    assert!(message.contains("`kernel`"), "{message}");
    keyed.as_object_mut().unwrap().remove("kernel");
    keyed["pipeline"] = json!({"stages": [{"kernel": "clip"}]});
    let message = client
        .ask(Op::Invoke, keyed)
        .refused("FAILED_PRECONDITION", "IDEMPOTENCY_KEY_REUSED");
    assert!(message.contains("`kernel`, `pipeline`"), "{message}");
}
