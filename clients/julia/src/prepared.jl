# Kernels that are made ready once and called again and again. How a call travels: callsocket.jl.

"""
    Strait.Fixed(x)

An array that is the same input for all calls of a [`prepare`](@ref)d kernel. If it is in a segment of the session it is used
as it is, and must not be written to from then on; any other is copied into a segment once.
"""
struct Fixed
    value::Union{AbstractArray,Number}
end

"A tensor of each call, as large as it can be. Its place in the payload is what the host said."
struct CallTensor{T,N}
    port::String
    dims::Dims{N}
    place::Place
end
CallTensor(place::Place) = CallTensor{place.spec.type,ndims(place.spec)}(place.spec.name, Dims(place.spec.dims), place)

"""
    Strait.Prepared

A kernel that is ready, made by [`prepare`](@ref): `prepared(x)` calls it.

- `kernel`: its name
- `inputs`: what each call brings, [`TensorSpec`](@ref)s in that order, by port, at their largest
- `outputs`: what it returns, in the same way

`close(prepared)` ends it in the host, as does the end of its session, or garbage collection.
"""
mutable struct Prepared
    session::Session
    kernel::String
    inputs::Vector{TensorSpec}
    outputs::Vector{TensorSpec}
    brought::Vector{CallTensor}
    given::Vector{CallTensor}
    gap::Vector{UInt8}                 # what may be sent between two tensors
    socket::CallSocket
end

"""
    prepare(session, kernel, inputs...; options = (...), parameters...)
    prepare(f, session, kernel, inputs...; ...)

Makes a kernel ready to be called again and again on small tensors: it is checked, opened and bound once. Returns a
[`Prepared`](@ref Strait.Prepared), which is called with only the arrays. A call takes a fraction of the time of [`call`](@ref).

```julia
scale = prepare(s, "scale-shift", zeros(128); a = 2)     # a vector of up to 128 Float64
y = scale(x)                                             # a new Array
call!(y, scale, x)                                       # or into an existing one
```

*Inputs*, by position, as `port => ...` or as keywords, as in [`call`](@ref). An array, a number or a `TensorSpec(T, dims...)` stands for
what each call brings: its element type and, along each dimension, the largest size. A flight's name, or
[`Strait.Fixed`](@ref)`(array)`, is the same for all calls.

*A call* takes arrays and numbers in the order of `prepared.inputs`, or as keywords by port. Each has the element type and number of
dimensions that were prepared and at most the size; fewer rows are fine, and cost a little more. Anything else is an
`ArgumentError` before anything is sent. A dense `Array` is sent straight from its memory, any other array as a dense copy.

*Results* are ordinary `Array`s that belong to the caller, a new one for each call; [`call!`](@ref) fills existing ones, and
`Strait.invocation(prepared, inputs...)` has the kernel's notes, too.

An ERROR to a call is a [`RemoteError`](@ref) and does not affect other calls. Any number of tasks may call: one call
runs after another, in this process and in the host. [`Strait.cancel!`](@ref)`(prepared)` ends the one that runs, and so does an interrupt (Ctrl-C);
the next call is then a call like any other. In a forked child each use throws [`Forked`](@ref).

*`options`*: `deadline_ms` of each call, from the host's receipt on; `limits` of each call, as for [`Strait.invocation`](@ref);
`request_id` of all of them in the host's log and in errors.

With a function first, it is called with the prepared kernel, which is closed afterwards. The inputs that a call brings have at most
131072 bytes together, and so do its outputs; above that use [`call`](@ref).
"""
function prepare(s::Session, kernel::AbstractString, inputs...; options::NamedTuple = NamedTuple(), parameters...)
    found = declaration(s, kernel)
    named_inputs, kept = split_keywords(found, values(parameters))
    return prepare_with(s, String(kernel), merge_inputs(found, kernel, inputs, named_inputs), named(kept); options...)
end

prepare(f::Function, s::Session, kernel::AbstractString, inputs...; parameters...) = closing(f, prepare(s, kernel, inputs...; parameters...))

function prepare_with(s::Session, kernel::String, given::Vector{Pair{String,Any}}, parameters::Vector{Pair{String,Any}}, streams::Bool = false;
    deadline_ms = nothing, limits = nothing, request_id = nothing, channel = nothing)
    c = ready!(s)
    body = Dict{String,Any}("kernel" => kernel)
    streams && (body["stream"] = true)
    channel === nothing || streams || throw(ArgumentError("a channel is fed by a stream, not by calls; use prepare_stream"))
    channel === nothing || (body["channel"] = channel_body(channel))
    deadline_ms === nothing || (body["deadline_ms"] = milliseconds(deadline_ms, "deadline_ms"))
    limits === nothing || (body["limits"] = Dict(named(limits)))
    for (key, value) in pairs(with_options(s, NamedTuple(); request_id = request_id))
        body[String(key)] = value
    end
    body["parameters"] = wire_parameters(s, kernel, parameters, given)
    held = Any[]
    reply = GC.@preserve given try
        body["inputs"] = prepared_inputs!(held, s, given)
        request(c, PREPARE, body)
    finally
        # The host keeps what it needs; nobody here may write to it again.
        give_back!(s, held, false)
    end
    try
        return Prepared(s, kernel, reply)
    catch
        foreach(close_fd, reply.fds)
        rethrow()
    end
end

function prepared_inputs!(held::Vector{Any}, s::Session, given::Vector{Pair{String,Any}})
    wires = Dict{String,Any}()
    for (port, value) in given
        haskey(wires, port) && throw(ArgumentError("input $(repr(port)) is given twice"))
        wires[port] = prepared_input!(held, s, value)
    end
    return wires
end

"An input as the wire has it: what each call brings, or where that lies which is the same for all of them."
prepared_input!(::Vector{Any}, ::Session, x::AbstractArray) = (dtype = dtype(tensor_type(x)), shape = reverse(size(x)))
prepared_input!(::Vector{Any}, ::Session, x::Number) = (dtype = dtype(typeof(x)), shape = ())
prepared_input!(::Vector{Any}, ::Session, x::TensorSpec) = (dtype = dtype(x.type), shape = reverse(x.dims))
prepared_input!(::Vector{Any}, ::Session, name::AbstractString) = String(name)
prepared_input!(held::Vector{Any}, s::Session, x::Fixed) = x.value isa Number ? fixed_input!(held, s, fill(x.value)) : fixed_input!(held, s, x.value)
prepared_input!(::Vector{Any}, ::Session, x) = refuse_input(x)

function fixed_input!(held::Vector{Any}, s::Session, x::AbstractArray)
    found = find_tensor(s.connection, x)
    found === nothing || return segment_input(s.connection, found...)
    T = tensor_type(x)
    if isempty(x)
        segment, lease = empty_segment(s, T, size(x))
        push!(held, lease)
        return segment
    end
    array = create(s, T, size(x))
    push!(held, array)
    return segment_input(s.connection, something(find_tensor(s.connection, fill!!(s, array, x)))...)
end

rank_of(::Session, x::TensorSpec) = ndims(x)
rank_of(s::Session, x::Fixed) = rank_of(s, x.value)

"Reads what a PREPARE was answered (or a STREAM, as a PREPARE would be); the descriptor is the caller's until it returns."
function Prepared(s::Session, kernel::String, reply::Reply, op::Op = PREPARE)
    length(reply.fds) == 1 && is_seqpacket(reply.fds[1]) || throw(ProtocolError("the OK to $op: it brings one descriptor, a SEQPACKET socket"))
    brought, request_bytes = call_tensors(reply.body, "inputs", "request_bytes")
    given, reply_bytes = call_tensors(reply.body, "outputs", "reply_bytes")
    number = size_field(reply.body, "prepared")
    gap = zeros(UInt8, mapreduce(tensor -> tensor.place.bytes + ALIGN_BYTES, max, brought; init = 0))
    c = s.connection
    socket = CallSocket(UInt64(number), reply.fds[1], length(brought), request_bytes, reply_bytes)
    # For errors, until something is sent.
    socket.head[4] = UInt8(op)
    late = locked(c) do
        c.ending === nothing && push!(c.call_sockets, socket)
        c.ending
    end
    # From here on the descriptor is the socket's.
    empty!(reply.fds)
    late === nothing || (finish!(socket, late); throw(late))
    specs(tensors) = TensorSpec[tensor.place.spec for tensor in tensors]
    prepared = Prepared(s, kernel, specs(brought), specs(given), brought, given, gap, socket)
    abandoned = socket.abandoned
    finalizer(_ -> (abandoned[] = true; signal_reaper()), prepared)
    return prepared
end

"The tensors of each request or reply, held against where they must lie, and the bytes of its payload."
function call_tensors(body::Dict{String,Any}, key::String, bytes_key::String)
    entries = objects(body, key)
    length(entries) <= TENSORS_MAX || throw(ProtocolError("$(repr(key)) has $(length(entries)) tensors, more than $TENSORS_MAX"))
    bytes = size_field(body, bytes_key)
    bytes <= PAYLOAD_BYTES_MAX || throw(ProtocolError("$(repr(bytes_key)) is $bytes; at most $PAYLOAD_BYTES_MAX are allowed"))
    places = Place[place(symbolic(entry, "port"), entry, "payload", bytes) for entry in entries]
    allunique(place.spec.name for place in places) || throw(ProtocolError("two of $(repr(key)) have one port"))
    offset = SIZES_BYTES * length(places)
    for place in places
        place.offset == offset || throw(ProtocolError("tensor $(repr(place.spec.name)) of $(repr(key)) is at $(place.offset), not at $offset"))
        offset = cld(offset + place.bytes, ALIGN_BYTES) * ALIGN_BYTES
    end
    bytes == offset || throw(ProtocolError("$(repr(bytes_key)) is $bytes, and its tensors take $offset"))
    return CallTensor[CallTensor(place) for place in places], bytes
end

# ---- calls

(prepared::Prepared)(inputs...; ports...) =
    (found = called(prepared, in_order(prepared, inputs, ports), nothing)[1]; length(found) == 1 ? found[1] : named_outputs(prepared, found))

"""
    call!(y, prepared, inputs...)
    call!((y, z), prepared, inputs...)

Calls a [`prepare`](@ref)d kernel; its results fill existing arrays: one, or as many as it has outputs, in the order
of `prepared.outputs`. They are returned. Each has the element type and number of dimensions of its output; one of another size is
left as it is, and a `DimensionMismatch` is thrown after the call.
"""
call!(y::Array, prepared::Prepared, inputs...; ports...) = (call!((y,), prepared, inputs...; ports...); y)
function call!(ys::Union{Tuple,NamedTuple}, prepared::Prepared, inputs...; ports...)
    length(ys) == length(prepared.given) || throw(ArgumentError(
        "$(length(ys)) arrays for results; $(prepared.kernel) has $(length(prepared.given)): $(port_names(prepared.given))"))
    foreach((y, tensor) -> check_output(prepared, tensor, y), values(ys), prepared.given)
    called(prepared, in_order(prepared, inputs, ports), Any[values(ys)...])
    return ys
end

"""
    Strait.invocation(prepared, inputs...)

Calls a [`prepare`](@ref)d kernel and returns everything there is to know: `outputs` (a `NamedTuple` of `Array`s by port), `notes` (the
kernel's, `key => text`) and `client_copied_bytes`.
"""
function invocation(prepared::Prepared, inputs...; ports...)
    outputs, notes, copied = called(prepared, in_order(prepared, inputs, ports), nothing)
    return (outputs = named_outputs(prepared, outputs), notes = notes, client_copied_bytes = copied)
end

named_outputs(prepared::Prepared, outputs) = NamedTuple{Tuple(Symbol(tensor.port) for tensor in prepared.given)}(Tuple(outputs))
port_names(tensors) = join((tensor.port for tensor in tensors), ", ")

"The inputs in the order in which they travel: by position, then those that are given by port."
function in_order(prepared::Prepared, inputs::Tuple, ports)
    tensors = prepared.brought
    length(inputs) + length(ports) == length(tensors) || refuse_count(prepared, length(inputs) + length(ports))
    isempty(ports) && return inputs
    by_port = Dict{String,Any}(dashed(prepared.inputs, key) => value for (key, value) in pairs(values(ports)))
    return map(tensors) do tensor
        index = findfirst(==(tensor), tensors)
        index <= length(inputs) && return inputs[index]
        haskey(by_port, tensor.port) || throw(ArgumentError(
            "no input $(repr(tensor.port)) among $(join(keys(by_port), ", ")); a call of $(prepared.kernel) brings $(port_names(tensors))"))
        return by_port[tensor.port]
    end
end
refuse_count(prepared::Prepared, count) = throw(ArgumentError(
    "$count inputs; a call of $(prepared.kernel) brings $(length(prepared.brought)): $(port_names(prepared.brought))"))

"An input as a dense array that fits what was prepared; `check` throws if its size does not."
function dense_input(c::Connection, tensor::CallTensor{T,N}, x::Array{T,N}, check = check_size) where {T,N}
    check(tensor, x)
    # An array that was released reads as zeros.
    find_tensor(c, x)
    return x
end
function dense_input(::Connection, tensor::CallTensor{T,N}, x::AbstractArray, check = check_size) where {T,N}
    E = tensor_type(x)
    E === T || throw(ArgumentError("input $(repr(tensor.port)) has elements of type $E; $T was prepared"))
    ndims(x) == N || throw(ArgumentError("input $(repr(tensor.port)) has $(ndims(x)) dimensions; $N were prepared"))
    check(tensor, x)
    return copy_shown!(Array{T,N}(undef, size(x)), x)
end
dense_input(c::Connection, tensor::CallTensor, x::Number, check = check_size) = dense_input(c, tensor, fill(x), check)
dense_input(::Connection, tensor::CallTensor, x, check = check_size) = throw(ArgumentError(
    "input $(repr(tensor.port)) cannot be a $(typeof(x)) here; a call brings arrays and numbers, and what is the same for all calls is given to prepare"))

check_size(tensor::CallTensor, x) = all(size(x) .<= tensor.dims) || throw(ArgumentError(
    "input $(repr(tensor.port)) has size $(size(x)), beyond $(tensor.dims), which was prepared; prepare a larger one by itself"))

function check_output(prepared::Prepared, tensor::CallTensor{T,N}, y) where {T,N}
    y isa Array{T,N} || throw(ArgumentError("the array for result $(repr(tensor.port)) is a $(typeof(y)); it is an $(Array{T,N})"))
    find_tensor(prepared.session.connection, y)
    return nothing
end

"Runs it: its outputs, notes, and the bytes that were copied here. Into `ys`, or into new arrays."
function called(prepared::Prepared, inputs, ys::Union{Nothing,Vector{Any}})
    s, socket = prepared.session, prepared.socket
    c = s.connection
    check_owner(c)
    # Whatever others' code runs for these arrays runs before the call.
    arrays = Any[dense_input(c, tensor, x) for (tensor, x) in zip(prepared.brought, inputs)]
    lock(socket.lock)
    try
        check_open(socket)
        settle!(c, socket)
        GC.@preserve arrays begin
            put_inputs!(prepared, arrays)
            send_call!(socket)
        end
        Threads.atomic_add!(c.calls, 1)
        copied = mapreduce(sizeof, +, arrays; init = 0)
        Threads.atomic_add!(c.copied_bytes, copied)
        count = awaited(c, socket)
        op, bytes = reply_header(socket, count)
        op == OK || throw(trusted(() -> failure(decode_body(socket.received, bytes)), socket))
        notes = bytes == 0 ? Pair{String,String}[] : trusted(() -> told_notes(decode_body(socket.received, bytes)), socket)
        outputs = take_outputs!(prepared, bytes, count, ys)
        return outputs, notes, copied + mapreduce(sizeof, +, outputs; init = 0)
    finally
        unlock(socket.lock)
        close_if_ended!(socket)
    end
end

"The reply to the call that was sent. A call that is broken off is cancelled in the host, and its reply left to the next one."
function awaited(c::Connection, socket::CallSocket)
    try
        return receive_call!(socket)
    catch e
        if socket.ending === nothing
            socket.cancelled[] = true
            quietly(() -> tell(c, CANCEL, (prepared = socket.number,)))
        elseif e isa Disconnected
            # The connection may know better why.
            drain!(c)
            c.ending === nothing || throw(c.ending)
        end
        rethrow()
    end
end

"Sees to it that nothing of an earlier call can meet the next one: neither a late CANCEL nor its reply."
function settle!(c::Connection, socket::CallSocket)
    # A connection's requests are answered in order: what was sent before this one is done.
    Threads.atomic_xchg!(socket.cancelled, false) && ask(c, PING, NamedTuple())
    socket.owed && reply_header(socket, receive_call!(socket))
    return nothing
end

"What is to be sent: of each array the part that `portion` says. Sizes are the wire's, from back to front."
function put_inputs!(prepared::Prepared, arrays::Vector{Any}, portion = whole)
    socket, parts = prepared.socket, empty!(prepared.socket.parts)
    push!(parts, IOVec(pointer(socket.head), length(socket.head)))
    sizes = pointer(socket.head, HEADER_BYTES + 1)
    GC.@preserve socket for (tensor, array) in zip(prepared.brought, arrays)
        put_input!(parts, Ptr{UInt64}(sizes), prepared.gap, tensor, array, portion)
        sizes += SIZES_BYTES
    end
    return nothing
end

"All of an array: its first element, and its size."
whole(array::Array) = (pointer(array), size(array))

function put_input!(parts::Vector{IOVec}, sizes::Ptr{UInt64}, gap::Vector{UInt8}, tensor::CallTensor{T,N}, array::Array{T,N}, portion) where {T,N}
    from, dims = portion(array)
    foreach(n -> unsafe_store!(sizes, dims[N+1-n], n), 1:N)
    bytes = prod(dims) * sizeof(T)
    push!(parts, IOVec(Ptr{UInt8}(from), bytes))
    rest = cld(tensor.place.bytes, ALIGN_BYTES) * ALIGN_BYTES - bytes
    rest == 0 || push!(parts, IOVec(pointer(gap), rest))
    return nothing
end

function take_outputs!(prepared::Prepared, body_bytes::Int, count::Int, ys::Union{Nothing,Vector{Any}})
    socket, c = prepared.socket, prepared.session.connection
    payload = reply_payload(socket, body_bytes, count)
    shapes = Any[reply_size(socket, tensor, payload + SIZES_BYTES * (index - 1)) for (index, tensor) in enumerate(prepared.given)]
    ys === nothing || foreach(check_filled, prepared.given, shapes, ys)
    return Any[copy_inline!(c, ys === nothing ? new_output(tensor, shape) : ys[index], socket.received, payload + tensor.place.offset)
               for (index, (tensor, shape)) in enumerate(zip(prepared.given, shapes))]
end

"Where the payload begins in what was received, which is as long as was said."
function reply_payload(socket::CallSocket, body_bytes::Int, count::Int)
    payload = HEADER_BYTES + body_bytes
    said = length(socket.received) - HEADER_BYTES - BODY_BYTES_MAX
    count - payload == said || break_off!(socket, "a payload of $(count - payload) bytes where $said were said")
    return payload
end

new_output(::CallTensor{T,N}, dims::Dims{N}) where {T,N} = Array{T,N}(undef, dims)
check_filled(tensor::CallTensor, shape, y) = size(y) == shape || throw(DimensionMismatch(
    "result $(repr(tensor.port)) has size $shape, and the array for it $(size(y))"))

"The size of an output, from the words `at` which the reply has it."
function reply_size(socket::CallSocket, tensor::CallTensor{T,N}, at::Int) where {T,N}
    word(n) = GC.@preserve socket unsafe_load(Ptr{UInt64}(pointer(socket.received, at + 1)), n)
    wire = ntuple(word, RANK_MAX)
    all(n -> n <= N ? wire[n] <= tensor.dims[N+1-n] : wire[n] == 0, 1:RANK_MAX) ||
        break_off!(socket, "output $(repr(tensor.port)) has a shape beyond what was said")
    return ntuple(n -> Int(wire[N+1-n]), N)
end

# ---- its end

"""
    Strait.cancel!(prepared)

Asks the host to end the call that is under way, if any; that call throws a [`RemoteError`](@ref) with reason `CANCELLED`, and the next is
not affected. Use it from a task other than the one that calls. Returns `nothing`.
"""
function cancel!(prepared::Prepared)
    c = prepared.session.connection
    check_open(prepared.socket)
    prepared.socket.cancelled[] = true
    ask(c, CANCEL, with_options(prepared.session, (prepared = prepared.socket.number,)))
    return nothing
end

"""
    close(prepared)

Ends the prepared kernel, in the host, too. A call that runs throws [`Disconnected`](@ref), as does any later one. Results stay.
"""
function Base.close(prepared::Prepared)
    c, socket = prepared.session.connection, prepared.socket
    check_owner(c)
    finish!(socket, Disconnected("what was prepared of $(prepared.kernel) was closed by this program; prepare it anew"))
    locked(() -> delete!(c.call_sockets, socket), c)
    # The host looks at the socket between calls, not while one runs.
    socket.owed && quietly(() -> tell(c, CANCEL, (prepared = socket.number,)))
    return nothing
end

"Whether it can be called, as far as is known without asking the host."
Base.isopen(prepared::Prepared) = prepared.socket.ending === nothing

Base.show(io::IO, p::Prepared) = print(io, "Strait.Prepared(", p.kernel, ": ", join(p.inputs, ", "), " -> ", join(p.outputs, ", "), isopen(p) ? ")" : "; over)")

"Closes the sockets of what nobody has any more."
function close_abandoned!(c::Connection)
    # A forked child's are the parent's.
    getpid_now() == c.owner || return nothing
    found = locked(() -> [socket for socket in c.call_sockets if socket.abandoned[]], c)
    for socket in found
        finish!(socket, Disconnected("what was prepared was garbage"))
        locked(() -> delete!(c.call_sockets, socket), c)
    end
    return nothing
end
