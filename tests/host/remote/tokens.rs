//! Calls by token: who is let in, as whom, to do what, until when.

use arrow_flight::HandshakeRequest;
use base64::Engine as _;
use serde_json::{Value, json};

use super::*;

fn with_tokens(words: &[&[&str]]) -> (Rig, Vec<String>) {
    let mut made = Vec::new();
    let rig = Rig::start(|directory, _| {
        made.extend(words.iter().map(|words| token(directory, words)));
        vec!["--tokens".into(), path(directory, "tokens.toml")]
    });
    (rig, made)
}

#[test]
fn each_token_is_somebody_with_rights() {
    let (rig, tokens) = with_tokens(&[
        &["alice", "--can", "put,get,call:scale-*"],
        &["bob", "--can", "get"],
        &["carol", "--can", "admin"],
    ]);
    let [alice, bob, carol] = &tokens[..] else {
        panic!("three tokens")
    };
    blocking(async {
        let mut client = rig.client().await;
        put(&mut client, alice, "x", &ramp(1000)).await.unwrap();
        let expected: Vec<f64> = (0..1000).map(f64::from).collect();
        let found = info(&mut client, alice, name("x")).await.unwrap();
        assert!(
            found.app_metadata.is_empty(),
            "no mapping for somebody far away"
        );
        let ticket = found.endpoint[0].ticket.clone().unwrap();
        assert_eq!(
            get(&mut client, alice, ticket.clone()).await.unwrap(),
            expected
        );
        // On the same connection: each call is its token's.
        assert_eq!(listed(&mut client, alice).await.unwrap(), ["x"]);
        assert!(listed(&mut client, bob).await.unwrap().is_empty());
        refused(
            get(&mut client, bob, ticket).await,
            Code::NotFound,
            "FLIGHT_NOT_FOUND",
        );

        // A kernel on what was put there, and its result.
        let call = |kernel: &str| {
            let body =
                json!({"kernel": kernel, "inputs": {"x": "x"}, "parameters": {"a": 2, "b": 1}});
            FlightDescriptor::new_cmd(body.to_string())
        };
        let called = info(&mut client, alice, call("scale-shift")).await.unwrap();
        let told: Value = serde_json::from_slice(&called.app_metadata).unwrap();
        assert_eq!(told["results"][0]["port"], "y");
        assert_eq!(told["results"][0].get("mapping"), None);
        assert!(called.endpoint[0].app_metadata.is_empty());
        let ticket = called.endpoint[0].ticket.clone().unwrap();
        let doubled: Vec<f64> = expected.iter().map(|x| 2.0 * x + 1.0).collect();
        assert_eq!(get(&mut client, alice, ticket).await.unwrap(), doubled);

        let denied = Code::PermissionDenied;
        let said = refused(
            info(&mut client, alice, call("zscore")).await,
            denied,
            "NO_RIGHT",
        );
        assert!(
            said.contains("token:alice") && said.contains("`call:zscore`"),
            "{said}"
        );
        refused(
            put(&mut client, bob, "y", &ramp(1)).await,
            denied,
            "NO_RIGHT",
        );
        refused(act(&mut client, bob, "drop", "x").await, denied, "NO_RIGHT");
        refused(listed(&mut client, carol).await, denied, "NO_RIGHT");
        // What an operator sees, from afar too.
        let [stats] =
            <[_; 1]>::try_from(act(&mut client, carol, "stats", "").await.unwrap()).unwrap();
        let stats: Value = serde_json::from_slice(&stats).unwrap();
        assert!(stats["process"]["fds"].is_u64());
        let [stats] =
            <[_; 1]>::try_from(act(&mut client, bob, "stats", "").await.unwrap()).unwrap();
        let stats: Value = serde_json::from_slice(&stats).unwrap();
        assert_eq!(stats.get("process"), None);
        // Each is told of the kernels that it may run.
        for (token, count) in [(alice, 1), (bob, 0)] {
            let kernels = act(&mut client, token, "kernels", "").await.unwrap();
            assert_eq!(kernels.len(), count);
        }
        let said = refused(
            act(&mut client, alice, "mapping", "x").await,
            Code::Unimplemented,
            "UNSUPPORTED_OP",
        );
        assert!(said.contains("DoGet"), "{said}");
        act(&mut client, alice, "drop", "x").await.unwrap();
        assert!(listed(&mut client, alice).await.unwrap().is_empty());
    });
}

#[test]
fn whoever_has_no_good_token_is_told_why() {
    let (rig, tokens) = with_tokens(&[&["alice"], &["alice", "--expires", "1s"], &["bob"]]);
    let [alice, short, bob] = &tokens[..] else {
        panic!("three tokens")
    };
    let file = rig.file("tokens.toml");
    let file = file.to_str().unwrap();
    let code = Code::Unauthenticated;
    blocking(async {
        let mut client = rig.client().await;
        let missing = client.list_flights(Criteria::default()).await;
        let said = refused(missing.map(drop), code, "TOKEN_MISSING");
        assert!(said.contains("authorization: Bearer"), "{said}");
        for wrong in ["strait_guess", &format!("{alice}x"), &"x".repeat(8000)] {
            refused(listed(&mut client, wrong).await, code, "TOKEN_UNKNOWN");
        }
        let mut request = Request::new(Criteria::default());
        let basic = base64::engine::general_purpose::STANDARD.encode("alice:guess");
        let value = format!("Basic {basic}").parse().unwrap();
        request.metadata_mut().insert("authorization", value);
        refused(
            client.list_flights(request).await.map(drop),
            code,
            "TOKEN_UNKNOWN",
        );
        tokio::time::sleep(Duration::from_millis(1100)).await;
        refused(listed(&mut client, short).await, code, "TOKEN_EXPIRED");

        // Revoked while its connection stands.
        listed(&mut client, alice).await.unwrap();
        listed(&mut client, bob).await.unwrap();
        assert_eq!(
            strait(&["token", "rm", "alice", "--tokens", file]).0,
            Some(0)
        );
        rig.logged(&["audit", "token revoked", "alice"]);
        refused(listed(&mut client, alice).await, code, "TOKEN_REVOKED");
        listed(&mut client, bob).await.unwrap();

        // One that is made meanwhile counts; a broken file changes nothing.
        let (_, made, _) = strait(&["token", "new", "carol", "--tokens", file]);
        rig.logged(&["audit", "token made", "carol"]);
        let carol = made.trim();
        listed(&mut client, carol).await.unwrap();
        std::fs::write(file, "[[token").unwrap();
        rig.logged(&["audit", "still holds"]);
        listed(&mut client, carol).await.unwrap();
        rig.host.signal(rustix::process::Signal::HUP);
        rig.logged(&["SIGHUP"]);
        listed(&mut client, carol).await.unwrap();
    });
    let log = rig.host.log();
    assert!(
        tokens.iter().all(|token| !log.contains(token.as_str())),
        "no token is logged"
    );
    assert!(log.contains("tokens were refused"), "they are counted");
}

#[test]
fn a_handshake_gives_the_token_back() {
    let (rig, tokens) = with_tokens(&[&["alice"]]);
    blocking(async {
        let mut client = rig.client().await;
        let basic = format!("alice:{}", tokens[0]);
        let basic = base64::engine::general_purpose::STANDARD.encode(basic);
        let mut request = Request::new(stream::iter([HandshakeRequest::default()]));
        let value = format!("Basic {basic}").parse().unwrap();
        request.metadata_mut().insert("authorization", value);
        let response = client.handshake(request).await.unwrap();
        let given = response.metadata().get("authorization").unwrap();
        assert_eq!(given.to_str().unwrap(), format!("Bearer {}", tokens[0]));
        let none = stream::iter([HandshakeRequest::default()]);
        refused(
            client.handshake(none).await.map(drop),
            Code::Unauthenticated,
            "TOKEN_MISSING",
        );
    });
}

#[test]
fn rights_of_users_and_groups_change_under_them() {
    let mut made = Vec::new();
    let rig = Rig::start(|directory, _| {
        made.push(token(directory, &["alice", "--can", "get"]));
        let rights = directory.path().join("rights.toml");
        fs::write(
            &rights,
            "[groups]\nlab = [\"token:alice\"]\n[rights]\n\"group:lab\" = [\"put\"]\n",
        )
        .unwrap();
        let file = |option: &str, name| [option.to_owned(), path(directory, name)];
        [
            file("--tokens", "tokens.toml"),
            file("--rights", "rights.toml"),
        ]
        .concat()
    });
    blocking(async {
        let mut client = rig.client().await;
        put(&mut client, &made[0], "x", &ramp(10)).await.unwrap();
        fs::write(rig.file("rights.toml"), "").unwrap();
        rig.logged(&["audit", "rights.toml", "read again"]);
        refused(
            put(&mut client, &made[0], "y", &ramp(10)).await,
            Code::PermissionDenied,
            "NO_RIGHT",
        );
        assert_eq!(listed(&mut client, &made[0]).await.unwrap(), ["x"]);
    });
}

#[test]
fn whether_a_host_takes_calls_is_told_to_everybody() {
    use tonic_health::pb::health_client::HealthClient;
    use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};
    let (rig, _) = with_tokens(&[&["alice"]]);
    blocking(async {
        let endpoint = Endpoint::from_static("http://localhost");
        let channel = endpoint.connect_with_connector(rig.dial()).await.unwrap();
        let mut health = HealthClient::new(channel);
        for service in ["", "arrow.flight.protocol.FlightService"] {
            let request = HealthCheckRequest {
                service: service.to_owned(),
            };
            let told = health.check(request).await.unwrap().into_inner();
            assert_eq!(told.status(), ServingStatus::Serving, "{service}");
        }
        let request = HealthCheckRequest {
            service: "other".to_owned(),
        };
        let none = health.check(request).await.unwrap_err();
        assert_eq!(none.code(), Code::NotFound);
    });
}

#[test]
fn a_file_of_tokens_is_kept_by_the_command_line() {
    let directory = TempDir::new().unwrap();
    let file = path(&directory, "tokens.toml");
    let ask =
        |words: &[&str]| strait(&[&["token"], words, &["--tokens", &file, "--json"]].concat());
    let (code, out, _) = ask(&["new", "alice", "--can", "get,share", "--expires", "30d"]);
    let made: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &made["can"]), (Some(0), &json!(["get", "share"])));
    let text = fs::read_to_string(&file).unwrap();
    assert!(
        !text.contains(made["token"].as_str().unwrap()),
        "the token itself is not kept"
    );
    let (_, out, _) = ask(&["ls"]);
    let listed: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(listed["tokens"][0]["principal"], "token:alice");
    assert_eq!(listed["tokens"][0]["state"], "good");
    let (code, _, _) = ask(&["rm", made["id"].as_str().unwrap()]);
    assert_eq!(code, Some(0));
    for (words, exit, says) in [
        (&["rm", "alice"][..], 3, "still good"),
        (&["new", "a/b"], 2, "name"),
        (&["new", "a", "--can", "fly"], 2, "not a right"),
        (&["new", "a", "--expires", "soon"], 2, "soon"),
        (&["new", "a", "--expires", "9000y"], 2, "100y"),
        (&["new", "a", "--expires", "1ms"], 2, "1s"),
    ] {
        let (code, _, error) = ask(words);
        assert_eq!(code, Some(exit), "{words:?}: {error}");
        assert!(error.contains(says), "{words:?}: {error}");
    }
    let (code, _, error) = strait(&["token", "ls"]);
    assert_eq!(code, Some(2), "{error}");
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o666)).unwrap();
    let (code, _, error) = ask(&["ls"]);
    assert!(code == Some(3) && error.contains("chmod go-w"), "{error}");
}
