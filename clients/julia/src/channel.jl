# Channels: what comes of a stream that another session feeds. A reader has a socket as what is prepared has (prepared.jl,
# callsocket.jl), on which batches come; nothing is sent there but acknowledgements.

"""
    Strait.ChannelReader

What comes of a stream that another session feeds, batch by batch: an iterator, made by [`read_channel`](@ref).

- `kernel`: whose outputs come
- `outputs`: [`TensorSpec`](@ref)s by port; their last dimension is the most rows of a batch
- `number`: of the batch that came last; the channel's first one is 1
- `notes`: what the kernel had to say, `key => text`, once the end has come

`close(reader)` leaves the channel, as do an error, the end of its session, or being garbage.
"""
mutable struct ChannelReader
    prepared::Prepared                 # whose calls would bring nothing
    name::String
    automatic::Bool
    batch::Any                         # what was received last,
    received::Int                      # and its number; the end has one, too
    ended::Bool                        # that was the end
    number::Int                        # of the last batch that the caller was given
    acknowledged::Int
    notes::Vector{Pair{String,String}}
end
Base.getproperty(reader::ChannelReader, name::Symbol) =
    name in (:kernel, :outputs) ? getfield(getfield(reader, :prepared), name) : getfield(reader, name)
Base.IteratorSize(::Type{ChannelReader}) = Base.SizeUnknown()
Base.IteratorEltype(::Type{ChannelReader}) = Base.EltypeUnknown()

"""
    read_channel(session, name; automatic = true, request_id)
    read_channel(f, session, name; ...)

Reads the channel of that name, which a stream of this user's feeds in this process or another one: [`prepare_stream`](@ref) with `options = (channel = name,)`.
Answers an iterator, a [`ChannelReader`](@ref Strait.ChannelReader), over its batches: of each the rows of the output, at least one, as an `Array` of its own that the caller may
keep and write to; of several outputs a `NamedTuple` by port. It is over when the producer has sent its last chunk.

```julia
for y in read_channel(s, "levels")
    ...
end
read_channel(s, "levels") do batches
    for y in batches
        write(file, batches.number, y)
    end
end
```

A batch is acknowledged when the next one is asked for, so that whoever comes back gets those again that were not done with; the end is, too, when it is
there. With `automatic = false` a batch is acknowledged by [`acknowledge!`](@ref) alone, and the end with the last batch. A reader that leaves before the end
loses the producer its stream, unless that lets one come back (`resume_ms`); who comes back reads the channel again, from the first batch on that was not acknowledged.
Julia does not tell an iterator that a loop left it early: `close(reader)` leaves the channel, or the function `f`, after which it is closed; else it is left when it is garbage.

Throws a [`RemoteError`](@ref): `CHANNEL_NOT_FOUND` before its producer has prepared it and after its end, `WRONG_STATE` while somebody else reads it; and from a loop with the reason why no
more comes: `PRODUCER_LOST`, or what the producer was told, at which chunk in `details["chunk"]`. After that, and if the host has ended, it is [`Disconnected`](@ref). An interrupt
(Ctrl-C) ends the wait and nothing else: the reader can be gone on with, and the batch that was about to come still comes.

While it waits other tasks run, on whatever thread. It is for one task at a time, but for `close`. `request_id` is that of the host's log and of errors.
"""
function read_channel(s::Session, name::AbstractString; automatic::Bool = true, request_id = nothing)
    c = ready!(s)
    reply = request(c, STREAM, with_options(s, (channel = String(name),); request_id = request_id))
    try
        return ChannelReader(s, String(name), automatic, reply)
    catch
        foreach(close_fd, reply.fds)
        rethrow()
    end
end

read_channel(f::Function, s::Session, name::AbstractString; options...) = closing(f, read_channel(s, name; options...))

"Reads what a STREAM was answered; the descriptor is the caller's until it returns."
function ChannelReader(s::Session, name::String, automatic::Bool, reply::Reply)
    told = reply.body
    kernel, first = field(told, "kernel", String), size_field(told, "first")
    first > 0 || throw(ProtocolError("the OK to STREAM: batches are counted from 1"))
    body = Dict{String,Any}("prepared" => 0, "request_bytes" => 0, "inputs" => Any[], "reply_bytes" => size_field(told, "batch_bytes"),
        "outputs" => field(told, "outputs", Vector{Any}))
    prepared = Prepared(s, kernel, Reply(OK, body, reply.payload, reply.fds), STREAM)
    for tensor in prepared.given
        isempty(tensor.dims) || continue
        close(prepared)
        throw(ProtocolError("the OK to STREAM: $(tensor.place.spec) of a channel has no rows"))
    end
    return ChannelReader(prepared, name, automatic, nothing, first - 1, false, first - 1, first - 1, Pair{String,String}[])
end

"What a PREPARE says of a channel: its name, or that and more."
channel_body(name::AbstractString) = Dict{String,Any}("name" => String(name))
function channel_body(options::NamedTuple)
    haskey(options, :name) || throw(ArgumentError("channel is $options; it has a name"))
    body = channel_body(options.name)
    for (key, value) in pairs(options)
        key === :name && continue
        key in (:batches, :wait_ms, :resume_ms) || throw(ArgumentError("channel has no option $key; it has name, batches, wait_ms, resume_ms"))
        value === nothing || key === :resume_ms && value == 0 || (body[String(key)] = key === :batches ? Int(value) : milliseconds(value, String(key)))
    end
    return body
end
channel_body(other) = throw(ArgumentError("channel is a $(typeof(other)); it is a name, or (name = ..., batches = ..., wait_ms = ..., resume_ms = ...)"))

# ---- batches

function Base.iterate(reader::ChannelReader, state = nothing)
    batch = next!(reader)
    return batch === nothing ? nothing : (batch, nothing)
end

"The next batch, or nothing at the end."
function next!(reader::ChannelReader)
    socket, c = reader.prepared.socket, reader.prepared.session.connection
    check_owner(c)
    lock(socket.lock)
    number = reader.number
    try
        is_over(reader) && return nothing
        check_open(socket)
        if reader.received == number
            reader.automatic && acknowledge_through!(reader, number)
            while !received!(reader)
                wait_until_ready(() -> wait(socket.watcher))
                check_open(socket)
            end
        end
        if reader.ended
            (reader.automatic || reader.acknowledged == number) && acknowledge_through!(reader, reader.received)
            return nothing
        end
        reader.number = reader.received
        return reader.batch
    catch e
        # It was not given to anybody.
        reader.number = number
        socket.ending === nothing || forget!(c, socket)
        if e isa Disconnected
            # The connection may know better why.
            drain!(c)
            c.ending === nothing || throw(c.ending)
        end
        rethrow()
    finally
        unlock(socket.lock)
        close_if_ended!(socket)
    end
end

# Not to be interrupted: a batch that was taken from the socket is kept until it is asked for.
received!(reader::ChannelReader) = disable_sigint(() -> receive_batch!(reader))

"Takes the next batch, or the end, if it is there; else false."
function receive_batch!(reader::ChannelReader)
    socket = reader.prepared.socket
    count, fds, flags = receive_packet!(socket.received, socket.control, socket.fd)
    # The host left without having read all that was acknowledged. What it sent is still there.
    count == -Libc.ECONNRESET && return receive_batch!(reader)
    count == -Libc.EAGAIN && return false
    if count <= 0
        finish!(socket, Disconnected("the channel $(repr(reader.name)) is over: $(count == 0 ? "the host ended it" : Libc.strerror(-count)); read it again"))
        throw(socket.ending)
    end
    foreach(close_fd, fds)
    isempty(fds) && flags & (MSG_TRUNC | MSG_CTRUNC) == 0 || break_off!(socket, "it is longer than was said, or brings descriptors")
    number = reader.received + 1
    op, sequence, bytes = trusted(() -> decode_header(socket.received, count), socket)
    if op == ERROR && sequence == 0
        e = trusted(() -> failure(decode_body(socket.received, bytes)), socket)
        finish!(socket, Disconnected("the channel $(repr(reader.name)) has failed; read it again when its producer has begun anew"))
        throw(e)
    end
    sequence == number % UInt32 || break_off!(socket, "sequence $sequence where batch $number comes next")
    op in (CHUNK, LAST) || break_off!(socket, "it is $op")
    if op == LAST
        count == HEADER_BYTES + bytes || break_off!(socket, "a LAST with $(count - HEADER_BYTES - bytes) bytes of payload")
        bytes == 0 || (reader.notes = trusted(() -> told_notes(decode_body(socket.received, bytes)), socket))
        reader.batch, reader.received, reader.ended = nothing, number, true
        return true
    end
    bytes == 0 || break_off!(socket, "a CHUNK with a body")
    reader.batch, reader.received = read_batch(reader.prepared, count), number
    return true
end

function read_batch(prepared::Prepared, count::Int)
    c, socket = prepared.session.connection, prepared.socket
    payload = reply_payload(socket, 0, count)
    rows = Any[Rows(tensor) for tensor in prepared.given]
    for (index, tensor) in enumerate(prepared.given)
        append_rows!(c, socket, tensor, rows[index], payload, payload + SIZES_BYTES * (index - 1))
    end
    any(came -> last(came.dims) > 0, rows) || break_off!(socket, "a batch without rows")
    return length(rows) == 1 ? taken(rows[1]) : named_outputs(prepared, map(taken, rows))
end

# ---- acknowledgements

"""
    acknowledge!(reader)
    acknowledge!(reader, number)

Acknowledges all batches of a [`read_channel`](@ref) that came, or those up to that number: they are not sent again to whoever comes back. It does not wait. A
batch that has not come is an `ArgumentError`.
"""
function acknowledge!(reader::ChannelReader, number::Integer = reader.number)
    number <= reader.number || throw(ArgumentError("batch $number has not come; the last one is $(reader.number)"))
    socket, c = reader.prepared.socket, reader.prepared.session.connection
    check_owner(c)
    lock(socket.lock)
    try
        is_over(reader) && return nothing
        check_open(socket)
        acknowledge_through!(reader, Int(number))
    finally
        unlock(socket.lock)
        close_if_ended!(socket)
    end
    return nothing
end

"Whether the end has come, and all is acknowledged."
is_over(reader::ChannelReader) = reader.ended && reader.acknowledged == reader.received

"Tells the host that it need not keep the batches up to that one; the end, where that is the next. Called with the lock held."
function acknowledge_through!(reader::ChannelReader, number::Int)
    socket = reader.prepared.socket
    reader.ended && number >= reader.received - 1 && (number = reader.received)
    number > reader.acknowledged || return nothing
    header = zeros(UInt8, HEADER_BYTES)
    GC.@preserve header unsafe_store!(Ptr{Header}(pointer(header)),
        Header(MAGIC, PROTOCOL_VERSION, UInt8(OK), number % UInt32, 0, 0, NO_TRACE, (0x00, 0x00, 0x00), 0))
    # Not to be interrupted: an acknowledgement that is sent twice is none. A host that has not taken hundreds of them is
    # told by the next one; why it has ended is what comes next.
    disable_sigint() do
        send_packet(socket.fd, header) == Libc.EAGAIN || (reader.acknowledged = number)
    end
    if is_over(reader)
        finish!(socket, Disconnected("the channel $(repr(reader.name)) is over"))
        forget!(reader.prepared.session.connection, socket)
    end
    return nothing
end

# ---- its end

forget!(c::Connection, socket::CallSocket) = locked(() -> (delete!(c.call_sockets, socket); nothing), c)

"""
    close(reader)

Leaves the channel at once; a task that waits for a batch gets [`Disconnected`](@ref).
"""
function Base.close(reader::ChannelReader)
    socket, c = reader.prepared.socket, reader.prepared.session.connection
    check_owner(c)
    finish!(socket, Disconnected("the channel $(repr(reader.name)) was closed by this program; read it again"))
    forget!(c, socket)
    return nothing
end
Base.isopen(reader::ChannelReader) = isopen(reader.prepared)
Base.show(io::IO, reader::ChannelReader) = print(io, "Strait.ChannelReader(", repr(reader.name), ": ", reader.kernel, " -> ", join(reader.outputs, ", "),
    ", batch ", reader.number, isopen(reader) ? ")" : "; over)")
