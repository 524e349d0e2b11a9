use proptest::prelude::*;

use super::frames::{
    ACK, CONTINUATION, END_HEADERS, HEADERS, MAX_FRAME_SIZE, PADDED, PRIORITY, SETTINGS,
};
use super::hpack::{NAME, NAME_HUFFMAN, is_legal};
use super::*;

fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("small").to_be_bytes();
    [&length[1..], &[kind, flags, 0, 0, 0, 1], payload].concat()
}

/// A string without Huffman coding.
fn string(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    if text.len() < 0x7f {
        out.push(u8::try_from(text.len()).expect("below 127"));
    } else {
        out.push(0x7f);
        let mut rest = text.len() - 0x7f;
        while rest >= 0x80 {
            out.push(u8::try_from(rest % 0x80).expect("7 bits") | 0x80);
            rest /= 0x80;
        }
        out.push(u8::try_from(rest).expect("7 bits"));
    }
    out.extend_from_slice(text);
    out
}

/// gRPC C++: literal with incremental indexing, name as text.
fn by_text(value: &[u8]) -> Vec<u8> {
    [vec![0x40], string(NAME), string(value)].concat()
}

fn by_huffman_name(value: &[u8]) -> Vec<u8> {
    [vec![0x00, 0x80 | 8], NAME_HUFFMAN.to_vec(), string(value)].concat()
}

fn by_index(value: &[u8]) -> Vec<u8> {
    [vec![0x41], string(value)].concat()
}

fn connection(frames: &[Vec<u8>]) -> Vec<u8> {
    [PREFACE.to_vec(), frames.concat()].concat()
}

fn repaired(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    AuthorityRepair::default().pass(&mut bytes);
    bytes
}

#[track_caller]
fn check(input: &[Vec<u8>], expected: &[Vec<u8>]) {
    assert_eq!(repaired(&connection(input)), connection(expected));
}

const BAD: &[u8] = b"tmp%2Fa b%2Fflight.sock";
const GOOD: &[u8] = b"tmp_2Fa_b_2Fflight.sock";

#[test]
fn the_value_is_repaired_however_its_name_is_written() {
    for write in [by_text, by_index, by_huffman_name] {
        check(
            &[frame(HEADERS, END_HEADERS, &write(BAD))],
            &[frame(HEADERS, END_HEADERS, &write(GOOD))],
        );
    }
}

#[test]
fn legal_authorities_stay() {
    for legal in ["localhost", "127.0.0.1:443", "[::1]:80", "a-b.c_d~e"] {
        let frames = [frame(HEADERS, END_HEADERS, &by_text(legal.as_bytes()))];
        check(&frames, &frames);
    }
}

#[test]
fn the_longest_frame_is_what_the_settings_say_last() {
    let setting = |id: u16, value: u32| [&id.to_be_bytes()[..], &value.to_be_bytes()].concat();
    let some = [setting(4, 1 << 24), setting(MAX_FRAME_SIZE, 1 << 20)].concat();
    let bytes = connection(&[
        frame(SETTINGS, 0, &some),
        frame(SETTINGS, ACK, &[]),
        frame(0, 0, &setting(MAX_FRAME_SIZE, 7)),
        frame(HEADERS, END_HEADERS, &by_text(BAD)),
        frame(SETTINGS, 0, &[]),
        frame(SETTINGS, 0, &setting(MAX_FRAME_SIZE, 1 << 15)),
    ]);
    let mut repair = AuthorityRepair::default();
    let mut seen = vec![repair.frame_bytes()];
    for mut byte in bytes {
        repair.pass(std::slice::from_mut(&mut byte));
        if seen.last() != Some(&repair.frame_bytes()) {
            seen.push(repair.frame_bytes());
        }
    }
    assert_eq!(seen, [1 << 14, 1 << 20, 1 << 15]);
    assert!(!repair.is_midway());
}

#[test]
fn nothing_else_is_touched() {
    // :path, another literal name, a name with `:authority` as its beginning, and the reverse.
    let fields = [
        vec![0x83, 0x86, 0x3f, 0xe1, 0x1f],
        [vec![0x44], string(b"/a%2Fb")].concat(),
        [vec![0x40], string(b"x-note"), string(b"%")].concat(),
        [vec![0x10], string(b":authority2"), string(b"%")].concat(),
        [vec![0x10], string(b":author"), string(b"%")].concat(),
        vec![0x41, 0x83, b'%', b'%', b'%'], // a Huffman-coded value
        [vec![0x0f, 0x80, 0x01], string(b"%")].concat(), // a name of the dynamic table
    ]
    .concat();
    let frames = [
        frame(4, 0, b"\x00\x04\x00\x10\x00\x00"),
        frame(HEADERS, END_HEADERS, &fields),
        frame(0, 1, &by_text(BAD)),
    ];
    check(&frames, &frames);
}

#[test]
fn several_requests_padding_priority_and_continuations() {
    let headers = |value: &[u8]| {
        let block = by_text(value);
        let (first, rest) = block.split_at(4);
        let (second, third) = rest.split_at(17);
        [
            frame(4, 0, b""),
            frame(
                HEADERS,
                PADDED | PRIORITY,
                &[b"\x03\x00\x00\x00\x00\x10".as_slice(), first, b"%%%"].concat(),
            ),
            frame(CONTINUATION, 0, second),
            frame(CONTINUATION, 0, b""),
            frame(CONTINUATION, END_HEADERS, third),
            frame(0, 0, b"%%"),
            frame(HEADERS, END_HEADERS, &[0x82, 0xbe]), // by its index in the table
            frame(
                HEADERS,
                END_HEADERS | PADDED,
                &[b"\x02".as_slice(), &by_index(value), b"%%"].concat(),
            ),
        ]
    };
    check(&headers(BAD), &headers(GOOD));
}

#[test]
fn it_says_whether_something_has_begun() {
    let bytes = connection(&[
        frame(4, 0, b""),
        frame(HEADERS, 0, &[0x82]),
        frame(CONTINUATION, END_HEADERS, &[0x83]),
        frame(0, 1, b"data"),
    ]);
    // Where each of them ends; between the parts of a header block nothing is whole.
    let whole = [24 + 9, 24 + 9 + 2 * 10, 24 + 9 + 2 * 10 + 13];
    let mut repair = AuthorityRepair::default();
    assert!(repair.is_midway());
    for (at, byte) in bytes.iter().enumerate() {
        repair.pass(&mut [*byte]);
        assert_eq!(!repair.is_midway(), whole.contains(&(at + 1)), "{at}");
    }
    assert_eq!(repair.frames(), 4);
    let mut other = AuthorityRepair::default();
    other.pass(&mut b"GET / HTTP/1.1\r\n\r\n".to_vec());
    assert!(other.is_midway(), "it never becomes a frame");
}

#[test]
fn long_values() {
    let long = b"%2F".repeat(5000);
    let good = b"_2F".repeat(5000);
    check(
        &[frame(HEADERS, END_HEADERS, &by_text(&long))],
        &[frame(HEADERS, END_HEADERS, &by_text(&good))],
    );
}

#[test]
fn what_is_not_http2_is_left_alone() {
    let request = b"GET / HTTP/1.1\r\nHost: a%2Fb\r\n\r\n";
    assert_eq!(repaired(request), request);
    // A frame between HEADERS and its CONTINUATION, padding beyond the frame, a block that
    // ends in a field: from there on nothing is changed.
    let after = frame(HEADERS, END_HEADERS, &by_text(BAD));
    for broken in [
        vec![frame(HEADERS, 0, &[0x82]), frame(0, 0, b"x")],
        vec![frame(HEADERS, END_HEADERS | PADDED, &[9, 0x82])],
        vec![frame(HEADERS, END_HEADERS | PADDED, &[])],
        vec![frame(HEADERS, END_HEADERS, &[0x41, 5, b'a'])],
        vec![frame(
            HEADERS,
            END_HEADERS,
            &[0x41, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01],
        )],
        vec![frame(CONTINUATION, END_HEADERS, &by_text(BAD))],
    ] {
        let frames = [broken, vec![after.clone()]].concat();
        check(&frames, &frames);
    }
}

fn cut(bytes: &[u8], cuts: &[prop::sample::Index]) -> Vec<u8> {
    let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
    at.sort_unstable();
    let mut repair = AuthorityRepair::default();
    let mut out = bytes.to_vec();
    let mut rest = &mut out[..];
    let mut start = 0;
    for end in at {
        let (part, more) = rest.split_at_mut(end - start);
        repair.pass(part);
        (rest, start) = (more, end);
    }
    repair.pass(rest);
    out
}

fn any_frame() -> impl Strategy<Value = Vec<u8>> {
    let bytes = || prop::collection::vec(any::<u8>(), 0..40);
    prop_oneof![
        bytes().prop_map(|value| frame(HEADERS, END_HEADERS, &by_text(&value))),
        bytes().prop_map(|value| frame(HEADERS, END_HEADERS, &by_index(&value))),
        (bytes(), 0_usize..40).prop_map(|(value, at)| {
            let block = by_text(&value);
            let (first, second) = block.split_at(at.min(block.len()));
            [
                frame(HEADERS, 0, first),
                frame(CONTINUATION, END_HEADERS, second),
            ]
            .concat()
        }),
        bytes().prop_map(|data| frame(0, 0, &data)),
        (any::<u8>(), any::<u8>(), bytes())
            .prop_map(|(kind, flags, data)| frame(kind, flags, &data)),
    ]
}

proptest! {
    #[test]
    fn where_the_reads_cut_does_not_matter(
        frames in prop::collection::vec(any_frame(), 0..8),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
    ) {
        let bytes = connection(&frames);
        prop_assert_eq!(cut(&bytes, &cuts), repaired(&bytes));
    }

    #[test]
    fn hostile_bytes_pass_and_a_second_repair_changes_nothing(
        prefaced: bool,
        bytes in prop::collection::vec(any::<u8>(), 0..600),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
    ) {
        let bytes = if prefaced { [PREFACE, &bytes].concat() } else { bytes };
        let once = cut(&bytes, &cuts);
        prop_assert_eq!(once.len(), bytes.len());
        prop_assert_eq!(repaired(&once), once);
    }

    #[test]
    fn every_value_becomes_legal(value in prop::collection::vec(any::<u8>(), 0..300)) {
        let good: Vec<u8> = value.iter().map(|b| if is_legal(*b) { *b } else { b'_' }).collect();
        let input = connection(&[frame(HEADERS, END_HEADERS, &by_text(&value))]);
        let expected = connection(&[frame(HEADERS, END_HEADERS, &by_text(&good))]);
        prop_assert_eq!(repaired(&input), expected);
    }
}
