//! Certificates of the host and of its clients.

use super::*;

fn with_client_ca() -> Rig {
    Rig::start(|directory, authority| {
        fs::write(directory.path().join("ca.pem"), &authority.pem).unwrap();
        let rights = "[rights]\n\"cert:pipeline\" = [\"put\", \"get\"]\n\"cert:*\" = [\"get\"]\n";
        fs::write(directory.path().join("rights.toml"), rights).unwrap();
        let file = |option: &str, name| [option.to_owned(), path(directory, name)];
        [
            file("--tls-client-ca", "ca.pem"),
            file("--rights", "rights.toml"),
        ]
        .concat()
    })
}

async fn lists(client: &mut Client) -> Result<usize, Status> {
    let flights = client.list_flights(Criteria::default()).await?;
    let flights: Vec<_> = flights.into_inner().try_collect().await?;
    Ok(flights.len())
}

/// An upload without a token.
async fn upload(client: &mut Client, flight: &str) -> Result<(), Status> {
    let messages: Vec<FlightData> = FlightDataEncoderBuilder::new()
        .with_flight_descriptor(Some(name(flight)))
        .build(stream::iter([Ok(ramp(10))]))
        .try_collect()
        .await
        .unwrap();
    let results = client.do_put(stream::iter(messages)).await?.into_inner();
    results.try_collect::<Vec<_>>().await.map(drop)
}

/// Whether nothing of a host is had in that way: neither the connection nor a call on it.
async fn is_shut_out(dial: Dial) -> bool {
    match dial.client().await {
        Err(_) => true,
        Ok(mut client) => lists(&mut client)
            .await
            .is_err_and(|status| status.metadata().get("x-strait-reason").is_none()),
    }
}

#[test]
fn a_clients_certificate_says_who_it_is() {
    let rig = with_client_ca();
    let dial = |authority: &Authority, name: &str| {
        let own = authority.sign(name, DAY);
        Dial::tls(rig.address, &rig.authority.pem, Some(&own))
    };
    blocking(async {
        let mut pipeline = dial(&rig.authority, "pipeline").client().await.unwrap();
        upload(&mut pipeline, "x").await.unwrap();
        assert_eq!(lists(&mut pipeline).await.unwrap(), 1);
        let mut other = dial(&rig.authority, "other").client().await.unwrap();
        assert_eq!(lists(&mut other).await.unwrap(), 0);
        let said = refused(
            upload(&mut other, "y").await,
            Code::PermissionDenied,
            "NO_RIGHT",
        );
        assert!(said.contains("cert:other"), "{said}");
        // A token that nobody knows is not overlooked.
        refused(
            listed(&mut other, "strait_guess").await,
            Code::Unauthenticated,
            "TOKEN_UNKNOWN",
        );

        let stranger = Authority::new("strangers");
        assert!(
            is_shut_out(dial(&stranger, "pipeline")).await,
            "signed by somebody else"
        );
        assert!(is_shut_out(rig.dial()).await, "no certificate");
        assert!(
            is_shut_out(dial(&rig.authority, "a/b")).await,
            "a name that would be another's flight"
        );
        assert!(is_shut_out(Dial::plain(rig.address)).await, "no TLS");
        assert_eq!(lists(&mut pipeline).await.unwrap(), 1);
    });
}

#[test]
fn a_certificate_that_ends_while_connected_ends_its_calls() {
    let rig = with_client_ca();
    let own = rig.authority.sign("pipeline", Duration::from_secs(3));
    blocking(async {
        let dial = Dial::tls(rig.address, &rig.authority.pem, Some(&own));
        let mut client = dial.client().await.unwrap();
        lists(&mut client).await.unwrap();
        tokio::time::sleep(Duration::from_secs(3)).await;
        let said = refused(
            lists(&mut client).await,
            Code::Unauthenticated,
            "CERTIFICATE_EXPIRED",
        );
        assert!(said.contains("pipeline"), "{said}");
        // Nor does it help to connect again: a TLS session that is resumed is not verified anew.
        if let Ok(mut again) = dial.client().await {
            assert!(lists(&mut again).await.is_err());
        }
    });
}

#[test]
fn the_hosts_certificate_is_checked_and_replaced() {
    let mut made = String::new();
    let rig = Rig::start(|directory, _| {
        made = token(directory, &["alice"]);
        vec!["--tokens".into(), path(directory, "tokens.toml")]
    });
    blocking(async {
        let mut old = rig.client().await;
        listed(&mut old, &made).await.unwrap();
        let other = Authority::new("others");
        assert!(
            Dial::tls(rig.address, &other.pem, None)
                .client()
                .await
                .is_err()
        );
        let elsewhere = Dial {
            name: "elsewhere",
            ..rig.dial()
        };
        assert!(elsewhere.client().await.is_err(), "another host's name");

        // Key and certificate change one after the other; what does not fit changes nothing.
        let next = other.sign("localhost", 30 * DAY);
        fs::write(rig.file("cert.pem"), &next.cert).unwrap();
        rig.logged(&["audit", "not accepted", "read before"]);
        listed(&mut rig.client().await, &made).await.unwrap();
        fs::write(rig.file("key.pem"), &next.key).unwrap();
        rig.logged(&["audit", "certificates read again"]);
        assert!(rig.dial().client().await.is_err(), "the old authority");
        let mut new = Dial::tls(rig.address, &other.pem, None)
            .client()
            .await
            .unwrap();
        listed(&mut new, &made).await.unwrap();
        listed(&mut old, &made).await.unwrap();
    });
}
