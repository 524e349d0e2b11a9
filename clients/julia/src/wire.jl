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
    PREPARE = 18
    CALL = 19
    CANCEL = 20
    STREAM = 21
    PING = 22
    LIMITS = 23
    WORKERS = 24
    PLUGINS = 25
    PIPELINES = 26
    CHUNK = 64
    GONE = 65
    SHUTDOWN = 66
    LAST = 67
end

const HEADER_BYTES = 48
const BODY_BYTES_MAX = 61440
const PAYLOAD_BYTES_MAX = 131072
const PROTOCOL_VERSION = 2
"Every tensor of a segment or a payload starts on a multiple of this, which is enough for each element type."
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

"A frame's first bytes, as they lie in memory: all integers are little-endian, as on x86-64."
struct Header
    magic::NTuple{2,UInt8}
    version::UInt8
    op::UInt8
    sequence::UInt32
    body_bytes::UInt32
    payload_bytes::UInt32
    trace::TraceContext
    reserved::NTuple{3,UInt8}
    flags::UInt32
end
const MAGIC = (UInt8('S'), UInt8('T'))

"""
Bytes of payload that a frame with the longest body can carry on a socket with a send buffer of so many bytes: Linux sends
no longer packet than that, less what it needs itself.
"""
payload_room(send_buffer_bytes::Int) = clamp(send_buffer_bytes - 32 - HEADER_BYTES - BODY_BYTES_MAX, 0, PAYLOAD_BYTES_MAX)

"One frame; throws `ArgumentError` if `body` does not fit into one."
function encode_frame(op::Op, sequence::UInt32, body; payload::Vector{UInt8} = UInt8[], trace::TraceContext = NO_TRACE)
    packet = IOBuffer(sizehint = HEADER_BYTES + 1024 + length(payload))
    header(bytes) = Ref(Header(MAGIC, PROTOCOL_VERSION, UInt8(op), sequence, bytes, length(payload), trace, (0x00, 0x00, 0x00), 0))
    write(packet, header(0))
    JSON.encode(packet, body)
    bytes = position(packet) - HEADER_BYTES
    bytes <= BODY_BYTES_MAX || throw(ArgumentError(
        "a request of $bytes bytes; at most $BODY_BYTES_MAX fit into a frame: shorten its lists or names"))
    write(packet, payload)
    # How long the body is shows once it is written.
    seekstart(packet)
    write(packet, header(bytes))
    return take!(packet)
end

"""
The op, sequence, body and payload of the frame that the first `count` bytes of `packet` are; throws [`ProtocolError`](@ref).
"""
function decode_frame(packet::Vector{UInt8}, count::Int = length(packet))
    op, sequence, bytes = decode_header(packet, count)
    return (op, sequence, decode_body(packet, bytes), packet[HEADER_BYTES+bytes+1:count])
end

"The op and sequence of such a frame, and the bytes of its body; the rest is payload."
function decode_header(packet::Vector{UInt8}, count::Int)
    wrong(what) = throw(ProtocolError(what))
    # What is of another version is told so, however long its header is.
    if count > 2
        (packet[1], packet[2]) == MAGIC || wrong("a frame without the magic \"ST\"")
        packet[3] == PROTOCOL_VERSION || wrong("a frame of protocol version $(packet[3]); this client speaks version $PROTOCOL_VERSION")
    end
    count >= HEADER_BYTES || wrong("a frame of $count bytes, less than a header")
    header = GC.@preserve packet unsafe_load(Ptr{Header}(pointer(packet)))
    bytes, payload, had = header.body_bytes, header.payload_bytes, count - HEADER_BYTES
    widen(bytes) + payload == had || wrong("a frame whose header says $bytes bytes of body and $payload of payload, and that has $had")
    bytes <= BODY_BYTES_MAX && payload <= PAYLOAD_BYTES_MAX || wrong("a frame with $bytes bytes of body and $payload of payload; at most $BODY_BYTES_MAX and $PAYLOAD_BYTES_MAX are allowed")
    all(iszero, header.reserved) || wrong("a frame with reserved bytes that are not 0")
    header.flags == 0 || wrong("a frame with flags $(header.flags)")
    op = findfirst(op -> UInt8(op) == header.op, instances(Op))
    op === nothing && wrong("a frame with op $(header.op)")
    payload == 0 || instances(Op)[op] in (INVOKE, CALL, CHUNK, LAST, OK) ||
        wrong("a $(instances(Op)[op]) with $payload bytes of payload, which only INVOKE, CALL, CHUNK, LAST and the answers to them carry")
    return (instances(Op)[op], header.sequence, Int(bytes))
end

function decode_body(packet::Vector{UInt8}, bytes::Int)
    bytes == 0 && return Dict{String,Any}()
    body = try
        JSON.decode(packet[HEADER_BYTES+1:HEADER_BYTES+bytes])
    catch e
        e isa JSON.ParseError || rethrow()
        throw(ProtocolError(sprint(showerror, e)))
    end
    return body isa Dict{String,Any} ? body : throw(ProtocolError("a body that is no object"))
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

"A size or count: an integer from 0 to what an address can be. `what` it is, and `of` which name, is for the error."
function sized(value, of::String, what::String = "")::Int
    value isa JSON.Whole && 0 <= value <= typemax(Int) || throw(ProtocolError("$what$(repr(of)) is $(brief(value)), no size"))
    return Int(value)
end
size_field(body::Dict{String,Any}, key::String) = sized(get(body, key, nothing), key)
size_field(body::Dict{String,Any}, key::String, default) =
    get(body, key, nothing) === nothing ? default : size_field(body, key)

"""
    TensorSpec

What a tensor is, without its elements.

- `name`: in its segment
- `type`: of its elements
- `dims`: Julia's, as `size` gives them: the wire's shape in reverse order

`TensorSpec(T, dims...)` is one without a name, for [`prepare`](@ref).
"""
struct TensorSpec
    name::String
    type::DataType
    dims::Vector{Int}
end
TensorSpec(T::DataType, dims::Integer...) = TensorSpec("", T, collect(Int, dims))
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

"A tensor and where it lies in its segment or payload: `bytes` from `offset` on."
struct Place
    spec::TensorSpec
    offset::Int
    bytes::Int
end

struct Mapping
    segment::String
    bytes::Int
    writers::String                    # who can still write: none, host, worker, creator or anyone
    places::Vector{Place}
end

"Reads a mapping and holds the host's word against itself, so that later no array reaches out of its segment."
function Mapping(body::Dict{String,Any})
    version = field(body, "strait-mmap", JSON.Whole)
    version == 1 || throw(ProtocolError("a mapping of version $version, known is 1"))
    bytes = size_field(body, "bytes")
    tensors = field(body, "tensors", Vector{Any})
    length(tensors) <= TENSORS_MAX || throw(ProtocolError("a segment of $(length(tensors)) tensors, more than $TENSORS_MAX"))
    places = Place[place(tensor, "segment", bytes) for tensor in tensors]
    allunique(place.spec.name for place in places) || throw(ProtocolError("two tensors of a segment have one name"))
    return Mapping(field(body, "segment", String), bytes, field(body, "writers", String), places)
end

function place(body, whole::String, whole_bytes::Int)
    body isa Dict{String,Any} || throw(ProtocolError("a tensor that is no object"))
    return place(symbolic(body, "name"), body, whole, whole_bytes)
end

"Where the tensor `name` lies in a segment or payload of `whole_bytes`, by what the host says of it."
function place(name::String, body::Dict{String,Any}, whole::String, whole_bytes::Int)
    dtype = field(body, "dtype", String)
    T = get(TYPE_OF, dtype, nothing)
    T === nothing && throw(MappingError("tensor $(repr(name)) has dtype $(repr(dtype)), which this client does not know: use a newer one"))
    shape = field(body, "shape", Vector{Any})
    length(shape) <= RANK_MAX || throw(ProtocolError("tensor $(repr(name)) has $(length(shape)) dimensions, more than $RANK_MAX"))
    dims = reverse!(Int[sized(n, name, "a size in the shape of ") for n in shape])
    offset = sized(get(body, "offset", nothing), name, "the offset of ")
    bytes = sized(get(body, "length", nothing), name, "the length of ")
    # Julia makes no array whose other sizes overflow, not even one without elements.
    product = foldl((a, b) -> widemul(min(a, typemax(Int)), b), filter(!iszero, dims); init = widen(sizeof(T)))
    expected = 0 in dims ? 0 : product
    expected == bytes || throw(ProtocolError("tensor $(repr(name)) with shape $shape of $dtype has $expected bytes, not $bytes"))
    product <= typemax(Int) || throw(ProtocolError("tensor $(repr(name)) has the shape $shape, whose sizes overflow"))
    widen(offset) + bytes <= whole_bytes ||
        throw(ProtocolError("tensor $(repr(name)) has $bytes bytes at $offset, the $whole $whole_bytes in all"))
    bytes == 0 || offset % ALIGN_BYTES == 0 ||
        throw(ProtocolError("tensor $(repr(name)) is at $offset, no multiple of $ALIGN_BYTES"))
    return Place(TensorSpec(name, T, dims), offset, bytes)
end

"The words of a kernel, `key => text`."
told_notes(body::Dict{String,Any}) =
    Pair{String,String}[field(note, "key", String) => field(note, "text", String) for note in objects(body, "notes")]

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
