//! What an error says to programs: a gRPC code, the class, and a reason, the case.

use std::fmt;

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$variant_doc])* $variant,)* }

        impl $name {
            /// All of them, in the order of `docs/protocol.md`.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The word for it on the wire.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $word,)* }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }

        impl PartialEq<str> for $name {
            fn eq(&self, word: &str) -> bool {
                self.name() == word
            }
        }

        impl PartialEq<&str> for $name {
            fn eq(&self, word: &&str) -> bool {
                self.name() == *word
            }
        }
    };
}

words! {
    /// The gRPC codes that strait uses.
    Code {
        /// The caller asked for something that can never work.
        InvalidArgument = "INVALID_ARGUMENT",
        /// No such flight, tensor, segment or kernel for this principal.
        NotFound = "NOT_FOUND",
        /// The name is taken.
        AlreadyExists = "ALREADY_EXISTS",
        /// It would work in another state.
        FailedPrecondition = "FAILED_PRECONDITION",
        /// A limit, quota or budget is used up.
        ResourceExhausted = "RESOURCE_EXHAUSTED",
        /// Too large for this way; another way exists.
        OutOfRange = "OUT_OF_RANGE",
        /// Took longer than allowed.
        DeadlineExceeded = "DEADLINE_EXCEEDED",
        /// The caller asked for it to end.
        Cancelled = "CANCELLED",
        /// The guest broke, or the host has a bug; the reason says which.
        Internal = "INTERNAL",
        /// Not for this principal.
        PermissionDenied = "PERMISSION_DENIED",
        /// Nothing says who the caller is.
        Unauthenticated = "UNAUTHENTICATED",
        /// The host is ending.
        Unavailable = "UNAVAILABLE",
        /// Not in this version.
        Unimplemented = "UNIMPLEMENTED",
    }
}

words! {
    /// Why an operation failed: stable, for programs to match on. A newer host may say others.
    Reason {
        /// The frame cannot be read.
        BadFrame = "BAD_FRAME",
        /// The body is not the request's, or the reply would be longer than a frame.
        BadRequest = "BAD_REQUEST",
        /// A name that no flight can have.
        BadName = "BAD_NAME",
        /// A tensor that is impossible, or a column that cannot be kept.
        BadTensor = "BAD_TENSOR",
        /// A memfd that the host cannot take over, or one that was tampered with.
        BadSegment = "BAD_SEGMENT",
        /// Dtype, rank, shape or validity of an input.
        BadInput = "BAD_INPUT",
        /// The kernel has no input of that name.
        UnknownInput = "UNKNOWN_INPUT",
        /// An input that the kernel needs.
        MissingInput = "MISSING_INPUT",
        /// The kernel has no output of that name.
        UnknownOutput = "UNKNOWN_OUTPUT",
        /// A parameter's value.
        BadParameter = "BAD_PARAMETER",
        /// The kernel has no parameter of that name.
        UnknownParameter = "UNKNOWN_PARAMETER",
        /// A parameter that the kernel needs.
        MissingParameter = "MISSING_PARAMETER",
        /// The kernel cannot do this.
        Unsupported = "UNSUPPORTED",
        /// Not a plugin of this contract.
        BadPlugin = "BAD_PLUGIN",
        /// A limit beyond the host's own.
        BadLimit = "BAD_LIMIT",
        /// The principal has no flight of that name.
        FlightNotFound = "FLIGHT_NOT_FOUND",
        /// The flight or segment has no tensor of that name.
        TensorNotFound = "TENSOR_NOT_FOUND",
        /// The caller holds no such segment.
        SegmentNotFound = "SEGMENT_NOT_FOUND",
        /// The principal has no channel of that name.
        ChannelNotFound = "CHANNEL_NOT_FOUND",
        /// No plugin has that kernel.
        KernelNotFound = "KERNEL_NOT_FOUND",
        /// Another flight or plugin has the name.
        NameTaken = "NAME_TAKEN",
        /// HELLO of another protocol.
        ProtocolVersion = "PROTOCOL_VERSION",
        /// The first frame was not HELLO.
        NoHello = "NO_HELLO",
        /// The client still maps the segment writable.
        StillWritable = "STILL_WRITABLE",
        /// What is named is in another state.
        WrongState = "WRONG_STATE",
        /// The lease is over.
        LeaseExpired = "LEASE_EXPIRED",
        /// Several plugins have that kernel.
        AmbiguousKernel = "AMBIGUOUS_KERNEL",
        /// The key belongs to another request.
        IdempotencyKeyReused = "IDEMPOTENCY_KEY_REUSED",
        /// The plugin's kernels cost too many worker processes; an operator puts it back.
        PluginOutOfService = "PLUGIN_OUT_OF_SERVICE",
        /// The host has no bytes, segments or descriptors left.
        BudgetExceeded = "BUDGET_EXCEEDED",
        /// As much as one principal or connection may have.
        QuotaExceeded = "QUOTA_EXCEEDED",
        /// A guest's own memory.
        LimitGuestBytes = "LIMIT_GUEST_BYTES",
        /// Inputs and outputs together.
        LimitWindowBytes = "LIMIT_WINDOW_BYTES",
        /// Outputs together.
        LimitResultBytes = "LIMIT_RESULT_BYTES",
        /// Log lines together.
        LimitLogBytes = "LIMIT_LOG_BYTES",
        /// Linux gives the process no more memory, or addresses.
        NoMemory = "NO_MEMORY",
        /// More than 32-bit addresses reach.
        LimitWasm32 = "LIMIT_WASM32",
        /// A row that fits no Flight message.
        InlineTooLarge = "INLINE_TOO_LARGE",
        /// It was not done in time.
        Deadline = "DEADLINE",
        /// The caller asked for it to end.
        Cancelled = "CANCELLED",
        /// The guest trapped.
        GuestTrap = "GUEST_TRAP",
        /// The guest wrote to an input.
        InputWritten = "INPUT_WRITTEN",
        /// The plugin broke the contract.
        BadAnswer = "BAD_ANSWER",
        /// The kernel gave up.
        KernelFailed = "KERNEL_FAILED",
        /// The host's own bug, or Linux failed it.
        Host = "HOST",
        /// The host cannot tell who the caller is.
        Principal = "PRINCIPAL",
        /// The caller may not do this.
        NoRight = "NO_RIGHT",
        /// A call without a token, where one is needed.
        TokenMissing = "TOKEN_MISSING",
        /// A token that the host does not know.
        TokenUnknown = "TOKEN_UNKNOWN",
        /// A token whose time is over.
        TokenExpired = "TOKEN_EXPIRED",
        /// A token that was taken back.
        TokenRevoked = "TOKEN_REVOKED",
        /// A client certificate whose time is over.
        CertificateExpired = "CERTIFICATE_EXPIRED",
        /// The host is ending.
        Draining = "DRAINING",
        /// The process that ran the kernel ended before it was done.
        WorkerLost = "WORKER_LOST",
        /// Whoever wrote to the channel left before the last chunk.
        ProducerLost = "PRODUCER_LOST",
        /// Whoever read the channel left, and nobody came in its place.
        ConsumerLost = "CONSUMER_LOST",
        /// This version does not have it.
        UnsupportedOp = "UNSUPPORTED_OP",
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn each_word_is_there_once_and_in_the_protocol() {
        let page = include_str!("../../../docs/protocol.md");
        let table: HashSet<&str> = page
            .split(|c: char| !(c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_'))
            .collect();
        let words: Vec<&str> = Code::ALL
            .iter()
            .map(|code| code.name())
            .chain(Reason::ALL.iter().map(|reason| reason.name()))
            .collect();
        for word in &words {
            assert!(table.contains(word), "{word} is not in docs/protocol.md");
        }
        // CANCELLED is a code and a reason.
        assert_eq!(words.iter().collect::<HashSet<_>>().len(), words.len() - 1);
    }
}
