//! Results that a worker process filled, before they get a name: that process lets go of them, and Linux proves it.

use std::fs;
use std::os::fd::AsFd;

use arrow_array::Float64Array;
use arrow_flight::utils::flight_data_to_batches;
use arrow_flight::{Action, CancelFlightInfoRequest, FlightDescriptor};
use futures::TryStreamExt;
use prost::Message;
use rustix::process::Pid;
use serde_json::{Value, json};
use strait_client::wire::Op;

use crate::second_uid::{blocking, flight};
use crate::served::{FINAL, Holdings, check_call, numbers, ramp, scale_shift};
use crate::workers::{MOVED, ON, host, invoke, kill, stop, worker};

/// Where `process` has the file of `fd` mapped shared and writable, if it does.
pub(super) fn mapped_writable(process: Pid, fd: impl AsFd) -> Option<std::ops::Range<u64>> {
    let inode = rustix::fs::fstat(fd).unwrap().st_ino.to_string();
    let maps = fs::read_to_string(format!("/proc/{}/maps", process.as_raw_nonzero())).unwrap();
    let places = maps.lines().filter_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        if fields.get(4) != Some(&&*inode) || fields[1] != "rw-s" {
            return None;
        }
        let (start, end) = fields[0].split_once('-')?;
        let number = |hex| u64::from_str_radix(hex, 16).unwrap();
        Some(number(start)..number(end))
    });
    // It may be told in parts, which follow each other.
    places.reduce(|all, part| all.start.min(part.start)..all.end.max(part.end))
}

#[test]
fn a_result_that_gets_a_name_is_sealed_by_linux_and_let_go_of() {
    let (host, mut client) = host(&[ON]);
    let expected: Vec<_> = ramp(MOVED).iter().map(|x| 2.0 * x + 1.0).collect();
    let seals = |fd| rustix::fs::fcntl_get_seals(fd).unwrap();
    check_call(&mut client, json!("x"), &ramp(MOVED));
    let before = Holdings::of(&host.settled(&mut client));
    let result = invoke(&mut client);
    let mapping = &result.body()["results"][0]["mapping"];
    assert_eq!(mapping["writers"], "worker");
    assert!(!seals(&result.fds[0]).contains(FINAL));
    assert!(mapped_writable(worker(&host), &result.fds[0]).is_some());
    let publish = json!({"segment": mapping["segment"], "name": "y"});
    assert_eq!(
        client.ok(Op::Publish, publish)["mapping"]["writers"],
        "none"
    );
    assert!(seals(&result.fds[0]).contains(FINAL));
    assert_eq!(mapped_writable(worker(&host), &result.fds[0]), None);
    assert_eq!(numbers(&result), expected);
    check_call(&mut client, json!("y"), &expected);
    let mut named = scale_shift(json!("x"), 2.0, 1.0);
    named["publish"] = json!({"y": "z"});
    let named = client.ask(Op::Invoke, named);
    let written = &named.body()["results"][0]["mapping"]["writers"];
    assert_eq!(written, "none");
    assert_eq!(numbers(&named), expected);
    for name in ["y", "z"] {
        client.ok(Op::Drop, json!({"name": name}));
    }
    for reply in [result, named] {
        let lease = &reply.body()["results"][0]["lease"];
        client.ok(Op::Release, json!({"leases": [lease]}));
    }
    assert_eq!(Holdings::of(&host.settled(&mut client)), before);
}

#[test]
fn a_result_is_sealed_before_it_is_read_over_flight() {
    let (host, mut client) = host(&[ON]);
    check_call(&mut client, json!("x"), &ramp(MOVED));
    let before = Holdings::of(&host.settled(&mut client));
    let call = scale_shift(json!("x"), 2.0, 1.0).to_string();
    let (info, sent) = blocking(async {
        let mut flight = flight(&host.directory()).await;
        let info = flight.get_flight_info(FlightDescriptor::new_cmd(call));
        let info = info.await.unwrap().into_inner();
        let about: Value = serde_json::from_slice(&info.endpoint[0].app_metadata).unwrap();
        let map = json!({"segment": about["segment"]});
        let unread = client.ask(Op::Map, map.clone());
        assert_eq!(unread.body()["mapping"]["writers"], "worker");
        assert!(mapped_writable(worker(&host), &unread.fds[0]).is_some());
        let data = flight.do_get(info.endpoint[0].ticket.clone().unwrap());
        let sent: Vec<_> = data
            .await
            .unwrap()
            .into_inner()
            .try_collect()
            .await
            .unwrap();
        assert_eq!(mapped_writable(worker(&host), &unread.fds[0]), None);
        let seals = rustix::fs::fcntl_get_seals(&unread.fds[0]).unwrap();
        assert!(seals.contains(FINAL), "{seals:?}");
        let read = client.ask(Op::Map, map);
        assert_eq!(read.body()["mapping"]["writers"], "none");
        for reply in [unread, read] {
            client.ok(Op::Release, json!({"leases": [reply.body()["lease"]]}));
        }
        let cancel = CancelFlightInfoRequest {
            info: Some(info.clone()),
        }
        .encode_to_vec();
        let cancel = flight.do_action(Action::new("CancelFlightInfo", cancel));
        cancel
            .await
            .unwrap()
            .into_inner()
            .try_collect::<Vec<_>>()
            .await
            .unwrap();
        (info, sent)
    });
    assert_eq!(info.total_records, i64::try_from(MOVED).unwrap());
    let batches = flight_data_to_batches(&sent).unwrap();
    let values = batches.iter().flat_map(|batch| {
        let column = batch.column(0).as_any().downcast_ref::<Float64Array>();
        column.unwrap().values().to_vec()
    });
    let expected = ramp(MOVED).into_iter().map(|x| 2.0 * x + 1.0);
    assert!(values.eq(expected));
    assert_eq!(Holdings::of(&host.settled(&mut client)), before);
}

#[test]
fn a_worker_that_is_stopped_or_ends_keeps_no_result_from_its_name() {
    let (host, mut client) = host(&[ON]);
    let expected: Vec<_> = ramp(MOVED).iter().map(|x| 2.0 * x + 1.0).collect();
    check_call(&mut client, json!("x"), &ramp(MOVED));
    let before = Holdings::of(&host.settled(&mut client));
    for how in ["killed", "stopped", "killed meanwhile"] {
        let result = invoke(&mut client);
        let mapping = result.accepted()["results"][0]["mapping"].clone();
        let pid = worker(&host);
        match how {
            "killed" => kill(pid),
            "stopped" => stop(pid),
            _ => {}
        }
        let publish = json!({"segment": mapping["segment"], "name": "y"});
        let sequence = client.begin(Op::Publish, &publish, &[]);
        if how == "killed meanwhile" {
            kill(pid);
        }
        let reply = client.receive().unwrap();
        assert_eq!(reply.sequence(), sequence, "{how}");
        assert_eq!(reply.accepted()["mapping"]["writers"], "none", "{how}");
        assert_eq!(numbers(&result), expected, "{how}");
        let lease = &result.body()["results"][0]["lease"];
        client.ok(Op::Release, json!({"leases": [lease]}));
        // The first call may find the worker dying.
        for _ in 0..2 {
            check_call(&mut client, json!("y"), &expected);
        }
        client.ok(Op::Drop, json!({"name": "y"}));
    }
    assert_eq!(Holdings::of(&host.settled(&mut client)), before);
}
