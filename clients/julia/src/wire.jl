# Frames, and what stands in their bodies. The protocol itself: docs/protocol.md.

@enum Op::UInt8 begin
    HELLO = 1
    WELCOME = 2
    OK = 3
    ERROR = 4
    KERNELS = 5
    LOOKUP = 6
    LIST = 7
    PUBLISH = 8
    DROP = 9
    STATS = 10
    CREATE = 11
    SEAL = 12
    ADOPT = 13
    MAP = 14
    RELEASE = 15
    RENEW = 16
    INVOKE = 17
    CANCEL = 20
    PING = 22
    LIMITS = 23
    WORKERS = 24
    PLUGINS = 25
    GONE = 65
    SHUTDOWN = 66
end

const HEADER_BYTES = 48
const BODY_BYTES_MAX = 61440
const PROTOCOL_VERSION = 2
"Every tensor of a segment starts on a multiple of this, which is enough for each element type."
const ALIGN_BYTES = 64
"More tensors in a segment, or dimensions in a tensor, no host has; types of unbounded size would be compiled for them."
const TENSORS_MAX = 128
const RANK_MAX = 8
"Longer lives of leases count as this one (milliseconds), which a Float64 holds exactly."
const LIFE_MS_MAX = 2^53

"W3C's trace context: the trace that a request belongs to. All zero: none."
struct TraceContext
    trace_id::NTuple{16,UInt8}
    parent_id::NTuple{8,UInt8}
    flags::UInt8
end
const NO_TRACE = TraceContext(ntuple(_ -> 0x00, 16), ntuple(_ -> 0x00, 8), 0x00)

"One frame; throws `ArgumentError` if `body` does not fit into one."
function encode_frame(op::Op, sequence::UInt32, body; trace::TraceContext = NO_TRACE)
    json = codeunits(JSON.encode(body))
    length(json) <= BODY_BYTES_MAX || throw(ArgumentError(
        "a request of $(length(json)) bytes; at most $BODY_BYTES_MAX fit into a frame: shorten its lists or names"))
    packet = IOBuffer(sizehint = HEADER_BYTES + length(json))
    write(packet, UInt8('S'), UInt8('T'), UInt8(PROTOCOL_VERSION), UInt8(op), htol(sequence), htol(UInt32(length(json))), UInt32(0))
    write(packet, trace.trace_id..., trace.parent_id..., trace.flags, 0x00, 0x00, 0x00, UInt32(0))
    write(packet, json)
    return take!(packet)
end

"A frame's op, sequence and body; throws [`ProtocolError`](@ref)."
function decode_frame(packet::AbstractVector{UInt8})
    wrong(what) = throw(ProtocolError(what))
    # What is of another version is told so, however long its header is.
    if length(packet) > 2
        packet[1] == UInt8('S') && packet[2] == UInt8('T') || wrong("a frame without the magic \"ST\"")
        packet[3] == PROTOCOL_VERSION || wrong("a frame of protocol version $(packet[3]); this client speaks version $PROTOCOL_VERSION")
    end
    length(packet) >= HEADER_BYTES || wrong("a frame of $(length(packet)) bytes, less than a header")
    word(at) = UInt32(packet[at]) | UInt32(packet[at+1]) << 8 | UInt32(packet[at+2]) << 16 | UInt32(packet[at+3]) << 24
    bytes, payload, had = word(9), word(13), length(packet) - HEADER_BYTES
    widen(bytes) + payload == had || wrong("a frame whose header says $bytes bytes of body and $payload of payload, and that has $had")
    payload == 0 || wrong("a frame with $payload bytes of payload, which no op has")
    all(iszero, @view packet[42:44]) || wrong("a frame with reserved bytes that are not 0")
    word(45) == 0 || wrong("a frame with flags $(word(45))")
    op = findfirst(op -> UInt8(op) == packet[4], instances(Op))
    op === nothing && wrong("a frame with op $(packet[4])")
    body = try
        bytes == 0 ? Dict{String,Any}() : JSON.decode(packet[HEADER_BYTES+1:end])
    catch e
        e isa JSON.ParseError || rethrow()
        wrong(sprint(showerror, e))
    end
    body isa Dict{String,Any} || wrong("a body that is no object")
    return (instances(Op)[op], word(5), body)
end

"`body[key]`, which must be a `T`."
function field(body::Dict{String,Any}, key::String, ::Type{T}) where {T}
    found = get(body, key, nothing)
    found isa T && return found::T
    throw(ProtocolError(haskey(body, key) ? "$(repr(key)) is $(brief(found)), no $T" : "a reply without $(repr(key))"))
end
"What the host sent, short enough for a message."
brief(value) = (text = repr(value); length(text) <= 80 ? text : first(text, 80) * "…")

field(body::Dict{String,Any}, key::String, ::Type{T}, default) where {T} =
    get(body, key, nothing) === nothing ? default : field(body, key, T)

"A size or count: an integer from 0 to what an address can be."
function sized(value, what)::Int
    value isa JSON.Whole && 0 <= value <= typemax(Int) || throw(ProtocolError("$what is $(brief(value)), no size"))
    return Int(value)
end
size_field(body::Dict{String,Any}, key::String) = sized(get(body, key, nothing), repr(key))
size_field(body::Dict{String,Any}, key::String, default) =
    get(body, key, nothing) === nothing ? default : size_field(body, key)

"""
    TensorSpec

What a tensor is, without its elements.

- `name`: in its segment
- `type`: of its elements
- `dims`: Julia's, as `size` gives them: the wire's shape from back to front
"""
struct TensorSpec
    name::String
    type::DataType
    dims::Vector{Int}
end
Base.:(==)(a::TensorSpec, b::TensorSpec) = (a.name, a.type, a.dims) == (b.name, b.type, b.dims)
Base.ndims(spec::TensorSpec) = length(spec.dims)
Base.size(spec::TensorSpec) = Tuple(spec.dims)
Base.eltype(spec::TensorSpec) = spec.type
Base.show(io::IO, spec::TensorSpec) =
    print(io, spec.name, ": ", spec.type, "[", join(spec.dims, ", "), "]")

"A name that becomes one of a `NamedTuple`."
function symbolic(body::Dict{String,Any}, key::String)
    name = field(body, key, String)
    '\0' in name && throw(ProtocolError("$(repr(key)) is $(brief(name)): no name has a NUL"))
    return name
end

"A tensor and where it lies in its segment: `bytes` from `offset` on."
struct Place
    spec::TensorSpec
    offset::Int
    bytes::Int
end

struct Mapping
    segment::String
    bytes::Int
    writers::String                    # who can still write: none, host, creator or anyone
    places::Vector{Place}
end

"Reads a mapping and holds the host's word against itself, so that later no array reaches out of its segment."
function Mapping(body::Dict{String,Any})
    version = field(body, "strait-mmap", JSON.Whole)
    version == 1 || throw(ProtocolError("a mapping of version $version, known is 1"))
    bytes = size_field(body, "bytes")
    tensors = field(body, "tensors", Vector{Any})
    length(tensors) <= TENSORS_MAX || throw(ProtocolError("a segment of $(length(tensors)) tensors, more than $TENSORS_MAX"))
    places = Place[place(tensor, bytes) for tensor in tensors]
    allunique(place.spec.name for place in places) || throw(ProtocolError("two tensors of a segment have one name"))
    return Mapping(field(body, "segment", String), bytes, field(body, "writers", String), places)
end

function place(body, segment_bytes::Int)
    body isa Dict{String,Any} || throw(ProtocolError("a tensor that is no object"))
    name = symbolic(body, "name")
    dtype = field(body, "dtype", String)
    T = get(TYPE_OF, dtype, nothing)
    T === nothing && throw(MappingError("tensor $(repr(name)) has dtype $(repr(dtype)), which this client does not know: use a newer one"))
    shape = field(body, "shape", Vector{Any})
    length(shape) <= RANK_MAX || throw(ProtocolError("tensor $(repr(name)) has $(length(shape)) dimensions, more than $RANK_MAX"))
    dims = reverse!(Int[sized(n, "a size in the shape of $(repr(name))") for n in shape])
    offset = sized(get(body, "offset", nothing), "the offset of $(repr(name))")
    bytes = sized(get(body, "length", nothing), "the length of $(repr(name))")
    expected = 0 in dims ? 0 : foldl((a, b) -> widemul(min(a, typemax(Int)), b), dims; init = widen(sizeof(T)))
    expected == bytes || throw(ProtocolError("tensor $(repr(name)) with shape $shape of $dtype has $expected bytes, not $bytes"))
    widen(offset) + bytes <= segment_bytes ||
        throw(ProtocolError("tensor $(repr(name)) has $bytes bytes at $offset, the segment $segment_bytes in all"))
    bytes == 0 || offset % ALIGN_BYTES == 0 ||
        throw(ProtocolError("tensor $(repr(name)) is at $offset, no multiple of $ALIGN_BYTES"))
    return Place(TensorSpec(name, T, dims), offset, bytes)
end

"What an ERROR says, as an exception."
function failure(body::Dict{String,Any})
    reason, message = field(body, "reason", String), field(body, "message", String)
    request_id = field(body, "request_id", String, "-")
    reason == "LEASE_EXPIRED" && return LeaseExpired(message, request_id)
    return RemoteError(field(body, "code", String), reason, message, request_id,
        field(body, "backtrace", String, nothing), field(body, "details", Dict{String,Any}, Dict{String,Any}()))
end

life_ms(body::Dict{String,Any}) = min(size_field(body, "expires_ms"), LIFE_MS_MAX)

"Leases that a reply grants, with their lives in milliseconds."
function granted(body::Dict{String,Any})
    found = Pair{UInt64,Int}[]
    results = get(body, "results", nothing)
    for entry in vcat(Any[body], results isa Vector{Any} ? results : Any[])
        entry isa Dict{String,Any} && haskey(entry, "lease") || continue
        lease = entry["lease"]
        lease === nothing && continue
        lease isa JSON.Whole && lease > 0 || throw(ProtocolError("lease $(brief(lease))"))
        push!(found, UInt64(lease) => life_ms(entry))
    end
    return found
end
