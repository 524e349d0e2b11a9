//! The client against a peer whose every frame the test decides.

mod calls;
mod connection;
mod inline;
mod memory;
#[path = "../peer/mod.rs"]
mod peer;
mod prepared;
mod ring;

use peer::{Peer, connected};
use strait_client::{Client, Options};

fn greeted() -> (Client, Peer) {
    connected(&Options::default())
}

/// Runs `client_side` on a thread of its own beside the peer's part, and gives its result.
fn beside<T: Send>(client_side: impl FnOnce() -> T + Send, peer_side: impl FnOnce()) -> T {
    std::thread::scope(|scope| {
        let client = scope.spawn(client_side);
        peer_side();
        client.join().expect("the client does not panic")
    })
}
