//! The bodies of requests. Each refuses unknown fields, so that a misspelt option is never ignored.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use strait_tensor::{Dtype, TensorPlace, TensorSpec};

use crate::quota::QuotaSettings;

macro_rules! request {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Default, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct $name {
            $($(#[$field_doc])* pub $field: $type,)*
            /// Names this request in replies, errors and log lines; the host makes one if it is missing.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub request_id: Option<String>,
        }

        impl Request for $name {
            fn request_id(&self) -> Option<&str> {
                self.request_id.as_deref()
            }
        }
    };
}

/// The body of a request.
pub trait Request: DeserializeOwned {
    /// What its sender calls it.
    fn request_id(&self) -> Option<&str>;
}

request! {
    /// HELLO.
    Hello {
        /// 1.
        protocol: u32,
        /// Name and version of the client library.
        client: String,
    }
}
request! {
    /// A request without fields of its own (STATS, PING).
    Empty {}
}
request! {
    /// KERNELS.
    Kernels {
        /// Last `plugin/kernel` of the previous page.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after: Option<String>,
        /// Only this kernel.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        kernel: Option<String>,
    }
}
request! {
    /// LIMITS.
    AskLimits {
        /// Last principal of the previous page.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after: Option<String>,
        /// Whose quotas are changed; none: those of all for whom nothing else is set.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        principal: Option<String>,
        /// The changes; none: nothing is changed.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        set: Option<QuotaSettings>,
    }
}
request! {
    /// WORKERS.
    AskWorkers {
        /// Last number of the previous page.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after: Option<u64>,
    }
}
request! {
    /// PLUGINS.
    AskPlugins {
        /// Last name of the previous page.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after: Option<String>,
        /// A plugin that is to be in service again.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        enable: Option<String>,
        /// For whom; none: for everybody.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        principal: Option<String>,
    }
}
request! {
    /// LOOKUP and DROP.
    Name {
        /// The flight's name.
        name: String,
    }
}
request! {
    /// LIST.
    List {
        /// Last name of the previous page.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after: Option<String>,
    }
}
request! {
    /// SHARE.
    Share {
        /// The flight's name.
        name: String,
        /// Whom it is to be shared with: principals, and groups as `group:NAME`.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        add: Vec<String>,
        /// Whom it is no longer to be shared with; `*`: with nobody but those in `add`.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        remove: Vec<String>,
    }
}
request! {
    /// CREATE.
    Create {
        /// What the segment is to hold; all of them share the leading axis.
        tensors: Vec<NewTensor>,
        /// Life of the lease in milliseconds.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        lease_ms: Option<u64>,
    }
}
request! {
    /// SEAL.
    SegmentId {
        /// The segment's id.
        segment: String,
    }
}
request! {
    /// PUBLISH.
    Publish {
        /// The segment's id.
        segment: String,
        /// The name it gets.
        name: String,
        /// Take the name from another flight.
        #[serde(default)]
        replace: bool,
    }
}
request! {
    /// ADOPT.
    Adopt {
        /// Where the tensors lie in the memfd.
        tensors: Vec<PlacedTensor>,
        /// A name for it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        name: Option<String>,
        /// Take the name from another flight.
        #[serde(default)]
        replace: bool,
        /// Life of the lease in milliseconds.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        lease_ms: Option<u64>,
    }
}
request! {
    /// MAP: either `name` or `segment`.
    Map {
        /// The flight's name.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        name: Option<String>,
        /// The segment's id.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        segment: Option<String>,
        /// Life of the lease in milliseconds.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        lease_ms: Option<u64>,
    }
}
request! {
    /// RELEASE and RENEW.
    Leases {
        /// Lease ids.
        leases: Vec<u64>,
        /// RENEW: the new life in milliseconds.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        lease_ms: Option<u64>,
    }
}
request! {
    /// CANCEL: one of the two.
    Cancel {
        /// Of the INVOKE or PREPARE.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        sequence: Option<u32>,
        /// Number of the PREPARE whose CALL is to end.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        prepared: Option<u64>,
    }
}
request! {
    /// PREPARE.
    Prepare {
        /// `kernel` or `plugin/kernel`.
        kernel: String,
        /// Port to what each CALL brings, or to an input that is the same for all of them.
        inputs: BTreeMap<String, PreparedInput>,
        /// Parameter to value.
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        parameters: BTreeMap<String, serde_json::Value>,
        /// Rows come in chunks, and what the kernel keeps of them goes on: CHUNK and LAST in the place of CALL.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        stream: bool,
        /// What comes of the chunks goes to whoever reads the channel of that name, and not to who sends them.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        channel: Option<ChannelOptions>,
        /// CALLs go through a ring of slots in memory that both sides share.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        ring: bool,
        /// Wall time of each CALL, CHUNK or LAST in milliseconds.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        deadline_ms: Option<u64>,
        /// Tighter limits than the host's own.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        limits: Option<Limits>,
    }
}
request! {
    /// STREAM.
    Stream {
        /// The channel to read.
        channel: String,
    }
}
request! {
    /// The `cmd` of Flight's DoExchange.
    Exchange {
        /// `kernel` or `plugin/kernel`.
        kernel: String,
        /// Port to an input that is there as a whole. Those that come in batches are the columns of the client's schema.
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        inputs: BTreeMap<String, Input>,
        /// Parameter to value.
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        parameters: BTreeMap<String, serde_json::Value>,
        /// Most rows that the kernel gets at a time; longer batches are cut. None: about 1 MiB of them.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        rows: Option<u64>,
        /// Wall time of each of those steps in milliseconds.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        deadline_ms: Option<u64>,
        /// Tighter limits than the host's own.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        limits: Option<Limits>,
    }
}
request! {
    /// The body of Flight's action `release`.
    Release {
        /// Of calls that will not be repeated: their answers are forgotten.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        idempotency_keys: Vec<String>,
        /// Uploads without a name, and results that nobody published.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        segments: Vec<String>,
    }
}
request! {
    /// INVOKE.
    Invoke {
        /// `kernel` or `plugin/kernel`.
        kernel: String,
        /// Port to input.
        inputs: BTreeMap<String, Input>,
        /// Parameter to value.
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        parameters: BTreeMap<String, serde_json::Value>,
        /// Output port to the name it gets.
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        publish: BTreeMap<String, String>,
        /// May `publish` take names from other flights.
        #[serde(default)]
        replace: bool,
        /// Seal the outputs for good.
        #[serde(default)]
        seal: bool,
        /// Wall time in milliseconds.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        deadline_ms: Option<u64>,
        /// Life of the results' leases in milliseconds.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        lease_ms: Option<u64>,
        /// Results that can become at most so many bytes come in the reply's payload; none: all are segments.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        inline_bytes: Option<u64>,
        /// false: no descriptors and no leases.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        map: Option<bool>,
        /// Tighter limits than the host's own.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        limits: Option<Limits>,
        /// Fill `pages`.
        #[serde(default)]
        verify: bool,
        /// A repeat of the same key gets the same results.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        idempotency_key: Option<String>,
    }
}

/// A tensor that CREATE is to make room for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewTensor {
    /// Unique among the tensors of its segment.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Row-major sizes.
    pub shape: Vec<u64>,
}

/// A tensor where ADOPT says that it lies.
// Not `TensorPlace`, which a reply may extend: a request with unknown fields is refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlacedTensor {
    /// Unique among the tensors of its segment.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Row-major sizes.
    pub shape: Vec<u64>,
    /// First byte in the memfd.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

impl From<PlacedTensor> for TensorPlace {
    fn from(placed: PlacedTensor) -> Self {
        let PlacedTensor {
            name,
            dtype,
            shape,
            offset,
            length,
        } = placed;
        Self {
            name,
            spec: TensorSpec { dtype, shape },
            offset,
            length,
        }
    }
}

impl From<&TensorPlace> for PlacedTensor {
    fn from(place: &TensorPlace) -> Self {
        let TensorSpec { dtype, shape } = place.spec.clone();
        Self {
            name: place.name.clone(),
            dtype,
            shape,
            offset: place.offset,
            length: place.length,
        }
    }
}

/// An input of INVOKE.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
pub enum Input {
    /// `name` or `name#tensor`.
    Text(String),
    /// A flight by name.
    Flight {
        /// The flight's name.
        name: String,
        /// One of its tensors.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tensor: Option<String>,
    },
    /// A segment that the session has a lease on.
    Segment {
        /// The segment's id.
        segment: String,
        /// One of its tensors.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tensor: Option<String>,
    },
    /// The bytes of a small tensor are in the frame.
    Inline {
        /// Where.
        inline: InlineTensor,
    },
}

/// An input of PREPARE.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
pub enum PreparedInput {
    /// A tensor that each CALL brings.
    Spec {
        /// Element type.
        dtype: Dtype,
        /// Row-major sizes.
        shape: Vec<u64>,
    },
    /// One that is there: a flight or a segment, which is kept for as long as the PREPARE.
    Fixed(Input),
}

/// A channel for PREPARE to open.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChannelOptions {
    /// Its name, among those of the principal's channels.
    pub name: String,
    /// Most batches that wait for their acknowledgement; 8 if missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batches: Option<u64>,
    /// Milliseconds without an acknowledgement, or a consumer, after which the stream fails; the host's `server.stall_ms` if missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait_ms: Option<u64>,
    /// Milliseconds that a consumer which left has to come back, or another one in its place; 0 if missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume_ms: Option<u64>,
}

/// A tensor in a frame's payload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InlineTensor {
    /// Element type.
    pub dtype: Dtype,
    /// Row-major sizes.
    pub shape: Vec<u64>,
    /// First byte in the payload.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

/// Limits of one invocation; each must not exceed the host's own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// The guest's own memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_bytes: Option<u64>,
    /// All windows together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window_bytes: Option<u64>,
    /// All results together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result_bytes: Option<u64>,
    /// All log lines together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_bytes: Option<u64>,
}
