//! A second user with everything that a first one's names, ids, leases, tickets and keys are: none of
//! it is anything to it, nothing of the first user's changes, and no byte of it is seen.

use std::future::Future;
use std::path::Path;

use arrow_flight::flight_service_client::FlightServiceClient;
use arrow_flight::{
    Action, CancelFlightInfoRequest, Criteria, FlightDescriptor, FlightEndpoint, FlightInfo,
    RenewFlightEndpointRequest, Ticket,
};
use futures::TryStreamExt;
use prost::Message;
use serde_json::{Value, json};
use strait_client::wire::Op;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::served::{
    Holdings, Raw, Served, as_user, check_call, number, numbers, put, ramp, scale_shift,
};
use crate::{guest, served};

const OTHER: u32 = 4242;
/// Above `move_min_bytes`.
const MOVED: u64 = 100_000;
const KEY: &str = "the-first-users-key";

const NO_NAME: &str = "FLIGHT_NOT_FOUND";
const NO_SEGMENT: &str = "SEGMENT_NOT_FOUND";

/// With a kernel that never ends, and open to every user.
fn open_host() -> Served {
    let text = std::fs::read_to_string("tests/guests/spins.wat").unwrap();
    // The kernel that never ends must not be in the way of the others.
    let settings = [("STRAIT__ENGINE__WORKERS", "4")];
    let host = Served::with_plugin(&guest::component("spins", &text), &settings);
    host.open_to_all();
    host
}

pub(super) fn blocking<T>(future: impl Future<Output = T>) -> T {
    // On this thread, whose user it is.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.unwrap().block_on(future)
}

pub(super) async fn flight(directory: &Path) -> FlightServiceClient<Channel> {
    let address = format!("unix:{}", directory.join("flight.sock").display());
    let endpoint = Endpoint::from_shared(address).unwrap();
    // At its first call, which is where a refused connection is an error, too.
    FlightServiceClient::new(endpoint.connect_lazy())
}

/// What the first user has, and what there is to know about it.
struct First {
    client: Raw,
    segments: Vec<String>,
    leases: Vec<u64>,
    /// Of an invocation by Flight.
    info: FlightInfo,
    /// An INVOKE that has not ended.
    running: u32,
}

impl First {
    fn new(host: &Served) -> Self {
        let mut client = host.greeted();
        put(&mut client, "x", MOVED);
        let mapped = client.ok(Op::Map, json!({"name": "x"}));
        let open = client.create(10);
        open.fill(&ramp(10));
        let result = client.ok(Op::Invoke, scale_shift(json!("x"), 2.0, 1.0));
        let mut keyed = scale_shift(json!("x"), 2.0, 1.0);
        keyed["publish"] = json!({"y": "y"});
        keyed["idempotency_key"] = json!(KEY);
        let published = client.ok(Op::Invoke, keyed);
        let call = scale_shift(json!("x"), 3.0, 0.0);
        let descriptor = FlightDescriptor::new_cmd(call.to_string());
        let info = blocking(async {
            let mut flight = flight(&host.directory()).await;
            flight
                .get_flight_info(descriptor)
                .await
                .unwrap()
                .into_inner()
        });
        let of_flight: Value = serde_json::from_slice(&info.endpoint[0].app_metadata).unwrap();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let segments = vec![
            text(&mapped["mapping"]["segment"]),
            open.segment.clone(),
            text(&result["results"][0]["mapping"]["segment"]),
            text(&published["results"][0]["mapping"]["segment"]),
            text(&of_flight["segment"]),
        ];
        let lease = |body: &Value| body["lease"].as_u64().unwrap();
        let leases = vec![
            lease(&mapped),
            open.lease,
            lease(&result["results"][0]),
            lease(&published["results"][0]),
        ];
        let spin = json!({"kernel": "spins/k", "inputs": {"x": "x"}, "deadline_ms": 600_000});
        let running = client.begin(Op::Invoke, &spin, &[]);
        while number(&client.ok(Op::Stats, json!({})), "/running") == 0 {}
        Self {
            client,
            segments,
            leases,
            info,
            running,
        }
    }

    /// All of it is there, and as it was.
    fn check(&mut self) {
        check_call(&mut self.client, json!("x"), &ramp(MOVED));
        check_call(
            &mut self.client,
            json!({"segment": self.segments[1]}),
            &ramp(10),
        );
        let doubled: Vec<f64> = ramp(MOVED).iter().map(|x| 2.0 * x + 1.0).collect();
        check_call(&mut self.client, json!("y"), &doubled);
        check_call(
            &mut self.client,
            json!({"segment": self.segments[2]}),
            &doubled,
        );
        self.client.ok(Op::Renew, json!({"leases": self.leases}));
        let names = self.client.ok(Op::List, json!({}))["flights"].clone();
        let names: Vec<_> = names
            .as_array()
            .unwrap()
            .iter()
            .map(|f| f["name"].clone())
            .collect();
        assert_eq!(names, ["x", "y"]);
    }

    /// What ran until now can be cancelled, by the one whose it is.
    fn end(mut self) {
        self.check();
        let cancel = json!({"sequence": self.running});
        assert_eq!(self.client.ok(Op::Cancel, cancel)["cancelled"], true);
        let ended = self.client.receive().unwrap();
        assert_eq!(ended.sequence(), self.running);
        ended.refused("CANCELLED", "CANCELLED");
    }
}

/// Whether no word of it tells of the first user's segments.
fn says_nothing(text: &str, segments: &[String], but: &str) {
    let told = segments.iter().find(|id| **id != but && text.contains(*id));
    assert_eq!(told, None, "{text}");
}

#[test]
fn nothing_of_one_user_is_anything_to_another_on_the_data_socket() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not tested: only root can become another user");
        return;
    }
    let host = open_host();
    let mut first = First::new(&host);
    first.check();
    let before = Holdings::of(&host.settled(&mut first.client));
    let socket = host.socket();
    let (segments, leases, running) = (&first.segments, &first.leases, first.running);
    as_user(OTHER, || {
        let mut client = Raw::connect(&socket).unwrap();
        client.hello();
        let mut refused = |op: Op, body: Value, reason: &str| {
            let shown = body.to_string();
            let reply = client.ask(op, body);
            reply.refused("NOT_FOUND", reason);
            says_nothing(
                &reply.text,
                segments,
                segments
                    .iter()
                    .find(|id| shown.contains(*id))
                    .map_or("", |id| id),
            );
        };
        for name in ["x", "y"] {
            for op in [Op::Lookup, Op::Map, Op::Drop] {
                refused(op, json!({"name": name}), NO_NAME);
            }
            for input in [
                json!(name),
                json!(format!("{name}#x")),
                json!({"name": name, "tensor": "x"}),
            ] {
                refused(Op::Invoke, scale_shift(input, 1.0, 0.0), NO_NAME);
            }
        }
        for id in segments {
            refused(Op::Map, json!({"segment": id}), NO_SEGMENT);
            refused(Op::Seal, json!({"segment": id}), NO_SEGMENT);
            for replace in [false, true] {
                let publish = json!({"segment": id, "name": "stolen", "replace": replace});
                refused(Op::Publish, publish, NO_SEGMENT);
            }
            for input in [
                json!({"segment": id}),
                json!({"segment": id, "tensor": "y"}),
            ] {
                refused(Op::Invoke, scale_shift(input, 1.0, 0.0), NO_SEGMENT);
            }
        }
        // The key of the first user's call, on a name that is not this user's.
        let mut keyed = scale_shift(json!("x"), 2.0, 1.0);
        keyed["idempotency_key"] = json!(KEY);
        refused(Op::Invoke, keyed, NO_NAME);
        // A lease that is not one's own is as one that is gone.
        assert_eq!(
            client.ok(Op::Release, json!({"leases": leases}))["released"],
            0
        );
        for lease in leases {
            let reply = client.ask(Op::Renew, json!({"leases": [lease], "lease_ms": 1}));
            reply.refused("FAILED_PRECONDITION", "LEASE_EXPIRED");
            says_nothing(&reply.text, segments, "");
        }
        for sequence in 1..=running {
            let cancelled = client.ok(Op::Cancel, json!({"sequence": sequence}));
            assert_eq!(cancelled["cancelled"], false);
        }
        for after in [json!({}), json!({"after": "a"}), json!({"after": "x"})] {
            assert_eq!(client.ok(Op::List, after)["flights"], json!([]));
        }
        let stats = client.ok(Op::Stats, json!({}));
        assert_eq!(
            (number(&stats, "/flights"), number(&stats, "/own/leases")),
            (0, 0)
        );
        says_nothing(&stats.to_string(), segments, "");
        // Memory that others had is zero.
        let fresh = client.create(MOVED);
        let length = usize::try_from(MOVED).unwrap();
        let bytes = served::read(std::os::fd::AsFd::as_fd(&fresh.fd), fresh.offset, length);
        assert!(bytes.iter().all(|x| x.to_bits() == 0), "memory of somebody");
    });
    host.eventually(
        &mut first.client,
        &format!("as before: {before:?}"),
        |stats| Holdings::of(stats) == before,
    );
    as_user(OTHER, || {
        let mut client = Raw::connect(&socket).unwrap();
        client.hello();
        // Names, keys and replacing are this user's own. What a key gave is kept for a
        // while, so this comes after the count.
        put(&mut client, "x", 20);
        put(&mut client, "y", 20);
        let mut keyed = scale_shift(json!("x"), 2.0, 1.0);
        keyed["idempotency_key"] = json!(KEY);
        keyed["publish"] = json!({"y": "y"});
        keyed["replace"] = json!(true);
        let own = client.ask(Op::Invoke, keyed);
        let doubled: Vec<f64> = ramp(20).iter().map(|x| 2.0 * x + 1.0).collect();
        assert_eq!(numbers(&own), doubled);
        says_nothing(&own.text, segments, "");
        for name in ["x", "y"] {
            client.ok(Op::Drop, json!({"name": name}));
        }
    });
    first.end();
}

/// What a call that must not work said: NOT_FOUND, without a word about the first user's segments.
fn not_found<T>(result: Result<T, Status>, what: &str, segments: &[String], known: &str) {
    let Err(status) = result else {
        panic!("{what} was answered");
    };
    assert_eq!(status.code(), Code::NotFound, "{what}: {status:?}");
    says_nothing(status.message(), segments, known);
}

#[test]
fn nothing_of_one_user_is_anything_to_another_over_flight() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not tested: only root can become another user");
        return;
    }
    let host = open_host();
    let mut first = First::new(&host);
    let directory = host.directory();
    let (segments, info) = (&first.segments, &first.info);
    let path = |name: &str| FlightDescriptor::new_path(vec![name.to_owned()]);
    as_user(OTHER, || {
        blocking(async {
            let mut client = flight(&directory).await;
            let listed = client.list_flights(Criteria::default()).await.unwrap();
            assert_eq!(
                listed.into_inner().try_collect::<Vec<_>>().await.unwrap(),
                []
            );
            let call = FlightDescriptor::new_cmd(scale_shift(json!("x"), 1.0, 0.0).to_string());
            for descriptor in [path("x"), path("y"), call] {
                let what = format!("{descriptor:?}");
                let descriptor = || descriptor.clone();
                let refuse = |result| not_found(result, &what, segments, "");
                refuse(client.get_flight_info(descriptor()).await.map(drop));
                refuse(client.get_schema(descriptor()).await.map(drop));
                refuse(client.poll_flight_info(descriptor()).await.map(drop));
            }
            let theirs = info.endpoint[0].ticket.clone().unwrap();
            for ticket in [
                Ticket::new("x"),
                Ticket::new("y"),
                Ticket::new("x#x"),
                Ticket::new(json!({"segment": segments[4], "rows": [0, 1]}).to_string()),
                Ticket::new(
                    json!({"name": "x", "segment": segments[4], "rows": [0, 1]}).to_string(),
                ),
                theirs,
            ] {
                let what = format!("{ticket:?}");
                let bytes = match client.do_get(ticket).await {
                    Ok(stream) => stream.into_inner().try_collect::<Vec<_>>().await.map(drop),
                    Err(status) => Err(status),
                };
                not_found(bytes, &what, segments, &segments[4]);
            }
            for id in segments {
                let bytes = match client.do_get(Ticket::new(id.clone())).await {
                    Ok(stream) => stream.into_inner().try_collect::<Vec<_>>().await.map(drop),
                    Err(status) => Err(status),
                };
                not_found(bytes, "an id as a ticket", segments, id);
            }
            let mut act = async |kind: &str, body: Vec<u8>| {
                let stream = client
                    .do_action(Action::new(kind, body))
                    .await?
                    .into_inner();
                stream.try_collect::<Vec<_>>().await
            };
            for action in ["mapping", "drop"] {
                for name in ["x", "y"] {
                    not_found(act(action, name.into()).await, action, segments, "");
                }
            }
            let renew = RenewFlightEndpointRequest {
                endpoint: Some(FlightEndpoint::clone(&info.endpoint[0])),
            };
            let renewed = act("RenewFlightEndpoint", renew.encode_to_vec()).await;
            not_found(renewed, "a renewal", segments, &segments[4]);
            let cancel = CancelFlightInfoRequest {
                info: Some(info.clone()),
            };
            // An answer, which is that there is nothing to cancel.
            let cancelled = act("CancelFlightInfo", cancel.encode_to_vec())
                .await
                .unwrap();
            let status = arrow_flight::CancelFlightInfoResult::decode(&*cancelled[0].body).unwrap();
            assert_eq!(status.status(), arrow_flight::CancelStatus::NotCancellable);
        });
    });
    // It is all still there, and the ticket is the first user's.
    first.check();
    let ticket = first.info.endpoint[0].ticket.clone().unwrap();
    let bytes: usize = blocking(async {
        let mut client = flight(&directory).await;
        let stream = client.do_get(ticket).await.unwrap().into_inner();
        let messages: Vec<_> = stream.try_collect().await.unwrap();
        messages.iter().map(|message| message.data_body.len()).sum()
    });
    assert!(bytes >= usize::try_from(MOVED * 8).unwrap(), "{bytes}");
}

#[test]
fn connections_of_one_user_leave_places_for_others() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not tested: only root can become another user");
        return;
    }
    let host = Served::with(&[], &[("STRAIT__QUOTA__CONNECTIONS", "4")]);
    host.open_to_all();
    let mut first = host.greeted();
    // Those that never said HELLO count, and so do Flight's.
    let silent: Vec<Raw> = (0..2).map(|_| host.connect()).collect();
    let listed = async || {
        let mut client = flight(&host.directory()).await;
        client
            .list_flights(Criteria::default())
            .await
            .map(|_| client)
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let by_flight = runtime.block_on(listed()).unwrap();
    let full = host.connect();
    let message = full
        .receive()
        .unwrap()
        .refused("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED");
    assert!(
        message.contains("connections of uid:0") && message.contains("quota of 4 by 1"),
        "{message}"
    );
    full.ended();
    assert!(runtime.block_on(listed()).is_err(), "a fifth, by Flight");
    as_user(OTHER, || {
        put(&mut host.greeted(), "x", 3);
        blocking(async { listed().await.map(drop) }).unwrap();
    });
    let account = first.ok(Op::Stats, json!({}))["account"].clone();
    assert_eq!(account["connections"], 4, "{account}");
    // A Flight client may have tried more than once.
    assert!(number(&account, "/connections_refused") >= 2, "{account}");
    drop((silent, by_flight, runtime));
    host.eventually(&mut first, "their places are free", |stats| {
        number(stats, "/account/connections") == 1
    });
    check_call_of(&host, &mut first);
}

/// That the host serves a new connection of the first user.
fn check_call_of(host: &Served, first: &mut Raw) {
    put(first, "x", 3);
    check_call(&mut host.greeted(), json!("x"), &ramp(3));
}

#[test]
fn streams_of_one_user_leave_places_for_others() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not tested: only root can become another user");
        return;
    }
    let host = Served::with(&[], &[("STRAIT__QUOTA__STREAMS", "2")]);
    host.open_to_all();
    // More than a client takes that does not read.
    let elements = 4_000_000;
    put(&mut host.greeted(), "x", elements);
    let directory = host.directory();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let client = runtime.block_on(flight(&directory));
    let get = || {
        let mut client = client.clone();
        async move { client.do_get(Ticket::new("x")).await }
    };
    let mut stalled: Vec<_> = (0..2).map(|_| runtime.block_on(get()).unwrap()).collect();
    let third = runtime.spawn(get());
    as_user(OTHER, || {
        put(&mut host.greeted(), "theirs", 3);
        let read = blocking(async {
            let mut client = flight(&directory).await;
            let stream = client.do_get(Ticket::new("theirs")).await?.into_inner();
            stream.try_collect::<Vec<_>>().await
        });
        assert!(read.unwrap().len() > 1);
    });
    assert!(!third.is_finished(), "it waits for one of the two");
    let account = host.greeted().ok(Op::Stats, json!({}))["account"].clone();
    assert_eq!(account["streams"], 2, "{account}");
    drop(stalled.pop());
    let third = runtime.block_on(third).unwrap().unwrap();
    drop((third, stalled));
    drop(client);
}
