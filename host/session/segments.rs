//! Segments: made, taken over, and what their clients are told of them.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use strait_memory::{Adopted, Copied, Growing, MemoryError, Open, PoolSegment, Segment};
use strait_protocol as wire;
use strait_tensor::{Column, FileLayout, TensorPlace};

use super::caller::Caller;
use super::{Host, REPLY_BYTES, status};
use crate::error::{Code, Reason, Status};
use crate::lease::{Body, Framing, LiveSegment, SegmentId};

/// Most tensors of one segment that a client makes or hands over.
const TENSORS_MAX: usize = 128;
/// Longest name of such a tensor in bytes.
const TENSOR_NAME_BYTES_MAX: usize = 200;

impl Host {
    /// What a client needs in order to map `segment`.
    pub fn mapping(&self, segment: &LiveSegment) -> wire::Mapping {
        let writers = match &*segment.body() {
            Body::Open(_) | Body::Lost => wire::Writers::Anyone,
            Body::Client(_) => wire::Writers::Creator,
            Body::Sealed(_) => wire::Writers::None,
            Body::Result(result) if result.is_filled_elsewhere() => wire::Writers::Worker,
            Body::Result(_) => wire::Writers::Host,
        };
        self.mapping_of(segment.id(), segment.bytes(), writers, segment.tensors())
    }

    fn mapping_of(
        &self,
        segment: SegmentId,
        bytes: u64,
        writers: wire::Writers,
        tensors: &[TensorPlace],
    ) -> wire::Mapping {
        wire::Mapping {
            strait_mmap: 1,
            host_id: self.id.clone(),
            socket: self.directory.join(wire::DATA_SOCKET).display().to_string(),
            segment: segment.to_string(),
            generation: 1,
            bytes,
            writers,
            tensors: tensors.to_vec(),
        }
    }

    /// Whether every reply that tells of these tensors will fit a frame: with the longest name, in
    /// a listing, too. Asked before there is a segment.
    fn check_told(&self, tensors: &[TensorPlace]) -> Result<(), Status> {
        // Names have 200 bytes at most, and each of them may need two in JSON.
        if tensors.len() <= TENSORS_MAX / 4 {
            return Ok(());
        }
        let longest = self.mapping_of(
            SegmentId::default(),
            u64::MAX,
            wire::Writers::Creator,
            tensors,
        );
        let bytes = serde_json::to_vec(&longest).map_or(usize::MAX, |json| json.len());
        let most = wire::BODY_BYTES_MAX - REPLY_BYTES;
        if bytes <= most {
            return Ok(());
        }
        Err(Status::new(
            Code::InvalidArgument,
            Reason::BadTensor,
            format!(
                "the mapping of these {} tensors has {bytes} bytes of JSON, and a reply has room for {most}; \
                 take shorter names (a quotation mark counts twice), or put the tensors into several segments",
                tensors.len()
            ),
        ))
    }
}

impl Caller {
    /// A segment for the host's own code to fill: large tensors in huge pages, which takes time that no
    /// runtime thread has.
    ///
    /// # Errors
    /// `BUDGET_EXCEEDED`, `QUOTA_EXCEEDED`, `DRAINING`.
    pub fn allocate_to_fill(&self, layout: &FileLayout) -> Result<Segment<Open>, Status> {
        let segment = self.allocate(layout)?;
        for tensor in &layout.tensors {
            let range = tensor.offset..tensor.offset + tensor.length;
            segment.back_with_huge_pages(range, &self.host.births);
        }
        Ok(segment)
    }

    /// A file that becomes the segment of an upload: `layout` is what is known of it at the time.
    ///
    /// # Errors
    /// `BAD_TENSOR` if no reply could tell of it; `DRAINING`.
    pub fn begin_filling(&self, layout: &FileLayout) -> Result<Growing, Status> {
        self.host.admit()?;
        self.host.check_told(&layout.tensors)?;
        let made = Growing::new(self.account.segments());
        made.map_err(|e| status::memory("no segment could be made", e))
    }

    /// The segment of `layout` out of the file that has its tensors, with header and footer.
    ///
    /// # Errors
    /// `BAD_TENSOR` if no reply could tell of it; `BUDGET_EXCEEDED`, `QUOTA_EXCEEDED`, `DRAINING`.
    pub fn filled(&self, file: Growing, layout: &FileLayout) -> Result<Segment<Open>, Status> {
        self.host.admit()?;
        self.host.check_told(&layout.tensors)?;
        framed(file.into_segment(layout.capacity), layout)
    }

    /// A segment for that layout, with header and footer already in it.
    ///
    /// # Errors
    /// `BAD_TENSOR` if no reply could tell of it; `BUDGET_EXCEEDED`, `QUOTA_EXCEEDED`, `DRAINING`.
    fn allocate(&self, layout: &FileLayout) -> Result<Segment<Open>, Status> {
        self.host.admit()?;
        self.host.check_told(&layout.tensors)?;
        framed(
            Segment::create(layout.capacity, self.account.segments()),
            layout,
        )
    }

    /// A segment for a client to fill, and the descriptor to send.
    ///
    /// # Errors
    /// `BAD_TENSOR`, `BUDGET_EXCEEDED`, `QUOTA_EXCEEDED`, `DRAINING`, `NO_RIGHT`.
    pub fn create(
        &self,
        tensors: Vec<wire::NewTensor>,
    ) -> Result<(Arc<LiveSegment>, Arc<OwnedFd>), Status> {
        self.check_put()?;
        check_tensor_names(tensors.iter().map(|t| t.name.as_str()))?;
        let columns = tensors
            .into_iter()
            .map(|t| {
                Column::new(
                    t.name,
                    strait_tensor::TensorSpec {
                        dtype: t.dtype,
                        shape: t.shape,
                    },
                )
            })
            .collect::<Result<Vec<_>, _>>()?;
        let layout = FileLayout::plan(&columns)?;
        let segment = self.allocate(&layout)?;
        let fd = segment.client_fd();
        let framing = Framing::from(&layout);
        Ok((
            self.live(
                Body::Open(segment),
                layout.bytes,
                layout.tensors,
                Some(framing),
            )?,
            fd,
        ))
    }

    /// Ends all writing to a segment that it has a lease on.
    ///
    /// # Errors
    /// `NO_RIGHT`; `STILL_WRITABLE` and what else [`LiveSegment::seal`] says.
    pub fn seal(&self, segment: &LiveSegment) -> Result<(), Status> {
        self.check_put()?;
        Ok(segment.seal()?)
    }

    /// Takes over a client's memfd; one that is to have a name nobody can write any more.
    ///
    /// # Errors
    /// `BAD_SEGMENT` with the reason, `BAD_TENSOR`, `BUDGET_EXCEEDED`, `QUOTA_EXCEEDED`, `DRAINING`, `NO_RIGHT`.
    pub fn adopt(
        &self,
        fd: OwnedFd,
        tensors: Vec<TensorPlace>,
        named: bool,
    ) -> Result<Arc<LiveSegment>, Status> {
        self.check_put()?;
        self.host.admit()?;
        let bad = |message: String| Status::new(Code::InvalidArgument, Reason::BadTensor, message);
        check_tensor_names(tensors.iter().map(|t| t.name.as_str()))?;
        let mut ranges = Vec::with_capacity(tensors.len());
        for (index, tensor) in tensors.iter().enumerate() {
            let bytes = tensor.spec.bytes()?;
            if bytes != tensor.length {
                return Err(bad(format!(
                    "tensor `{}` has length {}, its dtype and shape make {bytes}",
                    tensor.name, tensor.length
                )));
            }
            if tensors[..index]
                .iter()
                .any(|other| other.name == tensor.name)
            {
                return Err(bad(format!("two tensors are named `{}`", tensor.name)));
            }
            let end = tensor
                .offset
                .checked_add(bytes)
                .ok_or_else(|| bad(format!("tensor `{}` ends beyond 2^64 bytes", tensor.name)))?;
            ranges.push(tensor.offset..end);
        }
        self.host.check_told(&tensors)?;
        let body = match strait_memory::adopt(fd, &ranges, self.account.segments())? {
            Adopted::Sealed(segment) => Body::Sealed(segment),
            Adopted::Lent(segment) => Body::Client(segment),
        };
        if named && !matches!(&body, Body::Sealed(_)) {
            return Err(Status::new(
                Code::InvalidArgument,
                Reason::BadSegment,
                "a memfd without F_SEAL_WRITE cannot have a name: its sender can still write; seal it first",
            ));
        }
        let bytes = match &body {
            Body::Sealed(s) => s.bytes(),
            Body::Client(s) => s.bytes(),
            Body::Open(_) | Body::Result(_) | Body::Lost => 0,
        };
        self.live(body, bytes, tensors, None)
    }

    pub(super) fn live(
        &self,
        body: Body,
        bytes: u64,
        tensors: Vec<TensorPlace>,
        framing: Option<Framing>,
    ) -> Result<Arc<LiveSegment>, Status> {
        let segment = LiveSegment::new(
            self.principal().clone(),
            body,
            bytes,
            tensors,
            framing,
            &self.host.lot,
        )
        .map_err(no_random)?;
        self.host.leases.register(&segment);
        Ok(segment)
    }

    /// A result that lies in `segment` as `layout` says.
    pub(super) fn live_result(
        &self,
        layout: FileLayout,
        segment: PoolSegment,
    ) -> Result<Arc<LiveSegment>, Status> {
        let framing = segment
            .is_filled_elsewhere()
            .then(|| Framing::from(&layout));
        let body = Body::Result(segment);
        self.live(body, layout.bytes, layout.tensors, framing)
    }
}

/// What was made for that layout, with header and footer.
fn framed(
    made: Result<Segment<Open>, MemoryError>,
    layout: &FileLayout,
) -> Result<Segment<Open>, Status> {
    let made = made.and_then(|segment| {
        let uncounted = Copied::new();
        segment.write_at(0, &layout.header, &uncounted)?;
        segment.write_at(layout.footer_offset, &layout.footer, &uncounted)?;
        Ok(segment)
    });
    made.map_err(|e| status::memory("no segment could be made", e))
}

/// `getrandom` failed.
fn no_random(error: std::io::Error) -> Status {
    Status::new(
        Code::Internal,
        Reason::Host,
        format!("no random bytes for an id: {error}"),
    )
}

/// Names of a segment's tensors: few and short enough for a mapping to fit a frame.
///
/// # Errors
/// `BAD_TENSOR` with what is possible.
pub fn check_tensor_names<'a>(names: impl ExactSizeIterator<Item = &'a str>) -> Result<(), Status> {
    let bad = |message: String| {
        Err(Status::new(
            Code::InvalidArgument,
            Reason::BadTensor,
            message,
        ))
    };
    if names.len() == 0 || names.len() > TENSORS_MAX {
        return bad(format!(
            "{} tensors; a segment has 1 to {TENSORS_MAX}",
            names.len()
        ));
    }
    for name in names {
        if name.is_empty()
            || name.len() > TENSOR_NAME_BYTES_MAX
            || name.chars().any(char::is_control)
        {
            return bad(format!(
                "a tensor is named `{}` ({} bytes); a name has 1 to {TENSOR_NAME_BYTES_MAX} bytes without control characters",
                crate::text::name(name),
                name.len()
            ));
        }
    }
    Ok(())
}
