# What users call.

const CLIENT_VERSION = v"0.1.0"
"Idle segments for copied inputs that a session keeps, and their bytes."
const SCRATCH_COUNT_MAX = 16
const SCRATCH_BYTES_MAX = 1 << 30

"""
    Session

A connection to a host, made by [`connect`](@ref). Any number of tasks, on any threads, may use it at once.
`close(session)` ends it; arrays that came over it stay readable.
"""
mutable struct Session
    connection::Connection
    directory::String
    welcome::Dict{String,Any}
    inline_bytes::Int                             # largest tensor that may travel in a frame; 0: none
    request_id::Union{Nothing,String}
    lease_ms::Union{Nothing,Int}
    lock::ReentrantLock                           # guards the two below
    kernels::Dict{String,Vector{Kernel}}
    scratch::Vector{Array}                        # idle, the latest used last
end

"""
    connect(; options...)
    connect("unix:///run/strait"; options...)
    connect(f, ...; options...)

Begins a session with the host whose runtime directory the address names. Without one: `STRAIT_ADDRESS` alone if it
is set; else the first of `RUNTIME_DIRECTORY`, `XDG_RUNTIME_DIR/strait`, `/run/strait` (as root) and `/tmp/strait-UID` that
has a host. With a function first, it is called with the session, which is closed afterwards.

Options:
- `renew = true`: renew leases in the background at half their lifetime, so that they end only with their arrays
- `lease_ms = nothing`: lifetime of a lease; `nothing` is the host's default
- `request_id = nothing`: id of every request in the host's log and in errors; 1 to 64
  characters from `A-Z a-z 0-9 . _ : -`

Throws [`NoHost`](@ref) if nobody answers.
"""
connect(; options...) = connect_to(find_directory(); options...)
connect(address::AbstractString; options...) = connect_to(parse_address(address); options...)
connect(f::Function, address...; options...) = closing(f, connect(address...; options...))

"`f(x)`; `x` is closed, whatever comes of that."
function closing(f, x)
    try
        return f(x)
    finally
        close(x)
    end
end

function connect_to(directory::String; renew::Bool = true, lease_ms = nothing, request_id = nothing)
    request_id === nothing || check_request_id(request_id)
    path = joinpath(directory, DATA_SOCKET)
    fd, errno = connect_seqpacket(path)
    fd < 0 && throw(NoHost("no strait host at $path: $(Libc.strerror(errno)); start one with `strait serve`"))
    return begin_session(fd, directory; renew = renew, lease_ms = lease_ms, request_id = request_id)
end

"A session over a connected socket, which it owns from here."
function begin_session(fd::Cint, directory::String; renew::Bool = true, lease_ms = nothing, request_id = nothing)
    connection = Connection(fd; renew = renew)
    enlist(connection)
    try
        hello = (protocol = PROTOCOL_VERSION, client = "strait-julia/$CLIENT_VERSION")
        welcome = ask(connection, HELLO, hello)
        field(welcome, "protocol", JSON.Whole) == PROTOCOL_VERSION || throw(ProtocolError("its WELCOME is of another version"))
        session = Session(connection, directory, welcome, size_field(welcome, "inline_bytes", 0), request_id === nothing ? nothing : String(request_id),
            lease_ms, ReentrantLock(), Dict(), Array[])
        # The connection lives on with arrays that came over it.
        abandoned = connection.abandoned
        finalizer(_ -> (abandoned[] = true; signal_reaper()), session)
        return session
    catch e
        finish!(connection, Disconnected("the session did not begin"))
        rethrow()
    end
end

check_request_id(id::AbstractString) = occursin(r"\A[A-Za-z0-9._:-]{1,64}\z", id) ||
    throw(ArgumentError("request id $(repr(id)): it needs 1 to 64 characters from A-Z a-z 0-9 . _ : -"))

"""
    close(session)

Ends the session, and with it its leases. Arrays that came over it stay readable.
"""
function Base.close(s::Session)
    check_owner(s.connection)
    finish!(s.connection, Disconnected("the session was closed by this program; connect again"))
    lock(() -> empty!(s.scratch), s.lock)
    signal_reaper()
    return nothing
end

"""
    isopen(session)

Whether the session is alive, as far as is known without asking the host.
"""
Base.isopen(s::Session) = (quietly(() -> drain!(s.connection)); s.connection.ending === nothing)

Base.show(io::IO, s::Session) = print(io, "Strait.Session(", repr("unix://" * s.directory),
    s.connection.ending === nothing ? "" : ", over", ')')

"Before each request: what the host pushed is read, what died is given back."
function ready!(s::Session)
    c = s.connection
    check_owner(c)
    drain!(c)
    c.deaths[] == c.reaped && isempty(c.leases.ended) || reap!(c)
    relieve!(c)
    return c
end

"A request's body with what the session adds to it."
function with_options(s::Session, body::NamedTuple; lease_ms = nothing, request_id = nothing)
    id = something(request_id, s.request_id, Some(nothing))
    request_id === nothing || check_request_id(request_id)
    return (; body..., (lease_ms === nothing ? NamedTuple() : (lease_ms = milliseconds(lease_ms, "lease_ms"),))...,
        (id === nothing ? NamedTuple() : (request_id = id,))...)
end

milliseconds(value, what) = value isa Real && !(value isa Bool) && 0 < value < 2.0^53 ? ceil(Int, value) :
    throw(ArgumentError("$what is $(repr(value)); it is a number of milliseconds above 0"))

# ---- arrays in segments

"""
    zeros(session, T, dims...)
    zeros(session, dims...)

An `Array` of zeros inside a segment, so that [`call`](@ref) and [`publish!`](@ref) take it without a copy. Fill it like any
`Array`, but not while a call that uses it is running: the kernel would see some of the old and some of the new
elements. `T` is one of `Strait.DTYPES`; without it `Float64`. It is given back to the host when it is garbage-collected, or by
[`release!`](@ref).
"""
Base.zeros(s::Session, ::Type{T}, dims::Tuple{Vararg{Integer}}) where {T} = create(s, T, Dims(dims))
Base.zeros(s::Session, ::Type{T}, dims::Integer...) where {T} = create(s, T, Dims(dims))
Base.zeros(s::Session, dims::Tuple{Vararg{Integer}}) = create(s, Float64, Dims(dims))
Base.zeros(s::Session, dims::Integer...) = create(s, Float64, Dims(dims))

"""
    similar(session, x)
    similar(session, x, T)
    similar(session, x, T, dims)

An `Array` inside a segment with the dimensions and element type of `x`, or with those given; see `zeros(session, ...)`.
Its elements are zero.
"""
Base.similar(s::Session, x::AbstractArray, ::Type{T} = eltype(x), dims::Dims = size(x)) where {T} = create(s, T, dims)

function create(s::Session, ::Type{T}, dims::Dims{N}) where {T,N}
    body = (tensors = [(name = "x", dtype = dtype(T), shape = reverse(dims))],)
    all(n -> n >= 0, dims) || throw(ArgumentError("an array of size $dims"))
    0 in dims && return Array{T,N}(undef, dims)
    c = ready!(s)
    arrays = take_mapping!(c, request(c, CREATE, with_options(s, body; lease_ms = s.lease_ms)), true)
    length(arrays) == 1 && arrays[1] isa Array{T,N} && size(arrays[1]) == dims ||
        throw(ProtocolError("CREATE of one $T[$(join(dims, ", "))] was answered by $(map(summary, arrays))"))
    return arrays[1]::Array{T,N}
end

"The arrays of a reply with a mapping, a lease and one descriptor."
function take_mapping!(c::Connection, reply::Reply, writable::Bool)
    leases = granted(reply.body)
    if length(leases) != 1 || length(reply.fds) != 1
        locked(() -> discard!(c, reply), c)
        throw(ProtocolError("a mapping came with $(length(leases)) leases and $(length(reply.fds)) descriptors"))
    end
    mapping = try
        Mapping(field(reply.body, "mapping", Dict{String,Any}))
    catch
        locked(() -> discard!(c, reply), c)
        rethrow()
    end
    return map_reply!(c, mapping, leases[1].first, reply.fds[1], writable)
end

"""
    release!(session, y)

Gives an array's segment back to the host now, not when the garbage collector finds it. Afterwards `y`, and anything that
shares its elements, reads as zeros; using it in a call throws [`Released`](@ref). An array that is not in a segment of
this session, such as a small result, is left alone. In a flight of several tensors each has to be released. Returns `nothing`.
"""
function release!(s::Session, y::Array)
    check_owner(s.connection)
    found = try
        find_tensor(s.connection, y)
    catch e
        e isa Released || rethrow()
        nothing
    end
    found === nothing && return nothing
    release_tensor!(s.connection, found...)
    s.connection.ending === nothing && quietly(() -> reap!(s.connection))
    return nothing
end
release!(s::Session, ys::Union{NamedTuple,Tuple}) = foreach(y -> release!(s, y), values(ys))

"""
    renew!(session, y; lease_ms = nothing)

Renews the lease of an array's segment, counted from now, and returns the lifetime that the host granted, in
milliseconds. Without `lease_ms` it is the host's default. Useful only in a session with `renew = false`. Throws
[`LeaseExpired`](@ref) if it is over, `ArgumentError` if `y` is not in a segment of this session.
"""
function renew!(s::Session, y::Array; lease_ms = nothing)
    c = ready!(s)
    found = find_tensor(c, y)
    found === nothing && throw(ArgumentError("the array is in no segment of this session, so there is no lease to renew"))
    lease = found[1].lease
    check_lease(c, lease)
    return renewed!(c, [lease], ask(c, RENEW, with_options(s, (leases = [lease],); lease_ms = lease_ms)))
end

# ---- inputs that are in no segment

"""
An idle segment's array like `x` to copy to. The caller gives it back by [`keep_scratch!`](@ref); a session whose
calls repeat needs no new pages.
"""
function take_scratch!(s::Session, ::Type{T}, dims::Dims{N}) where {T,N}
    kept = lock(s.lock) do
        index = findlast(array -> eltype(array) === T && size(array) == dims, s.scratch)
        index === nothing ? nothing : splice!(s.scratch, index)
    end
    if kept !== nothing
        mapped, _ = something(find_tensor(s.connection, kept))
        why = locked(() -> why_gone(s.connection.leases, mapped.lease), s.connection)
        why === nothing && return kept::Array{T,N}
        release!(s, kept)
    end
    return create(s, T, dims)
end

function keep_scratch!(s::Session, array::Array)
    isempty(array) && return nothing
    surplus = lock(s.lock) do
        push!(s.scratch, array)
        surplus = Array[]
        while length(s.scratch) > SCRATCH_COUNT_MAX || mapreduce(sizeof, +, s.scratch; init = 0) > SCRATCH_BYTES_MAX
            push!(surplus, popfirst!(s.scratch))
        end
        return surplus
    end
    foreach(old -> release!(s, old), surplus)
    return nothing
end

"""
The element type of `x` as a tensor. A tensor has no nulls: an array that may hold `missing` or `nothing` is taken if it
does not, and refused with their number if it does.
"""
function tensor_type(x::AbstractArray{E}) where {E}
    T = Base.nonnothingtype(nonmissingtype(E))
    if T !== E
        absent = count(value -> value === missing || value === nothing, x)
        absent == 0 || throw(ArgumentError(
            "$absent of $(length(x)) elements are missing, and a tensor has no nulls: fill them (coalesce.(x, 0)) or drop them (collect(skipmissing(x)))"))
    end
    # Its message names the type as it is.
    haskey(DTYPE_OF, T) || dtype(E)
    return T
end

"Copies the elements that `x` shows. Their indices, from whatever they begin, stay behind."
function copy_shown!(array::Array, x::AbstractArray)
    Base.has_offset_axes(x) ? foreach((n, value) -> array[n] = value, eachindex(array), x) : copyto!(array, x)
    return array
end

"The same into a segment's array, counted."
function fill!!(s::Session, array::Array, x::AbstractArray)
    copy_shown!(array, x)
    Threads.atomic_add!(s.connection.copied_bytes, sizeof(array))
    return array
end

# ---- flights

"""
    publish!(session, name, x; replace = false)

Makes `x` a flight: every process of this user can find it by that name (with `fetch`, from any language), and it outlives
this program, until `delete!(session, name)`. Returns `x`.

An array that was made by `zeros(session, ...)`, or came from `call` or `fetch`, is published as it is, with no copy. It
can then no longer be written to, even if the host refuses the name: a write is a `ReadOnlyMemoryError`. Of any other
array, and of a small result of `call`, a dense copy is published, counted in [`stats`](@ref); one that contains `missing` is refused. Throws a [`RemoteError`](@ref) with reason `NAME_TAKEN`
if there is such a flight and `replace` is false.
"""
function publish!(s::Session, name::AbstractString, x::AbstractArray; replace::Bool = false)
    c = ready!(s)
    found = find_tensor(c, x)
    if found === nothing
        publish_copy(s, String(name), x, replace)
    else
        GC.@preserve x publish_mapped(s, String(name), found[1], replace)
    end
    return x
end
publish!(s::Session, name::AbstractString, x::Number; replace::Bool = false) = (publish!(s, name, fill(x); replace = replace); x)

function publish_copy(s::Session, name::String, x::AbstractArray, replace::Bool)
    T = tensor_type(x)
    isempty(x) && return publish_empty(s, name, T, size(x), replace)
    array = create(s, T, size(x))
    try
        mapped, _ = something(find_tensor(s.connection, fill!!(s, array, x)))
        publish_mapped(s, name, mapped, replace)
    finally
        release!(s, array)
    end
end

function publish_empty(s::Session, name::String, T, dims::Dims, replace::Bool)
    c = s.connection
    segment, lease = empty_segment(s, T, dims)
    try
        ask(c, PUBLISH, with_options(s, (; segment..., name = name, replace = replace)))
    finally
        locked(() -> end!(c.leases, lease), c)
        signal_reaper()
    end
end

"""
A segment of a tensor without elements, as the wire names it, and its lease, which is all there is to hold: it has no
pages that could be mapped.
"""
function empty_segment(s::Session, T, dims::Dims)
    c = s.connection
    reply = request(c, CREATE, with_options(s, (tensors = [(name = "x", dtype = dtype(T), shape = reverse(dims))],); lease_ms = s.lease_ms))
    foreach(close_fd, reply.fds)
    leases = granted(reply.body)
    try
        length(leases) == 1 || throw(ProtocolError("CREATE was answered by $(length(leases)) leases"))
        return (segment = Mapping(field(reply.body, "mapping", Dict{String,Any})).segment,), leases[1].first
    catch
        locked(() -> foreach(((lease, _),) -> end!(c.leases, lease), leases), c)
        signal_reaper()
        rethrow()
    end
end

function publish_mapped(s::Session, name::String, mapped::Mapped, replace::Bool)
    c = s.connection
    check_lease(c, mapped.lease)
    locked(c) do
        mapped.fd < 0 && return
        # The host cannot seal while anybody maps it writable.
        map_readonly_over(mapped.address, mapped.bytes, mapped.fd)
        close_fd(mapped.fd)
        mapped.fd = Cint(-1)
    end
    ask(c, PUBLISH, with_options(s, (segment = mapped.mapping.segment, name = name, replace = replace)))
    return nothing
end

"""
    fetch(session, name; lease_ms = nothing)

The tensor of a flight as an `Array` over its pages, read-only; for a flight of several tensors a `NamedTuple` of
`Array`s. Writing to one is a `ReadOnlyMemoryError`. Throws a [`RemoteError`](@ref) with reason `FLIGHT_NOT_FOUND`
if there is no such flight.

The dimensions are the wire's in reverse order: what numpy calls shape `(rows, columns)` has
`size` `(columns, rows)` here, over the same bytes in the same order.
"""
function Base.fetch(s::Session, name::AbstractString; lease_ms = nothing)
    c = ready!(s)
    reply = request(c, MAP, with_options(s, (name = String(name),); lease_ms = something(lease_ms, s.lease_ms, Some(nothing))))
    mapping = get(reply.body, "mapping", nothing)
    arrays = take_mapping!(c, reply, false)
    names = Mapping(mapping).places
    length(arrays) == 1 && return arrays[1]
    return NamedTuple{Tuple(Symbol(place.spec.name) for place in names)}(Tuple(arrays))
end

"""
    delete!(session, name)

Removes a flight's name at once; its memory is freed once nobody uses it. Returns the session. Throws a
[`RemoteError`](@ref) with reason `FLIGHT_NOT_FOUND` if there is no such flight.
"""
function Base.delete!(s::Session, name::AbstractString)
    ask(ready!(s), DROP, with_options(s, (name = String(name),)))
    return s
end

"""
    flights(session)

The names of this user's flights, each with its tensors ([`TensorSpec`](@ref)s), sorted by name.
"""
function flights(s::Session)
    c = ready!(s)
    found = Pair{String,Vector{TensorSpec}}[]
    for body in pages(after -> ask(c, LIST, with_options(s, after === nothing ? NamedTuple() : (after = after,))),
        "flights", flight -> field(flight, "name", String))
        mapping = Mapping(field(body, "mapping", Dict{String,Any}))
        push!(found, field(body, "name", String) => [place.spec for place in mapping.places])
    end
    return found
end

"All entries of a listing that comes in pages."
function pages(page, key::String, after)
    found = Dict{String,Any}[]
    while true
        body = page(isempty(found) ? nothing : after(last(found)))
        entries = objects(body, key)
        repeated = !isempty(found) && !isempty(entries) && after(last(entries)) == after(last(found))
        append!(found, entries)
        field(body, "more", Bool, false) || return found
        isempty(entries) && throw(ProtocolError("an empty page of $(repr(key)) promises more"))
        repeated && throw(ProtocolError("a page of $(repr(key)) came twice"))
    end
end

"""
    kernels(session)
    kernels(session, name)

The host's kernels ([`Kernel`](@ref Strait.Kernel)s) with their documentation, or those of one name, or a pipeline as if it were one.
"""
function kernels(s::Session, name::Union{Nothing,AbstractString,AbstractDict} = nothing)
    c = ready!(s)
    only = name === nothing ? NamedTuple() : name isa AbstractDict ? (pipeline = name,) : (kernel = String(name),)
    found = pages("kernels", kernel -> field(kernel, "plugin", String) * "/" * field(kernel, "name", String)) do after
        ask(c, KERNELS, with_options(s, after === nothing ? only : (; only..., after = after)))
    end
    return map(Kernel, found)
end

"""
    stats(session)

Counts of this session and of its host:
- `copied_bytes`: bytes of arrays that this session copied into segments or frames, because they were not in a segment, and of small
  results that it copied out of frames (and of tensors of `bool8` with bytes other than 0 and 1, from the first such byte on)
- `huge_bytes`: bytes of large arrays to fill (`zeros(session, ...)`, and copies) that got huge pages before they were filled
- `calls`: kernel calls that it made
- `mappings`, `mapped_bytes`: segments that it has mapped now, and their bytes
- `host`: what the host counts, a `Dict` (docs/protocol.md, STATS): its own copies are `host["copied_bytes"]`
"""
function stats(s::Session)
    host = ask(ready!(s), STATS, with_options(s, NamedTuple()))
    return (; client_stats(s)..., host = host)
end

"""
    Strait.client_stats(session)

The part of [`stats`](@ref) that needs no answer from the host; it is available after the session's end, too.
"""
function client_stats(s::Session)
    c = s.connection
    mappings, bytes = locked(() -> (count(mapped -> !mapped.released, c.mapped), c.mapped_bytes), c)
    return (copied_bytes = c.copied_bytes[], huge_bytes = c.huge_bytes[], calls = c.calls[], mappings = mappings, mapped_bytes = bytes)
end

"""
    ping(session)

Asks whether the host is there; returns `nothing`, or throws why it is not.
"""
ping(s::Session) = (ask(ready!(s), PING, with_options(s, NamedTuple())); nothing)
