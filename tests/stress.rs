//! Client processes of several users that put, call, map, replace and drop at random, and are killed
//! at random moments. Every number that one of them reads is checked; at the end nothing is left.
//!
//! `TEST_STRESS_SECONDS` makes it longer than the few seconds that it takes otherwise.
#![allow(
    clippy::unwrap_used,
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a test that cannot go on ends; numbers below 2^53"
)]

#[path = "support/served.rs"]
mod served;

use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Signal, Uid};
use serde_json::json;
use served::{Holdings, Random, Raw, Served, as_user, number};
use strait_client::wire::Op;
use strait_client::{Client, Dtype, Error, MappedSegment, NewTensor, TensorSpec};

/// Client processes at a time.
const PROCESSES: usize = 4;
/// Users that they are; the first is whoever runs the test.
const USERS: u32 = 3;
const OTHERS: u32 = 4300;
/// Names of each user, for all of its processes.
const NAMES: usize = 5;
/// Some are windows, some are copied, some have pages to be born huge.
const SIZES: [u64; 6] = [1, 1000, 60_000, 70_000, 200_000, 700_000];

/// A tensor of user `user`: each element is one more than the one before, so that a reader who knows
/// the user knows every number from the first one.
fn pattern(user: u32, random: &mut Random, elements: u64) -> Vec<f64> {
    let first = (u64::from(user) << 32) + (random.next() & 0xffff);
    (0..elements).map(|i| (first + i) as f64).collect()
}

/// Every number, and that they are the user's own; `factor` is what a kernel multiplied them by.
fn check(user: u32, values: &[f64], factor: f64, what: &str) {
    let first = values[0] / factor;
    let whose = (first as u64) >> 32;
    assert_eq!(whose, u64::from(user), "{what}: the first is {first}");
    let wrong = values
        .iter()
        .enumerate()
        .find(|(i, value)| **value != (first + *i as f64) * factor);
    assert_eq!(wrong, None, "{what}: of {} from {first}", values.len());
}

fn check_segment(user: u32, segment: &MappedSegment, what: &str) {
    let view = segment.tensors().unwrap().next().unwrap();
    check(user, view.as_slice().unwrap(), 1.0, what);
}

/// What may come of a step beside success: another process has dropped the name.
fn or_missing<T>(result: Result<T, Error>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error) if error.reason() == Some("FLIGHT_NOT_FOUND") => None,
        Err(error) => panic!("{error}"),
    }
}

/// One thing that a client does.
fn step(client: &Client, user: u32, random: &mut Random, kept: &mut Vec<MappedSegment>) {
    let name = format!("n{}", random.below(NAMES));
    let elements = *random.one(&SIZES);
    let scale = |factor: f64| client.call("scale-shift").param("a", factor);
    match random.below(8) {
        0 | 1 => {
            let spec = TensorSpec {
                dtype: Dtype::Float64,
                shape: vec![elements],
            };
            let data = pattern(user, random, elements);
            client.put(&name, &spec, &data, true).unwrap();
        }
        2 => {
            let tensor = NewTensor {
                name: "x".to_owned(),
                dtype: Dtype::Float64,
                shape: vec![elements],
            };
            let mut open = client.create(&[tensor]).unwrap();
            let data = pattern(user, random, elements);
            open.tensor_mut::<f64>("x").unwrap().copy_from_slice(&data);
            let result = scale(2.0).input("x", &open).send().unwrap();
            let view = result.tensor("y").unwrap();
            check(user, view.as_slice().unwrap(), 2.0, "of an open segment");
            if random.below(2) == 0 {
                open.publish(&name, true).unwrap();
            }
        }
        3 => kept.extend(or_missing(client.map(&name))),
        4 => {
            if let Some(result) = or_missing(scale(4.0).input("x", name.as_str()).send()) {
                let view = result.tensor("y").unwrap();
                check(user, view.as_slice().unwrap(), 4.0, "of a call");
            }
        }
        5 => {
            let call = scale(1.0).input("x", name.as_str());
            let to = format!("n{}", random.below(NAMES));
            or_missing(call.publish("y", &to).replace(true).send());
        }
        6 => drop(or_missing(client.drop_flight(&name))),
        _ => {
            // What was mapped stays what it was, whatever became of its name.
            for segment in kept.iter() {
                check_segment(user, segment, "of a segment that was kept");
            }
            kept.truncate(random.below(4));
        }
    }
}

/// Not a test: one client process, which is this test binary again with these variables.
#[test]
#[ignore = "the process that another test kills"]
fn client_process() {
    let variables = ["DIRECTORY", "USER", "SEED"];
    let [Ok(directory), Ok(user), Ok(seed)] =
        variables.map(|name| std::env::var(format!("TEST_CLIENT_{name}")))
    else {
        return;
    };
    let user: u32 = user.parse().unwrap();
    let mut random = Random::seeded(seed.parse().unwrap());
    if user >= OTHERS {
        let uid = Some(Uid::from_raw(user));
        // Of this thread and those that it starts.
        rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
    }
    let client = Client::connect_to(Path::new(&directory)).unwrap();
    let mut kept = Vec::new();
    loop {
        step(&client, user, &mut random, &mut kept);
    }
}

fn start(directory: &Path, user: u32, seed: u64) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "client_process", "--ignored", "--nocapture"])
        .env("TEST_CLIENT_DIRECTORY", directory)
        .env("TEST_CLIENT_USER", user.to_string())
        .env("TEST_CLIENT_SEED", seed.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// It must have been going on until now: a client that found something wrong has ended by itself.
fn kill(mut child: Child) {
    child.kill().unwrap();
    let status = child.wait().unwrap();
    if status.signal() != Some(Signal::KILL.as_raw()) {
        let mut said = String::new();
        child.stderr.unwrap().read_to_string(&mut said).unwrap();
        panic!("a client ended by itself: {status}; {said}");
    }
}

#[test]
fn clients_that_die_at_random_see_no_wrong_number_and_leave_nothing() {
    let seconds = std::env::var("TEST_STRESS_SECONDS").map_or(5, |s| s.parse().unwrap());
    let host = Served::start(&[]);
    host.open_to_all();
    let directory = host.directory();
    let own = rustix::process::geteuid();
    let users: Vec<u32> = if own.is_root() {
        (0..USERS)
            .map(|n| if n == 0 { own.as_raw() } else { OTHERS + n })
            .collect()
    } else {
        vec![own.as_raw()]
    };
    let mut watcher = host.greeted();
    let before = Holdings::of(&host.settled(&mut watcher));
    let mut random = Random::new();
    let mut clients: Vec<Child> = Vec::new();
    let mut killed = 0;
    let end = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < end {
        while clients.len() < PROCESSES {
            let user = *random.one(&users);
            clients.push(start(&directory, user, random.next()));
        }
        std::thread::sleep(Duration::from_millis(50 + random.next() % 300));
        kill(clients.remove(random.below(PROCESSES)));
        killed += 1;
        watcher.ok(Op::Ping, json!({}));
    }
    clients.into_iter().for_each(kill);
    let stats = watcher.ok(Op::Stats, json!({}));
    let calls = number(&stats, "/invocations");
    eprintln!("{killed} clients killed, {calls} calls");
    assert!(
        killed > 5 && calls > 20,
        "{killed} clients killed, {calls} calls"
    );
    for user in users {
        as_user(user, || {
            let mut client = Raw::connect(&host.socket()).unwrap();
            client.hello();
            let list = client.ok(Op::List, json!({}));
            for flight in list["flights"].as_array().unwrap() {
                client.ok(Op::Drop, json!({"name": flight["name"]}));
            }
        });
    }
    host.eventually(&mut watcher, &format!("as before: {before:?}"), |stats| {
        Holdings::of(stats) == before
    });
}
