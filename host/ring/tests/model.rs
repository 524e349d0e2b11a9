//! The protocol with every interleaving of both sides, and every order in which memory may let them see each other's
//! writes, by loom.

use std::collections::HashMap;
// Not loom's, which cannot be dropped once its model has failed.
use std::sync::Arc;

use loom::sync::atomic::{AtomicU32, Ordering, fence};
use loom::sync::{Condvar, Mutex};
use loom::thread;
use strait_protocol::{Ring, Side, Word};
use strait_ring::{Half, Shared};

/// Words that are atomic, and slots of one byte each, which are relaxed: only what is published is seen for sure.
struct Memory {
    words: HashMap<usize, AtomicU32>,
    slots: HashMap<usize, AtomicU32>,
    fences: bool,
}

impl Memory {
    fn new(ring: Ring, fences: bool) -> Self {
        let sides = [Side::Client, Side::Host];
        let words = sides.map(|side| [Word::Tail(side), Word::Asleep(side)]);
        let words = words.concat().into_iter().map(Word::offset);
        let slots = sides.map(|side| [0, 1].map(|count| ring.slot(side, count).0));
        let slots = slots.concat().into_iter();
        let zero = |at| (at, AtomicU32::new(0));
        Self {
            words: words.map(zero).collect(),
            slots: slots
                .map(|at| zero(usize::try_from(at).expect("few")))
                .collect(),
            fences,
        }
    }
}

struct Words(Arc<Memory>);

impl Shared for Words {
    fn load(&self, word: Word) -> u32 {
        self.0.words[&word.offset()].load(Ordering::Acquire)
    }

    fn store(&self, word: Word, value: u32) {
        self.0.words[&word.offset()].store(value, Ordering::Release);
    }

    fn fence(&self) {
        if self.0.fences {
            fence(Ordering::SeqCst);
        }
    }

    fn read(&self, offset: usize, into: &mut [u8]) {
        let slot = self.0.slots[&offset].load(Ordering::Relaxed);
        into[0] = u8::try_from(slot).expect("a byte");
    }

    fn write(&self, offset: usize, bytes: &[u8]) {
        self.0.slots[&offset].store(bytes[0].into(), Ordering::Relaxed);
    }
}

/// One direction of the socket, in which one packet at a time finds room.
#[derive(Default)]
struct Direction {
    packet: Mutex<bool>,
    came: Condvar,
}

impl Direction {
    fn send_now(&self) {
        *self.packet.lock().expect("not poisoned") = true;
        self.came.notify_one();
    }

    fn recv(&self) {
        let mut packet = self.packet.lock().expect("not poisoned");
        while !*packet {
            packet = self.came.wait(packet).expect("not poisoned");
        }
        *packet = false;
    }
}

/// As `Ring::receive`, without a spin: that only looks more often.
fn receive(end: &mut Half<Words>, socket: &Direction) -> u8 {
    let mut into = [0];
    loop {
        if end.take(&mut into).expect("the other side is honest") {
            return into[0];
        }
        end.doze();
        let missed = end.take(&mut into).expect("the other side is honest");
        if !missed {
            socket.recv();
        }
        end.rise();
        if missed {
            return into[0];
        }
    }
}

fn send(end: &mut Half<Words>, socket: &Direction, byte: u8) {
    if end.publish(&[&[byte]]).expect("there is room") {
        socket.send_now();
    }
}

/// `calls` calls of which at most `under_way` are under way.
fn calls(calls: u8, under_way: u8, fences: bool) {
    let ring = Ring::of(1, 1).expect("short");
    let memory = Arc::new(Memory::new(ring, fences));
    let wires = Arc::new([Direction::default(), Direction::default()]);
    let mut host = Half::new(Words(Arc::clone(&memory)), ring, Side::Host);
    let served = Arc::clone(&wires);
    let serving = thread::spawn(move || {
        for _ in 0..calls {
            let asked = receive(&mut host, &served[0]);
            send(&mut host, &served[1], asked + 100);
        }
    });
    let mut client = Half::new(Words(memory), ring, Side::Client);
    let mut answered = 0;
    for call in 1..=calls {
        send(&mut client, &wires[0], call);
        if call - answered == under_way {
            answered += 1;
            assert_eq!(receive(&mut client, &wires[1]), answered + 100);
        }
    }
    while answered < calls {
        answered += 1;
        assert_eq!(receive(&mut client, &wires[1]), answered + 100);
    }
    serving.join().expect("the host's side");
}

fn explored(bound: usize, run: impl Fn() + Send + Sync + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(bound);
    model.check(run);
}

#[test]
fn nothing_is_lost_and_nobody_sleeps_for_ever() {
    explored(3, || calls(3, 1, true));
}

#[test]
fn nor_with_two_under_way() {
    explored(3, || calls(3, 2, true));
}

/// What the fences are for: without them both sides can fall asleep.
#[test]
#[should_panic(expected = "deadlock")]
fn without_fences_it_would_not_be_so() {
    explored(3, || calls(2, 1, false));
}
