//! Replays the examples at the end of `docs/protocol.md`, in order, against a real host: what the
//! client sends goes out byte for byte, what comes back must be what the document says.

use std::collections::{HashMap, HashSet};
use std::fmt::Write;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::OFlags;
use strait_client::wire::{HEADER_BYTES, Op};

use crate::served::{FINAL, PAGE, Raw, Served, memfd, seal};
use crate::{guest, served};

fn document() -> String {
    std::fs::read_to_string("docs/protocol.md").unwrap()
}

/// A fenced block of the examples.
struct Block<'a> {
    line: usize,
    info: &'a str,
    lines: Vec<&'a str>,
}

impl Block<'_> {
    /// What differs, with the place in the document.
    fn differs(&self, what: &str, document: &str, really: &str) -> String {
        format!(
            "docs/protocol.md:{}: {}: {what}\n  document: {document}\n  really:   {really}",
            self.line, self.info
        )
    }

    /// The lines of the header, the body, and the lines of the payload, in hex. An empty line stands for an empty body.
    fn split(&self) -> (&[&str], &str, &[&str]) {
        let is_body = |line: &&str| line.is_empty() || line.starts_with('{');
        match self.lines.iter().position(is_body) {
            Some(at) => (&self.lines[..at], self.lines[at], &self.lines[at + 1..]),
            None => (&self.lines, "", &[]),
        }
    }

    fn body(&self) -> &str {
        self.split().1
    }

    fn payload(&self) -> Vec<u8> {
        let words = self.split().2.iter();
        words
            .flat_map(|line| line.split_ascii_whitespace())
            .map(|hex| u8::from_str_radix(hex, 16).unwrap())
            .collect()
    }
}

/// The blocks after the heading "Examples", up to the next heading.
fn blocks(document: &str) -> Vec<Block<'_>> {
    let mut lines = document
        .lines()
        .zip(1..)
        .skip_while(|(line, _)| *line != "## Examples")
        .skip(1)
        .peekable();
    assert!(
        lines.peek().is_some(),
        "the document has no heading \"## Examples\""
    );
    let mut blocks = Vec::new();
    while let Some((text, line)) = lines.next() {
        assert!(
            !text.starts_with("## "),
            "docs/protocol.md:{line}: the examples are the last chapter"
        );
        if let Some(info) = text.strip_prefix("```") {
            let lines = lines
                .by_ref()
                .map(|(text, _)| text)
                .take_while(|text| *text != "```")
                .collect();
            blocks.push(Block { line, info, lines });
        }
    }
    blocks
}

/// The placeholder that `template` begins with, and its length in bytes.
fn placeholder(template: &str) -> Option<(&str, usize)> {
    let (word, _) = template.strip_prefix('<')?.split_once('>')?;
    let fine = !word.is_empty()
        && word
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_:".contains(&b));
    fine.then_some((word, word.len() + 2))
}

/// What the document's placeholders stand for.
struct Words(HashMap<String, String>);

impl Words {
    /// `template` with the words that are known by now.
    fn fill(&self, block: &Block<'_>) -> String {
        let mut filled = String::new();
        let mut rest = block.body();
        while let Some(next) = rest.chars().next() {
            let known = placeholder(rest).map(|(word, length)| {
                (
                    self.0.get(word).unwrap_or_else(|| {
                        panic!(
                            "docs/protocol.md:{}: nothing told what <{word}> is",
                            block.line
                        )
                    }),
                    length,
                )
            });
            match known {
                Some((value, length)) => {
                    filled.push_str(value);
                    rest = &rest[length..];
                }
                None => {
                    filled.push(next);
                    rest = &rest[next.len_utf8()..];
                }
            }
        }
        filled
    }

    /// Whether `text` is what `template` says; learns the words that are new.
    fn matches(&mut self, template: &str, text: &str) -> bool {
        let (mut template, mut text) = (template, text);
        while let Some(next) = template.chars().next() {
            let length = match placeholder(template) {
                None => {
                    let Some(rest) = text.strip_prefix(next) else {
                        return false;
                    };
                    (template, text) = (&template[next.len_utf8()..], rest);
                    continue;
                }
                Some((word, length)) => {
                    let Some(found) = self.meaning(word, text) else {
                        return false;
                    };
                    text = &text[found..];
                    length
                }
            };
            template = &template[length..];
        }
        text.is_empty()
    }

    /// How many bytes of `text` the placeholder stands for; none if it cannot.
    fn meaning(&mut self, word: &str, text: &str) -> Option<usize> {
        if let Some(known) = self.0.get(word) {
            return text.starts_with(known.as_str()).then_some(known.len());
        }
        let span = |is: fn(u8) -> bool| text.bytes().take_while(|b| is(*b)).count();
        let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        match word {
            "n" => Some(span(|b| b.is_ascii_digit())).filter(|n| *n > 0),
            "s" => {
                let length = span(|b| b.is_ascii_digit() || b".e-".contains(&b));
                text[..length]
                    .parse::<f64>()
                    .is_ok_and(|seconds| seconds >= 0.0)
                    .then_some(length)
            }
            "text" => {
                let mut escaped = false;
                text.bytes().position(|b| {
                    let ends = b == b'"' && !escaped;
                    escaped = b == b'\\' && !escaped;
                    ends
                })
            }
            _ if word == "host_id" || word.starts_with("segment:") => {
                let length = if word == "host_id" {
                    span(|b| b == b'-' || b.is_ascii_hexdigit())
                } else {
                    span(hex)
                };
                let value = &text[..length];
                let right = if word == "host_id" {
                    length == 36
                } else {
                    length == 32
                };
                let new = right && !self.0.values().any(|other| other == value);
                new.then(|| {
                    self.0.insert(word.to_owned(), value.to_owned());
                    length
                })
            }
            other => panic!("the document does not say what <{other}> is"),
        }
    }
}

/// The header's bytes, some of which may be `..`. Lines of 16, of which those of zeros may be missing.
fn header(block: &Block<'_>) -> [Option<u8>; HEADER_BYTES] {
    let mut header = [Some(0); HEADER_BYTES];
    let lines = block.split().0;
    let bytes: Vec<_> = lines
        .iter()
        .flat_map(|line| line.split_ascii_whitespace())
        .map(|hex| (hex != "..").then(|| u8::from_str_radix(hex, 16).unwrap()))
        .collect();
    assert!(
        !bytes.is_empty() && bytes.len() == 16 * lines.len() && bytes.len() <= HEADER_BYTES,
        "docs/protocol.md:{}: a header is one to three lines of 16 bytes",
        block.line
    );
    header[..bytes.len()].copy_from_slice(&bytes);
    header
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::new();
    for (index, byte) in bytes.iter().enumerate() {
        let gap = if index == 0 {
            ""
        } else if index % 4 == 0 {
            "  "
        } else {
            " "
        };
        write!(text, "{gap}{byte:02x}").unwrap();
    }
    text
}

fn op_name(op: u8) -> String {
    Op::try_from(op).map_or_else(
        |error| error.to_string(),
        |op| format!("{op:?}").to_uppercase(),
    )
}

/// A host and what has been said so far.
struct Replay {
    host: Served,
    first: Raw,
    /// On which a part of the examples plays.
    other: Option<Raw>,
    /// The socket of the last PREPARE.
    calls: Option<Raw>,
    words: Words,
    /// The last descriptor of each segment, by its placeholder.
    fds: HashMap<String, OwnedFd>,
    ops: HashSet<String>,
}

impl Replay {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let plugins = ["spins", "traps"].map(|name| {
            let text = std::fs::read_to_string(format!("tests/guests/{name}.wat")).unwrap();
            let path = directory.path().join(name);
            std::fs::write(&path, guest::component(name, &text)).unwrap();
            path.to_str().unwrap().to_owned()
        });
        let host = Served::start(&["--plugin", &plugins[0], "--plugin", &plugins[1]]);
        let (filler, published) = match std::env::var_os("STRAIT_TEST_WORKERS") {
            Some(_) => ("worker", "none"),
            None => ("host", "host"),
        };
        let known = [
            ("filler", filler.to_owned()),
            ("published", published.to_owned()),
            ("directory", host.directory().display().to_string()),
            ("uid", rustix::process::geteuid().as_raw().to_string()),
            ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ];
        let words = Words(known.map(|(word, value)| (word.to_owned(), value)).into());
        Self {
            first: host.connect(),
            host,
            other: None,
            calls: None,
            words,
            fds: HashMap::new(),
            ops: HashSet::new(),
        }
    }

    /// # Errors
    /// What differs between the document and the host.
    fn play(&mut self, block: &Block<'_>) -> Result<(), String> {
        let words: Vec<_> = block.info.split_ascii_whitespace().collect();
        match words.as_slice() {
            ["frame", "client", op, beside @ ..] => self.client(block, op, beside),
            ["frame", "host", op, beside @ ..] => self.host(block, op, beside),
            ["memory", what, segment, offset, "float64"] => {
                self.memory(block, what, segment, offset.parse().unwrap())
            }
            _ => Err(block.differs(
                "not a frame and not a tensor",
                block.info,
                "nothing that can be replayed",
            )),
        }
    }

    /// Over which a block's frame goes.
    fn socket(&self, beside: &[&str]) -> &Raw {
        match beside {
            [.., "on", "that", "socket"] => self.calls.as_ref().expect("something is prepared"),
            _ => self.other.as_ref().unwrap_or(&self.first),
        }
    }

    fn client(&mut self, block: &Block<'_>, op: &str, beside: &[&str]) -> Result<(), String> {
        let header = header(block).map(|byte| byte.expect("a client's header has no `..`"));
        let body = self.words.fill(block);
        if op_name(header[3]) != op {
            return Err(block.differs("the header's op", op, &op_name(header[3])));
        }
        let mut right = header;
        let payload_bytes = u32::from_le_bytes(header[12..16].try_into().unwrap());
        let payload = block.payload();
        let rest = u32::try_from(body.len() + payload.len()).unwrap();
        let body_bytes = rest - payload_bytes;
        right[8..12].copy_from_slice(&body_bytes.to_le_bytes());
        if right != header {
            return Err(block.differs("the header's body_bytes", &hex(&header), &hex(&right)));
        }
        let fd = match beside {
            ["on", "a", "new", "connection"] => {
                self.other = Some(self.host.connect());
                None
            }
            ["+memfd"] => Some(floats()),
            [] | ["on", "that", "socket"] => None,
            other => panic!("docs/protocol.md:{}: {other:?}", block.line),
        };
        let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
        self.socket(beside)
            .socket
            .send(&[&header, body.as_bytes(), &payload], &fds)
            .map_err(|error| block.differs("it cannot be sent", "", &error.to_string()))?;
        self.ops.insert(op.to_owned());
        Ok(())
    }

    fn host(&mut self, block: &Block<'_>, op: &str, beside: &[&str]) -> Result<(), String> {
        if beside.ends_with(&["after", "SIGTERM", "then", "closed"]) {
            self.host.terminate();
        }
        let closes = beside.ends_with(&["then", "closed"]);
        let connection = self.socket(beside);
        let Some(frame) = connection.receive() else {
            return Err(block.differs("a frame", op, "the end of the connection"));
        };
        let expected = header(block);
        let same = expected
            .iter()
            .zip(frame.header)
            .all(|(expected, byte)| expected.is_none_or(|e| e == byte));
        if !same || op_name(frame.header[3]) != op {
            let really = format!(
                "{} {}\n  its body: {}",
                op_name(frame.header[3]),
                hex(&frame.header),
                frame.text
            );
            return Err(block.differs("the header", &format!("{op} {}", block.lines[0]), &really));
        }
        if block.payload() != frame.payload {
            return Err(block.differs("the payload", &hex(&block.payload()), &hex(&frame.payload)));
        }
        let modes: Vec<_> = beside
            .iter()
            .copied()
            .filter(|word| word.starts_with('+'))
            .collect();
        let really: Vec<_> = frame
            .fds
            .iter()
            .map(|fd| {
                let mode = rustix::fs::fcntl_getfl(fd).unwrap() & OFlags::RWMODE;
                match rustix::net::sockopt::socket_type(fd) {
                    Ok(_) => "+socket",
                    Err(_) if mode == OFlags::RDWR => "+rw",
                    Err(_) => "+ro",
                }
            })
            .collect();
        if modes != really {
            return Err(block.differs("the descriptors", &modes.join(" "), &really.join(" ")));
        }
        if closes {
            connection.ended();
        }
        if !self.words.matches(block.body(), &frame.text) {
            return Err(block.differs("the body", block.body(), &frame.text));
        }
        if closes {
            self.other = None;
        }
        let is_socket = modes.first() == Some(&"+socket");
        let fd = frame.fds.into_iter().next();
        if is_socket {
            self.calls = fd.map(|fd| Raw::over(fd.into()));
        } else if let Some(fd) = fd {
            let at = block
                .body()
                .rfind("<segment:")
                .expect("a descriptor is of a segment");
            let (segment, _) = placeholder(&block.body()[at..]).unwrap();
            self.fds.insert(format!("<{segment}>"), fd);
        }
        self.ops.insert(op.to_owned());
        Ok(())
    }

    fn memory(
        &self,
        block: &Block<'_>,
        what: &str,
        segment: &str,
        offset: u64,
    ) -> Result<(), String> {
        let numbers: Vec<f64> = block.lines[0]
            .split_ascii_whitespace()
            .map(|number| number.parse().unwrap())
            .collect();
        let fd = self.fds.get(segment).unwrap_or_else(|| {
            panic!(
                "docs/protocol.md:{}: no descriptor of {segment}",
                block.line
            )
        });
        match what {
            "write" => {
                let bytes: Vec<u8> = numbers.iter().flat_map(|v| v.to_le_bytes()).collect();
                served::write(fd.as_fd(), offset, &bytes);
                Ok(())
            }
            "read" => {
                let really = served::read(fd.as_fd(), offset, numbers.len());
                if really == numbers {
                    Ok(())
                } else {
                    Err(block.differs("the memory", block.lines[0], &format!("{really:?}")))
                }
            }
            other => panic!("docs/protocol.md:{}: memory {other}", block.line),
        }
    }
}

/// The memfd that the examples describe.
fn floats() -> OwnedFd {
    let fd = memfd(2 * PAGE);
    let bytes: Vec<u8> = [1_f32, 2.0, 3.0, 4.0]
        .iter()
        .flat_map(|v| v.to_le_bytes())
        .collect();
    served::write(fd.as_fd(), PAGE, &bytes);
    seal(&fd, FINAL);
    fd
}

/// Plays all of it; answers the ops that occurred.
fn replay(document: &str) -> Result<HashSet<String>, String> {
    let mut replay = Replay::new();
    for block in blocks(document) {
        replay.play(&block)?;
    }
    replay.host.ended();
    Ok(replay.ops)
}

/// The document's table of ops: number, name, direction.
fn table(document: &str) -> Vec<(u8, &str, &str)> {
    document
        .lines()
        .filter_map(|line| {
            let mut cells = line.strip_prefix("| ")?.split(" |");
            let number = cells.next()?.trim().parse().ok()?;
            Some((number, cells.next()?.trim(), cells.next()?.trim()))
        })
        .filter(|(_, name, _)| name.chars().all(|c| c.is_ascii_uppercase()) && !name.is_empty())
        .collect()
}

#[test]
fn the_examples_are_what_a_host_does() {
    let document = document();
    let ops = replay(&document).unwrap_or_else(|differs| panic!("{differs}"));
    let table = table(&document);
    assert!(table.len() > 20, "{table:?}");
    for (number, name, direction) in table {
        assert_eq!(op_name(number), name, "the table of ops");
        let streams =
            ["CHUNK", "LAST"].contains(&name) && std::env::var_os("STRAIT_TEST_WORKERS").is_some();
        assert!(
            direction == "reserved" || streams || ops.contains(name),
            "no example has {name}"
        );
    }
}

#[test]
fn a_wrong_byte_in_the_examples_is_found() {
    let document = document();
    for (right, wrong, found) in [
        (
            "53 54 02 01  01 00 00 00  40",
            "53 54 02 01  01 00 00 00  41",
            "body_bytes",
        ),
        (
            "53 54 02 03  02 00 00 00",
            "53 54 02 03  03 00 00 00",
            "the header",
        ),
        (
            "\"offset\":65536,\"length\":48}]},\"lease\":1",
            "\"offset\":65536,\"length\":49}]},\"lease\":1",
            "the body",
        ),
        ("\"session\":\"1\"", "\"session\": \"1\"", "the body"),
        ("frame host OK +rw", "frame host OK +ro", "the descriptors"),
        ("3 5 7 9 11 13", "3 5 7 9 11 14", "the memory"),
    ] {
        let (before, examples) = document.split_once("## Examples").unwrap();
        assert!(examples.contains(right), "the examples have no {right:?}");
        let changed = format!("{before}## Examples{}", examples.replacen(right, wrong, 1));
        let differs = replay(&changed).expect_err(wrong);
        assert!(differs.contains(found), "{right:?}: {differs}");
    }
}

#[test]
fn a_reply_is_in_the_trace_of_its_request() {
    let mut replay = Replay::new();
    let client = &mut replay.first;
    client.hello();
    let x = client.create(8);
    let traced = |sequence: u32, op: Op, body: &str| {
        let mut packet = served::packet(op as u8, sequence, body.as_bytes());
        for (at, byte) in packet[16..41].iter_mut().enumerate() {
            *byte = u8::try_from(at).unwrap() + 1 + op as u8;
        }
        packet
    };
    let input = format!(r#""inputs":{{"x":{{"segment":"{}"}}}}"#, x.segment);
    for (sequence, op, body, answer) in [
        (1, Op::Ping, "{}".to_owned(), Op::Ok),
        (2, Op::Lookup, r#"{"name":"x"}"#.to_owned(), Op::Error),
        (3, Op::Prepare, String::new(), Op::Error),
        (4, Op::Cancel, r#"{"sequence":9}"#.to_owned(), Op::Ok),
        (
            5,
            Op::Invoke,
            format!(r#"{{"kernel":"scale-shift",{input}}}"#),
            Op::Ok,
        ),
        (
            6,
            Op::Invoke,
            format!(r#"{{"kernel":"traps/k",{input}}}"#),
            Op::Error,
        ),
        (0, Op::Ping, "{}".to_owned(), Op::Error),
    ] {
        let asked = traced(sequence, op, &body);
        client.send(&asked, &[]);
        let reply = client.receive().unwrap();
        assert_eq!((reply.sequence(), reply.op()), (sequence, answer));
        assert_eq!(reply.header[16..], asked[16..HEADER_BYTES], "{op:?}");
    }
    let reply = client.ask(Op::Ping, serde_json::json!({}));
    assert_eq!(reply.header[16..], [0; HEADER_BYTES - 16]);
    // Its LOOKUP: op 6, so the first byte of the trace's id is 7.
    let log = replay.host.log();
    let refused = log.lines().find(|line| line.contains("FLIGHT_NOT_FOUND"));
    let refused = refused.unwrap_or_else(|| panic!("no refusal in {log}"));
    assert!(
        refused.contains("trace_id=0708090a0b0c0d0e0f10111213141516"),
        "{refused}"
    );
}
