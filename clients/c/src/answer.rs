//! What kernels give.

use std::ffi::{CStr, CString, c_char};
use std::mem::MaybeUninit;

use parking_lot::Mutex;
use serde_json::json;
use strait_client::wire::Note;
use strait_client::{CallResult, Client as Connected, Rows};

use crate::failure::{Failure, asked, c_text, end, entry};
use crate::pointer::{StaticText, Text, answer, hand_out, hand_out_text};
use crate::segment::Segment;
use crate::tensor::Tensor;

/// What a kernel returned.
#[derive(Debug)]
pub struct Answer {
    client: Connected,
    given: Mutex<Given>,
    ports: Vec<CString>,
    notes: Notes,
    copied_bytes: u64,
    request_id: CString,
    report: String,
}

#[derive(Debug)]
enum Given {
    Call(CallResult),
    Rows(Rows),
}

/// What a kernel had to say, as C is given it.
#[derive(Debug, Default)]
pub(crate) struct Notes(Vec<(CString, CString)>);

impl Notes {
    pub(crate) fn new(notes: &[Note]) -> Self {
        let one = |note: &Note| (c_text(&*note.key), c_text(&*note.text));
        Self(notes.iter().map(one).collect())
    }

    /// The text of the note with that key.
    pub(crate) fn text(&self, key: &Text) -> StaticText {
        let key = key.get("key").unwrap_or_default();
        let found = self
            .0
            .iter()
            .find(|(known, _)| known.to_bytes() == key.as_bytes());
        found.map_or(StaticText::NULL, |(_, text)| StaticText::new(text))
    }

    /// All of them, as INVOKE of docs/protocol.md has them.
    pub(crate) fn report(&self) -> String {
        let one = |(key, text): &(CString, CString)| json!({ "key": key.to_string_lossy(), "text": text.to_string_lossy() });
        let notes: Vec<_> = self.0.iter().map(one).collect();
        json!({ "notes": notes }).to_string()
    }
}

impl Answer {
    pub(crate) fn of_call(client: Connected, result: CallResult) -> Self {
        let report = json!({
            "notes": result.notes,
            "copied_bytes": result.copied_bytes,
            "pages": result.pages,
            "minor_faults": result.minor_faults,
            "slices": result.slices,
            "seconds": result.seconds,
            "request_id": result.request_id,
        });
        Self {
            client,
            ports: result
                .results
                .iter()
                .map(|(port, _)| c_text(&**port))
                .collect(),
            notes: Notes::new(&result.notes),
            copied_bytes: result.copied_bytes,
            request_id: c_text(&*result.request_id),
            report: report.to_string(),
            given: Mutex::new(Given::Call(result)),
        }
    }

    pub(crate) fn of_rows(client: Connected, ports: Vec<CString>, rows: Rows) -> Self {
        let notes = Notes::new(&rows.notes);
        Self {
            client,
            ports,
            copied_bytes: 0,
            request_id: CString::default(),
            report: notes.report(),
            notes,
            given: Mutex::new(Given::Rows(rows)),
        }
    }

    fn of(result: Option<&Self>) -> Result<&Self, Failure> {
        result.ok_or_else(|| Failure::null("result"))
    }

    fn tensor(&self, port: &str) -> Result<Tensor, Failure> {
        let name = self
            .ports
            .iter()
            .find(|known| known.to_bytes() == port.as_bytes());
        let name: &CStr = name.map_or(c"", |name| name);
        Ok(match &*self.given.lock() {
            Given::Call(result) => Tensor::view(name, &result.tensor(port)?),
            Given::Rows(rows) => Tensor::view(name, &rows.tensor(port)?),
        })
    }

    fn take(&self, port: &str) -> Result<Segment, Failure> {
        match &mut *self.given.lock() {
            Given::Call(result) => Segment::given(self.client.clone(), result.take(port)?),
            Given::Rows(_) => Err(Failure::argument(
                "rows of a stream are no segment; copy them, or strait_put them".to_owned(),
            )),
        }
    }
}

/// How many outputs there are; 0 for NULL.
#[unsafe(no_mangle)]
pub extern "C" fn strait_result_count(result: Option<&Answer>) -> usize {
    asked(result, 0, |result| result.ports.len())
}

/// The port of the output at `index`, in the kernel's order; NULL if there is none.
#[unsafe(no_mangle)]
pub extern "C" fn strait_result_port(result: Option<&Answer>, index: usize) -> StaticText {
    asked(result, StaticText::NULL, |result| {
        let port = result.ports.get(index);
        port.map_or(StaticText::NULL, |port| StaticText::new(port))
    })
}

/// The output `port`. It points to the pages that the kernel wrote, or to the few bytes that came in the reply, until strait_result_free.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_result_tensor(
    result: Option<&Answer>,
    port: Text,
    tensor: Option<&mut MaybeUninit<Tensor>>,
) -> Option<Box<Failure>> {
    entry(|| {
        answer(tensor, Tensor::NONE, "tensor", || {
            Answer::of(result)?.tensor(port.get("port")?)
        })
    })
}

/// Takes the output `port` out of the result, to keep it, to give it a name or to call the next kernel with it. Then what a strait_tensor of it points to
/// stays until strait_segment_free.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_result_take(
    result: Option<&Answer>,
    port: Text,
    segment: Option<&mut MaybeUninit<*mut Segment>>,
) -> Option<Box<Failure>> {
    entry(|| {
        hand_out(segment, "segment", || {
            Answer::of(result)?.take(port.get("port")?)
        })
    })
}

/// Bytes of the call's tensors that the host copied; 0 for NULL, and for rows of a stream.
#[unsafe(no_mangle)]
pub extern "C" fn strait_result_copied_bytes(result: Option<&Answer>) -> u64 {
    asked(result, 0, |result| result.copied_bytes)
}

/// The kernel's note under that key; NULL if there is none. "notes" of strait_result_report has all of them.
#[unsafe(no_mangle)]
pub extern "C" fn strait_result_note(result: Option<&Answer>, key: Text) -> StaticText {
    asked(result, StaticText::NULL, |result| result.notes.text(&key))
}

/// The id by which the host's log knows the call; "" for rows of a stream, NULL for NULL.
#[unsafe(no_mangle)]
pub extern "C" fn strait_result_request_id(result: Option<&Answer>) -> StaticText {
    asked(result, StaticText::NULL, |result| {
        StaticText::new(&result.request_id)
    })
}

/// What else the host reported, a JSON object: "notes", "seconds", "pages", "minor_faults" and so on, as in INVOKE of docs/protocol.md.
/// strait_text_free frees the text.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_result_report(
    result: Option<&Answer>,
    text: Option<&mut MaybeUninit<*mut c_char>>,
) -> Option<Box<Failure>> {
    entry(|| hand_out_text(text, "text", || Ok(Answer::of(result)?.report.clone())))
}

/// Ends a result, and the outputs that were not taken out. NULL is fine.
#[unsafe(no_mangle)]
pub extern "C" fn strait_result_free(result: Option<Box<Answer>>) {
    end(result);
}
