//! Memory with tensors: to be filled, of a flight, or of a result.

use std::ffi::{CString, c_void};
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use strait_client::{Client as Connected, Error, Lease, OpenSegment, Output, TensorView};

use crate::client::{Client, milliseconds};
use crate::failure::{Failure, asked, c_text, end, entry};
use crate::operation::{Operation, done, hand_out_started};
use crate::pointer::{Many, Text, answer, hand_out};
use crate::tensor::Tensor;

/// Memory with one or more tensors: one to be filled (strait_create), a flight (strait_map), or a result (strait_result_take). A
/// small result is memory of this process alone, and is used in the same way.
///
/// What its tensors point to stays until strait_segment_free.
#[derive(Debug)]
pub struct Segment {
    client: Connected,
    memory: Arc<Memory>,
    names: Vec<CString>,
}

/// What calls and operations share with the handle.
#[derive(Debug)]
pub(crate) struct Memory(Mutex<Option<Arc<Held>>>);

#[derive(Debug)]
pub(crate) enum Held {
    Open(OpenSegment),
    Given(Output),
}

impl Held {
    fn tensors(&self) -> Result<Vec<TensorView<'_>>, Failure> {
        Ok(match self {
            Self::Open(segment) => {
                let places = &segment.mapping().tensors;
                let views = places.iter().map(|place| segment.tensor(&place.name));
                views.collect::<Result<_, Error>>()?
            }
            Self::Given(Output::Mapped(segment)) => segment.tensors()?.collect(),
            Self::Given(output @ Output::Inline(_)) => vec![output.tensor()?],
        })
    }

    fn lease(&self) -> Option<&Lease> {
        match self {
            Self::Open(segment) => Some(segment.lease()),
            Self::Given(output) => output.segment().map(|segment| segment.lease()),
        }
    }
}

impl Memory {
    /// For reading, and so that nobody writes, as long as the result lives.
    pub(crate) fn share(&self) -> Result<Arc<Held>, Failure> {
        let held = self.0.lock();
        let held = held.as_ref();
        Ok(Arc::clone(held.ok_or_else(|| {
            Failure::state("the segment is being published; finish that first")
        })?))
    }

    /// For the one who changes it; whoever takes it puts it back.
    fn take(self: &Arc<Self>) -> Result<Taken, Failure> {
        let mut held = self.0.lock();
        let busy = "a call or an operation that is under way uses the segment; finish that first";
        match held.take().map(Arc::try_unwrap) {
            Some(Ok(taken)) => Ok(Taken {
                held: Some(taken),
                home: Arc::clone(self),
            }),
            Some(Err(shared)) => {
                *held = Some(shared);
                Err(Failure::state(busy))
            }
            None => Err(Failure::state(busy)),
        }
    }
}

/// A segment's memory in the hands of one who changes it.
struct Taken {
    held: Option<Held>,
    home: Arc<Memory>,
}

impl Drop for Taken {
    fn drop(&mut self) {
        *self.home.0.lock() = self.held.take().map(Arc::new);
    }
}

impl Segment {
    fn new(client: Connected, held: Held) -> Result<Self, Failure> {
        let tensors = held.tensors()?;
        let names = tensors.iter().map(|tensor| c_text(tensor.name())).collect();
        drop(tensors);
        Ok(Self {
            client,
            memory: Arc::new(Memory(Mutex::new(Some(Arc::new(held))))),
            names,
        })
    }

    pub(crate) fn given(client: Connected, output: Output) -> Result<Self, Failure> {
        Self::new(client, Held::Given(output))
    }

    pub(crate) fn of(segment: Option<&Self>) -> Result<&Self, Failure> {
        segment.ok_or_else(|| Failure::null("segment"))
    }

    pub(crate) fn memory(&self) -> Arc<Memory> {
        Arc::clone(&self.memory)
    }

    /// The tensor that `which` chooses of all.
    fn tensor(
        &self,
        which: impl FnOnce(&[TensorView<'_>]) -> Option<usize>,
    ) -> Result<Tensor, Failure> {
        let held = self.memory.share()?;
        let tensors = held.tensors()?;
        let found =
            which(&tensors).and_then(|index| Some((self.names.get(index)?, tensors.get(index)?)));
        let known = || -> Vec<&str> { tensors.iter().map(TensorView::name).collect() };
        match found {
            Some((name, tensor)) => Ok(Tensor::view(name, tensor)),
            None => Err(Failure::argument(format!(
                "no such tensor in the segment; it has {}",
                known().join(", ")
            ))),
        }
    }

    fn fill(&self, name: &Text) -> Result<(*mut c_void, u64), Failure> {
        let name = name.optional("name")?;
        let mut taken = self.memory.take()?;
        let Some(Held::Open(segment)) = &mut taken.held else {
            return Err(Failure::state(
                "the segment is read-only: it is a flight or a result",
            ));
        };
        let first = segment.mapping().tensors.first();
        let first = first.map(|place| place.name.clone()).unwrap_or_default();
        let bytes = segment.bytes_mut(name.unwrap_or(&first))?;
        Ok((bytes.as_mut_ptr().cast(), bytes.len() as u64))
    }

    fn publish(&self, name: &str, replace: bool) -> Result<(), Failure> {
        if let Held::Given(output) = &*self.memory.share()? {
            self.client.publish_result(output, name, replace)?;
            return Ok(());
        }
        let mut taken = self.memory.take()?;
        if let Some(Held::Open(segment)) = &mut taken.held {
            segment.publish(name, replace)?;
        }
        Ok(())
    }

    fn publish_start(&self, name: String, replace: bool) -> Result<Operation, Failure> {
        let client = self.client.asynchronous();
        let shared = self.memory.share()?;
        if matches!(*shared, Held::Given(_)) {
            return Operation::start(async move {
                if let Held::Given(output) = &*shared {
                    client.publish_result(output, &name, replace).await?;
                }
                done(())
            });
        }
        drop(shared);
        let mut taken = self.memory.take()?;
        Operation::start(async move {
            if let Some(Held::Open(segment)) = &mut taken.held {
                client.publish(segment, &name, replace).await?;
            }
            done(())
        })
    }
}

/// The tensors of a segment to be made.
fn to_make(tensors: &[Tensor]) -> Result<Vec<strait_client::NewTensor>, Failure> {
    if tensors.is_empty() {
        return Err(Failure::argument(
            "a segment has at least one tensor".to_owned(),
        ));
    }
    let each = tensors.iter().enumerate();
    each.map(|(index, tensor)| tensor.new_tensor(index))
        .collect()
}

/// Makes a segment with room for `count` tensors, to be filled in place (strait_segment_fill): it then goes to a kernel or under a name without
/// a copy. `tensors` are specs with names; all have the same size of the first axis. The elements are zero.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_create(
    client: Option<&Client>,
    tensors: Many<Tensor>,
    count: usize,
    segment: Option<&mut MaybeUninit<*mut Segment>>,
) -> Option<Box<Failure>> {
    entry(|| {
        hand_out(segment, "segment", || {
            let client = Client::of(client)?;
            let made = client.create(&to_make(tensors.of(count, "tensors")?)?)?;
            Segment::new(client.clone(), Held::Open(made))
        })
    })
}

/// Starts a strait_create; strait_finish_segment ends it.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_create_start(
    client: Option<&Client>,
    tensors: Many<Tensor>,
    count: usize,
    operation: Option<&mut MaybeUninit<*mut Operation>>,
) -> Option<Box<Failure>> {
    hand_out_started(operation, || {
        let client = Client::of(client)?.clone();
        let tensors = to_make(tensors.of(count, "tensors")?)?;
        Operation::start(async move {
            let made = client.asynchronous().create(&tensors).await?;
            done(Segment::new(client, Held::Open(made))?)
        })
    })
}

/// Where the elements of the tensor `name` (NULL: the first) of a strait_create are to be written, and how many bytes there are. The address stays
/// the same until strait_segment_free; nobody may write there while a call that uses the segment is under way (then this is refused, too),
/// and after strait_segment_publish nobody can.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_segment_fill(
    segment: Option<&Segment>,
    name: Text,
    data: Option<&mut MaybeUninit<*mut c_void>>,
    bytes: Option<&mut MaybeUninit<u64>>,
) -> Option<Box<Failure>> {
    entry(|| {
        let mut length = 0;
        answer(data, std::ptr::null_mut(), "data", || {
            let (data, bytes) = Segment::of(segment)?.fill(&name)?;
            length = bytes;
            Ok(data)
        })?;
        // For those who know it NULL is fine.
        bytes.map_or(Ok(()), |bytes| {
            answer(Some(bytes), 0, "bytes", || Ok(length))
        })
    })
}

/// Gives a segment a name: others find it by that, and it lives on without this program. One to be filled is sealed first, by which
/// its memory becomes read-only at the same address. A name that is taken is refused unless `replace`.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_segment_publish(
    segment: Option<&Segment>,
    name: Text,
    replace: bool,
) -> Option<Box<Failure>> {
    entry(|| Segment::of(segment)?.publish(name.get("name")?, replace))
}

/// Starts a strait_segment_publish; strait_finish ends it.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_segment_publish_start(
    segment: Option<&Segment>,
    name: Text,
    replace: bool,
    operation: Option<&mut MaybeUninit<*mut Operation>>,
) -> Option<Box<Failure>> {
    hand_out_started(operation, || {
        Segment::of(segment)?.publish_start(name.get("name")?.to_owned(), replace)
    })
}

/// Copies a tensor of the program's memory into a segment and gives that a name. strait_create saves the copy.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_put(
    client: Option<&Client>,
    name: Text,
    tensor: Option<&Tensor>,
    replace: bool,
) -> Option<Box<Failure>> {
    entry(|| {
        let tensor = tensor.ok_or_else(|| Failure::null("tensor"))?;
        let (spec, data) = tensor.elements("tensor")?;
        Client::of(client)?.put_bytes(name.get("name")?, &spec, data.bytes(), replace)?;
        Ok(())
    })
}

/// Starts a strait_put; strait_finish ends it. The elements must stay, and not be written to, until then.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_put_start(
    client: Option<&Client>,
    name: Text,
    tensor: Option<&Tensor>,
    replace: bool,
    operation: Option<&mut MaybeUninit<*mut Operation>>,
) -> Option<Box<Failure>> {
    hand_out_started(operation, || {
        let tensor = tensor.ok_or_else(|| Failure::null("tensor"))?;
        let (spec, data) = tensor.elements("tensor")?;
        let client = Client::of(client)?.asynchronous();
        let name = name.get("name")?.to_owned();
        Operation::start(async move {
            client
                .put_bytes(&name, &spec, data.bytes(), replace)
                .await?;
            done(())
        })
    })
}

/// Maps the flight of that name, read-only.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_map(
    client: Option<&Client>,
    name: Text,
    segment: Option<&mut MaybeUninit<*mut Segment>>,
) -> Option<Box<Failure>> {
    entry(|| {
        hand_out(segment, "segment", || {
            let client = Client::of(client)?;
            let mapped = client.map(name.get("name")?)?;
            Segment::given(client.clone(), Output::Mapped(mapped))
        })
    })
}

/// Starts a strait_map; strait_finish_segment ends it.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_map_start(
    client: Option<&Client>,
    name: Text,
    operation: Option<&mut MaybeUninit<*mut Operation>>,
) -> Option<Box<Failure>> {
    hand_out_started(operation, || {
        let client = Client::of(client)?.clone();
        let name = name.get("name")?.to_owned();
        Operation::start(async move {
            let mapped = client.asynchronous().map(&name).await?;
            done(Segment::given(client, Output::Mapped(mapped))?)
        })
    })
}

/// How many tensors there are; 0 for NULL.
#[unsafe(no_mangle)]
pub extern "C" fn strait_segment_count(segment: Option<&Segment>) -> usize {
    asked(segment, 0, |segment| segment.names.len())
}

/// The tensor at `index`, from 0 on.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_segment_tensor_at(
    segment: Option<&Segment>,
    index: usize,
    tensor: Option<&mut MaybeUninit<Tensor>>,
) -> Option<Box<Failure>> {
    entry(|| {
        answer(tensor, Tensor::NONE, "tensor", || {
            Segment::of(segment)?.tensor(|_| Some(index))
        })
    })
}

/// The tensor `name`; NULL: the first.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_segment_tensor(
    segment: Option<&Segment>,
    name: Text,
    tensor: Option<&mut MaybeUninit<Tensor>>,
) -> Option<Box<Failure>> {
    entry(|| {
        answer(tensor, Tensor::NONE, "tensor", || {
            let name = name.optional("name")?;
            Segment::of(segment)?.tensor(|tensors| match name {
                None => Some(0),
                Some(name) => tensors.iter().position(|tensor| tensor.name() == name),
            })
        })
    })
}

/// Gives the segment's lease a new life of so many milliseconds (0: the host's default) from now on, and says what the host granted. Leases are renewed
/// by themselves but with STRAIT_NO_RENEWAL. `expires_ms` may be NULL.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_segment_renew(
    segment: Option<&Segment>,
    lease_ms: u64,
    expires_ms: Option<&mut MaybeUninit<u64>>,
) -> Option<Box<Failure>> {
    entry(|| {
        let segment = Segment::of(segment)?;
        let held = segment.memory.share()?;
        let none = "a small result is memory of this process: it has no lease";
        let lease = held
            .lease()
            .ok_or_else(|| Failure::argument(none.to_owned()))?;
        let granted: Duration = segment.client.renew(&[lease], milliseconds(lease_ms))?;
        let granted = u64::try_from(granted.as_millis()).unwrap_or(u64::MAX);
        expires_ms.map_or(Ok(()), |out| {
            answer(Some(out), 0, "expires_ms", || Ok(granted))
        })
    })
}

/// Unmaps a segment and gives its lease back; one that was made here and has no name is gone then. What its tensors pointed to must not be touched any more.
/// Operations that use it keep what they need. NULL is fine.
#[unsafe(no_mangle)]
pub extern "C" fn strait_segment_free(segment: Option<Box<Segment>>) {
    end(segment);
}
