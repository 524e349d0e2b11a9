# Kernels that are given a tensor in chunks of rows, over the socket of what is prepared (prepared.jl, callsocket.jl).

"""
    Strait.PreparedStream

A kernel that is ready for tensors in chunks of rows, made by [`prepare_stream`](@ref): [`chunk!`](@ref), [`last!`](@ref).

- `inputs`: what comes in chunks, [`TensorSpec`](@ref)s in that order; their last dimension is the largest number of rows in a frame
- `outputs`: what it returns, in the same way
- `notes`: the kernel's notes at the end of the last stream, `key => text`

`close(stream)` ends it in the host, as do an error, the end of its session, or garbage collection.
"""
mutable struct PreparedStream
    prepared::Prepared
    notes::Vector{Pair{String,String}}
    begun::Bool                        # a chunk was sent, and no last one
    to_channel::Bool                   # what comes of it is another session's
end
Base.getproperty(stream::PreparedStream, name::Symbol) =
    name in (:inputs, :outputs) ? getfield(stream.prepared, name) : getfield(stream, name)

"""
    prepare_stream(session, kernel, inputs...; options = (...), parameters...)
    prepare_stream(f, session, kernel, inputs...; ...)

Makes a kernel ready for a tensor that comes in chunks of rows and has no end; `kernels(s, name)[1].streaming` says whether a kernel can stream.
All output rows are bit for bit those of one [`call`](@ref) on all rows, however they were cut. If an iterator has the chunks,
[`stream`](@ref) is shorter.

```julia
sums = prepare_stream(s, "cumsum", Strait.TensorSpec(Float64, 3, 1000))    # rows of 3, 1000 of them a frame
y = chunk!(sums, x)                                                        # size(x) is (3, n), whatever n is
y = last!(sums, x)                                                         # or last!(sums); the next chunk! begins another stream
close(sums)
```

*Rows* lie along an array's last dimension, the slowest, which is the first axis outside of Julia: a row of a matrix of size `(c, n)` is one of its `n`
columns, and a row of a vector one element. Windows, sums and filters go along it.

*Inputs* and `options` as in [`prepare`](@ref). An array or a `TensorSpec` describes an input that comes in chunks; its last dimension is the largest number of rows
sent, and processed, at a time. An input that the kernel takes whole (`taps` of `fir`) is a flight's name, an array or a number.
The inputs in a frame have at most 131072 bytes together, and so do the outputs. With a function first, it is called with the stream, which is closed afterwards.

*A channel*: with `channel = "levels"` among the `options` what comes of the chunks goes to whoever reads the channel of that name ([`read_channel`](@ref)), and not to this program: `chunk!` and
`last!` answer `NamedTuple()`, and there are no `outputs`. `channel = (name = "levels", batches = 8, wait_ms = 60_000, resume_ms = 0)` says more: `batches` (1 to 1024) that are not acknowledged yet are
kept, and then a chunk waits; for longer than `wait_ms` without an acknowledgement it fails (`DEADLINE`); a reader that left has `resume_ms` to come back, else the
stream fails (`CONSUMER_LOST`). `last!` waits until all was acknowledged, and is the end of the stream; one that ends before that is lost to the reader, who is told.
"""
function prepare_stream(s::Session, kernel::AbstractString, inputs...; options::NamedTuple = NamedTuple(), parameters...)
    found = declaration(s, kernel)
    named_inputs, kept = split_keywords(found, values(parameters))
    return PreparedStream(s, kernel, merge_inputs(found, kernel, inputs, named_inputs), named(kept), options)
end

prepare_stream(f::Function, s::Session, kernel::AbstractString, inputs...; parameters...) = closing(f, prepare_stream(s, kernel, inputs...; parameters...))

function PreparedStream(s::Session, kernel::AbstractString, given::Vector{Pair{String,Any}}, parameters::Vector{Pair{String,Any}}, options::NamedTuple)
    given = Pair{String,Any}[port => stream_input(s, kernel, port, x) for (port, x) in given]
    prepared = prepare_with(s, String(kernel), given, parameters, true; options...)
    for tensor in vcat(prepared.brought, prepared.given)
        isempty(tensor.dims) || last(tensor.dims) == 0 && tensor in prepared.brought || continue
        close(prepared)
        throw(ProtocolError("the OK to PREPARE: $(tensor.place.spec) in a stream has no rows"))
    end
    return PreparedStream(prepared, Pair{String,String}[], false, get(options, :channel, nothing) !== nothing)
end

stream_input(::Session, kernel, port::String, x) = x
function stream_input(s::Session, kernel, port::String, x::Union{AbstractArray,Number,TensorSpec})
    found = declaration(s, kernel)
    if found !== nothing && any(input -> input.name == port && input.whole, found.inputs)
        return x isa TensorSpec ? x : Fixed(x)
    end
    x isa Number || ndims(x) == 0 || last(size(x)) < 1 || return x
    throw(ArgumentError("input $(repr(port)) comes in chunks of rows, along its last dimension; $(x isa Number ? "a number" : "size $(size(x))") has none"))
end

# ---- chunks

"""
    chunk!(stream, inputs...)

Sends the next rows, any number of them or none, and waits for the output: a new `Array`, perhaps of no rows; a
`NamedTuple` of several by port if the kernel has several outputs. Inputs are arrays in the order of `stream.inputs`, or keywords
by port, with the element type and all dimensions but the last as they were prepared: anything else is an `ArgumentError` and nothing is
sent. More rows than were prepared travel in several frames.

An error from the host is a [`RemoteError`](@ref) whose `details["chunk"]` says at which frame, counted from 0. After that, or if the wait
is interrupted (Ctrl-C), the stream is over: prepare another.
"""
chunk!(stream::PreparedStream, inputs...; ports...) = shown_rows(stream, fed!(stream, in_order(stream.prepared, inputs, ports), false))

"""
    last!(stream, inputs...)
    last!(stream)

Like [`chunk!`](@ref), with the last rows, or none; returns the rest. Then `stream.notes` has the kernel's notes, and the next `chunk!` begins
another stream, for which the kernel starts afresh.
"""
function last!(stream::PreparedStream, inputs...; ports...)
    none = isempty(inputs) && isempty(ports)
    given = none ? map(no_rows, stream.prepared.brought) : in_order(stream.prepared, inputs, ports)
    return shown_rows(stream, fed!(stream, given, true))
end
no_rows(tensor::CallTensor{T,N}) where {T,N} = Array{T,N}(undef, Base.setindex(tensor.dims, 0, N))

shown_rows(stream::PreparedStream, rows::Vector{Any}) =
    length(rows) == 1 ? taken(rows[1]) : named_outputs(stream.prepared, map(taken, rows))

"Rows of an output, as they come."
mutable struct Rows{T,N}
    elements::Vector{T}
    dims::Dims{N}
end
Rows(tensor::CallTensor{T,N}) where {T,N} = Rows{T,N}(T[], Base.setindex(tensor.dims, 0, N))
taken(rows::Rows) = reshape(rows.elements, rows.dims)

"Rows of an array from `before` on, at most so many: the first element, and the size, as `whole` has them."
struct Portion
    before::Int
    most::Int
end
function (portion::Portion)(array::Array{T,N}) where {T,N}
    before = min(portion.before, size(array, N))
    dims = Base.setindex(size(array), min(size(array, N) - before, portion.most), N)
    return pointer(array) + before * prod(Base.setindex(dims, 1, N)) * sizeof(T), dims
end

portion_bytes(portion::Portion, array::Array{T}) where {T} = prod(portion(array)[2]) * sizeof(T)

check_row(tensor::CallTensor{T,N}, x) where {T,N} = Base.front(size(x)) == Base.front(tensor.dims) || throw(ArgumentError(
    "input $(repr(tensor.port)) has size $(size(x)), and rows of size $(Base.front(tensor.dims)) were prepared: only the last dimension may differ"))

"Sends rows, in as many frames as they need, and gathers what comes of them."
function fed!(stream::PreparedStream, inputs, last::Bool)
    prepared, socket = stream.prepared, stream.prepared.socket
    c = prepared.session.connection
    check_owner(c)
    # Whatever others' code runs for these arrays runs before anything is sent.
    arrays = Any[dense_input(c, tensor, x, check_row) for (tensor, x) in zip(prepared.brought, inputs)]
    most = mapreduce(tensor -> Base.last(tensor.dims), min, prepared.brought; init = typemax(Int))
    frames = mapreduce(array -> cld(size(array, ndims(array)), most), max, arrays; init = 1)
    lock(socket.lock)
    try
        check_open(socket)
        settle!(c, socket)
        stream.begun || Threads.atomic_add!(c.calls, 1)
        stream.begun = true
        rows = Any[Rows(tensor) for tensor in prepared.given]
        for frame in 1:frames
            portion = Portion((frame - 1) * most, most)
            GC.@preserve arrays begin
                put_inputs!(prepared, arrays, portion)
                send_call!(socket, last && frame == frames ? LAST : CHUNK)
            end
            Threads.atomic_add!(c.copied_bytes, mapreduce(array -> portion_bytes(portion, array), +, arrays; init = 0))
            stream.notes = gathered!(prepared, rows)
        end
        stream.begun = !last
        # The host has ended it, and counts it for as long as this side does not.
        last && stream.to_channel && close(prepared)
        return rows
    catch e
        give_up!(prepared, e)
        rethrow()
    finally
        unlock(socket.lock)
        close_if_ended!(socket)
    end
end

"Receives all replies to the frame that was sent: appends their rows, answers the kernel's notes."
function gathered!(prepared::Prepared, rows::Vector{Any})
    c, socket = prepared.session.connection, prepared.socket
    while true
        count = awaited(c, socket)
        op, bytes = reply_header(socket, count, (OK, CHUNK, ERROR))
        # More follows.
        socket.owed = op == CHUNK
        op == ERROR && throw(trusted(() -> failure(decode_body(socket.received, bytes)), socket))
        notes = bytes == 0 ? Pair{String,String}[] : trusted(() -> told_notes(decode_body(socket.received, bytes)), socket)
        payload = reply_payload(socket, bytes, count)
        for (index, tensor) in enumerate(prepared.given)
            append_rows!(c, socket, tensor, rows[index], payload, payload + SIZES_BYTES * (index - 1))
        end
        op == OK && return notes
    end
end

function append_rows!(c::Connection, socket::CallSocket, tensor::CallTensor{T,N}, rows::Rows{T,N}, payload::Int, sizes::Int) where {T,N}
    dims = reply_size(socket, tensor, sizes)
    Base.front(dims) == Base.front(tensor.dims) || break_off!(socket, "rows of output $(repr(tensor.port)) have size $(Base.front(dims)), and $(Base.front(tensor.dims)) was said")
    # Julia makes no array whose other sizes overflow, not even one without elements.
    most = fld(typemax(Int), sizeof(T) * prod(max.(Base.front(dims), 1)))
    dims[N] <= most - rows.dims[N] || break_off!(socket, "more rows of output $(repr(tensor.port)) than can be counted")
    filled = length(rows.elements)
    resize!(rows.elements, filled + prod(dims))
    copy_inline!(c, rows.elements, socket.received, payload + tensor.place.offset, filled)
    rows.dims = Base.setindex(rows.dims, rows.dims[N] + dims[N], N)
    return nothing
end

# ---- its end

"After an error, and when a chunk was broken off: what comes next would be taken for the beginning of another stream."
function give_up!(prepared::Prepared, e)
    c, socket = prepared.session.connection, prepared.socket
    finish!(socket, Disconnected("the stream of $(prepared.kernel) is over, since one of its chunks failed ($(nameof(typeof(e)))); prepare another"))
    locked(() -> delete!(c.call_sockets, socket), c)
    # The host looks at the socket between chunks, not while one runs. `awaited` may have told it already.
    socket.owed && !socket.cancelled[] && quietly(() -> tell(c, CANCEL, (prepared = socket.number,)))
    return nothing
end

"""
    Strait.cancel!(stream)

Asks the host to end the chunk that is under way, if any, and the stream with it: it throws a [`RemoteError`](@ref) with reason `CANCELLED`. Use it from
a task other than the one that waits. Returns `nothing`.
"""
cancel!(stream::PreparedStream) = cancel!(stream.prepared)

Base.close(stream::PreparedStream) = close(stream.prepared)
Base.isopen(stream::PreparedStream) = isopen(stream.prepared)
Base.show(io::IO, stream::PreparedStream) = print(io, "Strait.PreparedStream(", stream.prepared.kernel, ": ", join(stream.inputs, ", "), " -> ",
    join(stream.outputs, ", "), isopen(stream) ? ")" : "; over)")

# ---- chunks of an iterator

"""
    Strait.ChunkStream

The iterator that [`stream`](@ref) returns. `notes` has the kernel's notes once all has come, `close` ends it.
"""
mutable struct ChunkStream
    session::Session
    kernel::String
    chunks::Any
    rows::Int
    inputs::Vector{Pair{String,Any}}   # the same for all chunks
    parameters::Vector{Pair{String,Any}}
    options::NamedTuple
    stream::Union{Nothing,PreparedStream}
    notes::Vector{Pair{String,String}}
end
Base.IteratorSize(::Type{ChunkStream}) = Base.SizeUnknown()
Base.IteratorEltype(::Type{ChunkStream}) = Base.EltypeUnknown()

"""
    stream(session, kernel, chunks; rows, options = (...), parameters...)
    stream(f, session, kernel, chunks; ...)

Gives a kernel a tensor chunk by chunk, and returns an iterator over the output of each: an `Array`, perhaps of no rows (several outputs: a `NamedTuple`),
and at the end one more with the rest. All of them, one after another, are bit for bit the result of one [`call`](@ref).

```julia
for y in stream(s, "cumsum", chunks; rows = 4096)
    ...
end
stream(ys -> mapreduce(sum, +, ys), s, "fir", chunks; taps = [0.25, 0.5, 0.25], rows = 4096)
```

*`chunks`* is anything that iterates arrays, or tuples or named tuples of them if several inputs come in chunks. The first determines the element type and the size of a
row; without any chunk there is no output. *Rows* lie along the last dimension, which is the first axis outside of Julia, as for [`prepare_stream`](@ref). `rows` is how many are sent,
and processed, at a time; longer chunks are cut. An input given by keyword is the same for all chunks: an array, a number or
a flight's name. `options` as in [`prepare`](@ref).

Nothing is fetched ahead: a chunk is taken when the next `y` is requested. Each loop is a stream of its own, which is over after its last `y` or any error (see [`chunk!`](@ref)). Julia does
not tell an iterator that a loop left it early: call `close(iterator)`, or pass a function `f`, which is called with the
iterator; it is closed afterwards. Otherwise it ends when it is garbage-collected.
"""
function stream(s::Session, kernel::AbstractString, chunks; rows::Integer, options::NamedTuple = NamedTuple(), parameters...)
    0 < rows <= typemax(Int) && !(rows isa Bool) || throw(ArgumentError("rows is $rows; it is a number of rows from 1 on"))
    inputs, kept = split_keywords(declaration(s, kernel), values(parameters))
    fixed = Pair{String,Any}[port => x isa Union{AbstractArray,Number} ? Fixed(x) : x for (port, x) in inputs]
    return ChunkStream(s, String(kernel), chunks, Int(rows), fixed, named(kept), options, nothing, Pair{String,String}[])
end

function stream(f::Function, s::Session, kernel::AbstractString, chunks; parameters...)
    found = stream(s, kernel, chunks; parameters...)
    try
        return f(found)
    finally
        close(found)
    end
end

function Base.iterate(streamed::ChunkStream, state = nothing)
    state === :over && return nothing
    # What an earlier loop left is over.
    state === nothing && close(streamed)
    try
        next = state === nothing ? iterate(streamed.chunks) : iterate(streamed.chunks, state[2])
        state === nothing && empty!(streamed.notes)
        if next === nothing
            state === nothing && return nothing
            y = last!(state[1])
            append!(streamed.notes, state[1].notes)
            close(state[1])
            return y, :over
        end
        state === nothing && (streamed.stream = begun(streamed, next[1]))
        current = state === nothing ? streamed.stream : state[1]
        arrays, ports = chunk_inputs(next[1])
        return chunk!(current, arrays...; ports...), (current, next[2])
    catch
        close(streamed)
        rethrow()
    end
end

Base.close(streamed::ChunkStream) = (streamed.stream === nothing || close(streamed.stream); nothing)
Base.show(io::IO, streamed::ChunkStream) = print(io, "Strait.ChunkStream(", streamed.kernel, ", rows = ", streamed.rows, ')')

"What is prepared for chunks like the first."
function begun(streamed::ChunkStream, first)
    arrays, ports = chunk_inputs(first)
    found = declaration(streamed.session, streamed.kernel)
    fixed = [port for (port, _) in streamed.inputs]
    specs = Pair{String,Any}[found === nothing ? String(key) => x : dashed(found.inputs, key) => x for (key, x) in pairs(ports)]
    if found === nothing
        # The host says that it knows no such kernel.
        append!(specs, ["x$n" => x for (n, x) in enumerate(arrays)])
    else
        free = [port.name for port in found.inputs if !(port.name in fixed) && !any(spec -> spec.first == port.name, specs)]
        length(free) == length(arrays) || throw(ArgumentError(
            "a chunk of $(length(arrays)) arrays by position, for $(length(free)) inputs of $(streamed.kernel): $(join(free, ", ")); what is the same for all chunks is given by keyword"))
        append!(specs, [port => x for (port, x) in zip(free, arrays)])
    end
    return PreparedStream(streamed.session, streamed.kernel, vcat(Pair{String,Any}[port => row_spec(port, x, streamed.rows) for (port, x) in specs], streamed.inputs), streamed.parameters, streamed.options)
end

chunk_inputs(x) = ((x,), NamedTuple())
chunk_inputs(xs::Tuple) = (xs, NamedTuple())
chunk_inputs(xs::NamedTuple) = ((), xs)

row_spec(port, x, rows::Int) = throw(ArgumentError("a chunk of input $(repr(port)) is a $(typeof(x)); it is an array with rows along its last dimension"))
row_spec(port, x::AbstractArray{<:Any,0}, rows::Int) = throw(ArgumentError("a chunk of input $(repr(port)) has no dimension, so no rows; give a vector"))
row_spec(port, x::AbstractArray{<:Any,N}, rows::Int) where {N} = TensorSpec("", tensor_type(x), collect(Base.setindex(size(x), rows, N)))
