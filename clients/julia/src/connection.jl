# One connection, shared by all tasks of a session and by the arrays that came over it.
#
#   callers ── transmit ─▶ host
#      ▲                     │
#      └── waiting[sequence] ◀── receive_all! ◀┘
#
# There is no reader: of those who wait for a reply one *leads*, that is receives for all, and wakes the others
# when it leaves. So no reply goes through a task that may sit on a busy thread, and a small call costs one wake-up.
# A wait for the socket is Julia's own (`FDWatcher`), never a system call that blocks: that would stop every
# thread's garbage collection.
#
# Finalizers may run at any allocation, also of a task that holds a lock. So they take none: they count (atomically)
# and signal the reaper.

"A session's right to a segment."
mutable struct Lease
    id::UInt64
    life::Float64                      # seconds
    due::Float64                       # when to renew, in seconds of `now()`; Inf while that is under way or not wanted
    gone::Union{Nothing,String}        # why it is over
end

"A mapped segment, from the reply that granted it until its arrays are dead."
mutable struct Mapped
    address::Ptr{Cvoid}
    bytes::Int
    mapping::Mapping
    lease::UInt64
    fd::Cint                           # kept while the segment can be written; else -1
    arrays::Int                        # made over it and not collected yet, when `deaths` is taken off
    deaths::Threads.Atomic{Int}        # counted up by finalizers
    usable::Vector{Bool}               # of each tensor: made into an array, and not released
    released::Bool
end

struct Reply
    op::Op
    body::Dict{String,Any}
    fds::Vector{Cint}
end

mutable struct Pending
    op::Op
    reply::Union{Nothing,Reply}
    wanted::Bool
end

mutable struct Connection
    owner::Cint                        # the process that connected
    fd::Cint                           # -1 once closed
    watcher::FDWatcher
    changed::Threads.Condition         # its lock guards everything below but the atomics
    sequence::UInt32
    waiting::Dict{UInt32,Pending}
    leading::Bool
    users::Int                         # tasks that wait for the descriptor: it is closed after them
    ending::Union{Nothing,StraitError}
    leases::Dict{UInt64,Lease}
    renew::Bool
    timer::Union{Nothing,Timer}
    timer_at::Float64
    outdated::Vector{UInt64}           # leases to be released
    mapped::Set{Mapped}
    tensors::Dict{UInt,Tuple{Mapped,Int}}   # by the address of an array's first element
    mapped_bytes::Int
    collect_at::Int                    # of `mapped_bytes`: when to look for garbage
    draining_until::Float64
    deaths::Threads.Atomic{Int}
    reaped::Int
    abandoned::Threads.Atomic{Bool}    # nobody has the session any more
    copied_bytes::Threads.Atomic{Int}
    huge_bytes::Threads.Atomic{Int}
    calls::Threads.Atomic{Int}
    buffer::Vector{UInt8}
    control::Vector{UInt8}
end

"Mapped bytes from which on garbage is looked for: the collector itself does not see them."
const COLLECT_BYTES_MIN = 1 << 30
"One RENEW or RELEASE with this many ids of 20 digits stays below the limit of a frame's body."
const LEASES_MAX = 2000
"A host that grants very short leases is not asked more often than this (seconds)."
const RENEW_INTERVAL_MIN = 0.005

now() = time_ns() / 1e9

function Connection(fd::Cint; renew::Bool = true)
    connection = Connection(getpid_now(), fd, FDWatcher(RawFD(fd), true, false), Threads.Condition(), 0, Dict(), false, 0,
        nothing, Dict(), renew, nothing, Inf, UInt64[], Set{Mapped}(), Dict(), 0, COLLECT_BYTES_MIN, Inf,
        Threads.Atomic{Int}(0), 0, Threads.Atomic{Bool}(false), Threads.Atomic{Int}(0), Threads.Atomic{Int}(0), Threads.Atomic{Int}(0),
        Vector{UInt8}(undef, HEADER_BYTES + BODY_BYTES_MAX), zeros(UInt8, CMSG_HEADER + 4 * FDS_MAX))
    enlist(connection)
    return connection
end

locked(f, c::Connection) = lock(f, c.changed)

check_owner(c::Connection) = (here = getpid_now(); here == c.owner || throw(Forked(c.owner, here)))

# ---- requests

"Sends a request and waits for its reply's body and descriptors, which the caller owns. Throws what an ERROR says."
function request(c::Connection, op::Op, body; begun = nothing)
    check_owner(c)
    sequence, pending = expect!(c, op)
    try
        transmit(c, encode_frame(op, sequence, body))
        begun === nothing || begun(sequence)
        await(() -> pending.reply !== nothing, c)
        reply = pending.reply::Reply
        forget!(c, sequence)
        reply.op == ERROR || return reply
        foreach(close_fd, reply.fds)
        throw(failure(reply.body))
    catch
        abandon!(c, sequence)
        rethrow()
    end
end

"A request without descriptors in its reply."
function ask(c::Connection, op::Op, body)
    reply = request(c, op, body)
    # Nothing was asked for that could be held.
    locked(() -> discard!(c, reply), c)
    return reply.body
end

"A request whose answer nobody waits for."
function tell(c::Connection, op::Op, body)
    sequence, pending = expect!(c, op)
    locked(() -> pending.wanted = false, c)
    try
        transmit(c, encode_frame(op, sequence, body))
    catch
        forget!(c, sequence)
        rethrow()
    end
    return nothing
end

function expect!(c::Connection, op::Op)
    locked(c) do
        sequence = c.sequence
        while true
            sequence += UInt32(1)
            sequence != 0 && !haskey(c.waiting, sequence) && break
        end
        c.sequence = sequence
        pending = Pending(op, nothing, true)
        c.waiting[sequence] = pending
        return (sequence, pending)
    end
end

forget!(c::Connection, sequence::UInt32) = locked(() -> (delete!(c.waiting, sequence); nothing), c)

"A request failed or was interrupted: its call is cancelled, and what it may still be granted is given back."
function abandon!(c::Connection, sequence::UInt32)
    cancel = locked(c) do
        pending = get(c.waiting, sequence, nothing)
        pending === nothing && return false
        if pending.reply !== nothing || c.ending !== nothing
            delete!(c.waiting, sequence)
            pending.reply === nothing || discard!(c, pending.reply)
            return false
        end
        pending.wanted = false
        return pending.op == INVOKE
    end
    if cancel
        quietly(() -> tell(c, CANCEL, (sequence = sequence,)))
        # Its answer is waited for all the same: results that were under way hold memory in the host.
        in_background(() -> quietly(() -> undisturbed(() -> await(() -> !haskey(c.waiting, sequence), c))))
    end
    signal_reaper()
    return nothing
end

"What nobody waits for: its descriptors are closed, its leases released."
function discard!(c::Connection, reply::Reply)
    foreach(close_fd, reply.fds)
    reply.op == OK && foreach(((lease, _),) -> end_lease!(c, lease), granted(reply.body))
    return nothing
end

"Runs what must not fail for its caller: the connection's end will be noticed by whoever needs it next."
function quietly(f)
    try
        f()
    catch e
        e isa Union{StraitError,Base.IOError,EOFError} || rethrow()
    end
    return nothing
end

function transmit(c::Connection, packet::Vector{UInt8})
    while true
        fd, errno = locked(c) do
            c.ending === nothing || throw(c.ending)
            errno = send_packet(c.fd, packet)
            errno == Libc.EAGAIN && (c.users += 1)
            return (c.fd, errno)
        end
        errno == 0 && return nothing
        if errno == Libc.EAGAIN
            try
                wait_until_ready(() -> wait(RawFD(fd); writable = true))
            finally
                locked(() -> (c.users -= 1; close_if_ended!(c)), c)
            end
        else
            # What the host said before it went is still there to be read.
            drain!(c)
            finish!(c, Disconnected("the host closed the connection ($(Libc.strerror(errno))); connect again"))
        end
    end
end

"False if libuv found the socket broken, as after the death of a host that left requests unread: the next call tells why."
function wait_until_ready(wait)
    try
        wait()
        return true
    catch e
        e isa Base.IOError || rethrow()
        return false
    end
end

# ---- replies

"Waits until `done()`, which only a reply brings about."
function await(done, c::Connection)
    lock(c.changed)
    try
        while !done()
            c.ending === nothing || throw(c.ending)
            c.leading ? wait(c.changed) : lead(c)
        end
    finally
        unlock(c.changed)
    end
end

"Receives for all until something came. Called, and left, with the lock held."
function lead(c::Connection)
    c.leading = true
    unlock(c.changed)
    try
        broken = !wait_until_ready(() -> wait(c.watcher))
        receive_all!(c)
        broken && finish!(c, Disconnected("the connection is over: the host ended; connect again"))
    finally
        lock(c.changed)
        c.leading = false
        close_if_ended!(c)
        notify(c.changed)
    end
end

"Takes what is there already, without waiting."
function drain!(c::Connection)
    mine = locked(c) do
        c.ending === nothing && !c.leading || return false
        return c.leading = true
    end
    mine || return nothing
    try
        receive_all!(c)
    finally
        locked(c) do
            c.leading = false
            close_if_ended!(c)
            notify(c.changed)
        end
    end
    return nothing
end

# Not to be interrupted: a frame that was taken and not dealt with would leave somebody waiting for ever.
receive_all!(c::Connection) = disable_sigint(() -> receive_undisturbed!(c))

function receive_undisturbed!(c::Connection)
    while c.ending === nothing
        count, fds, flags = receive_packet!(c.buffer, c.control, c.fd)
        count == -Libc.EAGAIN && return nothing
        if count <= 0
            why = count == 0 ? "the host ended or closed it" : Libc.strerror(-count)
            return finish!(c, Disconnected("the connection is over: $why; connect again"))
        end
        try
            flags & (MSG_TRUNC | MSG_CTRUNC) == 0 || throw(ProtocolError(
                "a frame of more than $(length(c.buffer)) bytes, or with more than $FDS_MAX descriptors or more than this process may open"))
            op, sequence, body = decode_frame(view(c.buffer, 1:count))
            locked(() -> dispatch!(c, Reply(op, body, fds), sequence), c)
        catch e
            foreach(close_fd, fds)
            e isa StraitError && return finish!(c, e)
            # Somebody may wait for what this frame was, and for ever.
            finish!(c, Disconnected("a frame of the host's could not be handled: $(sprint(showerror, e)); connect again"))
            rethrow()
        end
    end
    return nothing
end

function dispatch!(c::Connection, reply::Reply, sequence::UInt32)
    reply.op in (GONE, SHUTDOWN) && !isempty(reply.fds) && throw(ProtocolError("a $(reply.op) with descriptors"))
    if reply.op == GONE
        lease = get(c.leases, UInt64(size_field(reply.body, "lease")), nothing)
        if lease !== nothing
            lease.gone = "lease $(lease.id) is over: $(field(reply.body, "reason", String, "no reason given"))"
            lease.due = Inf
        end
    elseif reply.op == SHUTDOWN
        c.draining_until = now() + size_field(reply.body, "drain_ms") / 1000
    elseif reply.op == ERROR && sequence == 0
        throw(ProtocolError("it refused a frame: $(field(reply.body, "message", String, "no message"))"))
    elseif reply.op in (OK, WELCOME, ERROR)
        # Known here already, since their GONE may come before anybody looked at the reply.
        for (lease, life) in (reply.op == OK ? granted(reply.body) : Pair{UInt64,Int}[])
            hold!(c, lease, life / 1000)
        end
        pending = get(c.waiting, sequence, nothing)
        if pending !== nothing && pending.wanted && pending.reply === nothing
            pending.reply = reply
        else
            pending === nothing || pending.wanted || delete!(c.waiting, sequence)
            discard!(c, reply)
            isempty(c.outdated) || signal_reaper()
        end
    else
        throw(ProtocolError("$(reply.op) is not for clients"))
    end
    return nothing
end

# ---- the end

"Ends everything that waits. The first end stands."
function finish!(c::Connection, ending::StraitError)
    locked(c) do
        if c.ending === nothing
            c.ending = ending
            c.timer === nothing || close(c.timer)
            c.timer = nothing
            # Wakes whoever waits for the descriptor.
            c.fd < 0 || ccall(:shutdown, Cint, (Cint, Cint), c.fd, SHUT_RDWR)
        end
        close_if_ended!(c)
        notify(c.changed)
    end
    return nothing
end

function close_if_ended!(c::Connection)
    c.ending !== nothing && !c.leading && c.users == 0 && c.fd >= 0 || return nothing
    close(c.watcher)
    close_fd(c.fd)
    c.fd = Cint(-1)
    return nothing
end

# ---- leases

function hold!(c::Connection, id::UInt64, life::Float64)
    due = c.renew ? now() + interval(life) : Inf
    c.leases[id] = Lease(id, life, due, nothing)
    plan!(c, due)
end

interval(life::Float64) = max(life / 2, RENEW_INTERVAL_MIN)

"Waits for a timer; false if it was closed."
function came(timer::Timer)
    try
        undisturbed(() -> wait(timer))
        return true
    catch e
        e isa EOFError || rethrow()
        return false
    end
end

"Sees to it that renewals are looked at when `due` comes."
function plan!(c::Connection, due::Float64)
    due < c.timer_at && c.ending === nothing || return nothing
    c.timer === nothing || close(c.timer)
    c.timer_at = due
    timer = c.timer = Timer(max(due - now(), 0.0))
    in_background(() -> came(timer) && quietly(() -> renew_due!(c)))
    return nothing
end

"Takes a lease off the books; it is released with the next RELEASE."
function end_lease!(c::Connection, id::UInt64)
    lease = pop!(c.leases, id, nothing)
    lease === nothing || lease.gone !== nothing || push!(c.outdated, id)
    return nothing
end

function check_lease(c::Connection, id::UInt64)
    locked(c) do
        lease = get(c.leases, id, nothing)
        lease === nothing && throw(LeaseExpired("lease $id is over", "-"))
        lease.gone === nothing || throw(LeaseExpired(lease.gone, "-"))
        return nothing
    end
end

"Renews, together, the leases that are due or nearly so."
function renew_due!(c::Connection)
    getpid_now() == c.owner || return nothing
    due = locked(c) do
        c.timer_at = Inf
        found = Dict{Float64,Vector{UInt64}}()
        next = Inf
        for lease in values(c.leases)
            # Half of the waiting time early still saves a frame for each neighbour in time.
            if lease.due <= now() + interval(lease.life) / 2
                lease.due = Inf
                push!(get!(Vector{UInt64}, found, lease.life), lease.id)
            else
                next = min(next, lease.due)
            end
        end
        plan!(c, next)
        return found
    end
    for (life, leases) in due, part in Iterators.partition(sort!(leases), LEASES_MAX)
        undisturbed(() -> renew!(c, collect(part), round(Int, life * 1000)))
    end
    return nothing
end

function renew!(c::Connection, leases::Vector{UInt64}, life_ms::Int)
    try
        renewed!(c, leases, ask(c, RENEW, (leases = leases, lease_ms = life_ms)))
    catch e
        e isa LeaseExpired || rethrow()
        if length(leases) == 1
            locked(() -> haskey(c.leases, leases[1]) && (c.leases[leases[1]].gone = e.message), c)
        else
            # One of them is over and none was renewed: find out which.
            foreach(lease -> renew!(c, [lease], life_ms), leases)
        end
    end
    return nothing
end

"The host gave them a new life, in milliseconds; it is answered."
function renewed!(c::Connection, leases::Vector{UInt64}, body::Dict{String,Any})
    life = life_ms(body)
    locked(c) do
        for id in leases
            lease = get(c.leases, id, nothing)
            lease === nothing || lease.gone !== nothing || hold!(c, id, life / 1000)
        end
    end
    return life
end

# ---- mappings and their arrays

"""
    map_reply!(c, mapping, lease, fd, writable)

Maps a segment and makes the arrays of its tensors, in their order. `fd` is closed, or kept if the segment is to be written.
"""
function map_reply!(c::Connection, mapping::Mapping, lease::UInt64, fd::Cint, writable::Bool)
    arrays = Any[]
    address = C_NULL
    try
        check_seals(fd, mapping, writable)
        # An array without elements needs no pages, and could not keep any (all of them may be one object).
        if any(place -> place.bytes > 0, mapping.places)
            address = map_fd(fd, mapping.bytes, writable)
            foreach(place -> writable ? make_huge!(c, address, place) : make_bools!(c, address, place, fd), mapping.places)
        end
        mapped = Mapped(address, mapping.bytes, mapping, lease, writable ? fd : Cint(-1), 0,
            Threads.Atomic{Int}(0), falses(length(mapping.places)), false)
        for (index, place) in enumerate(mapping.places)
            push!(arrays, array!(c, mapped, index, place.spec.type, Tuple(place.spec.dims)))
        end
        if mapped.arrays == 0
            address == C_NULL || unmap(address, mapping.bytes)
            close_fd(fd)
            locked(() -> end_lease!(c, lease), c)
            signal_reaper()
        else
            writable || close_fd(fd)
            locked(c) do
                push!(c.mapped, mapped)
                c.mapped_bytes += mapped.bytes
            end
        end
    catch
        # No array is handed out, so nothing can look at the pages any more.
        locked(c) do
            address == C_NULL || filter!(entry -> entry.second[1].address != address, c.tensors)
            end_lease!(c, lease)
        end
        address == C_NULL || unmap(address, mapping.bytes)
        close_fd(fd)
        signal_reaper()
        rethrow()
    end
    return arrays
end

"Linux has to vouch for what the host says of a segment."
function check_seals(fd::Cint, mapping::Mapping, writable::Bool)
    writable || mapping.seal in ("write", "host-write") || throw(MappingError(
        "segment $(mapping.segment) is $(mapping.seal): somebody can still write to it; it has to be published first"))
    seals = file_seals(fd)
    # Without SHRINK a shorter file would turn reads into SIGBUS.
    kept = seals >= 0 && seals & F_SEAL_SHRINK != 0
    frozen = seals & (mapping.seal == "write" ? F_SEAL_WRITE : F_SEAL_WRITE | F_SEAL_FUTURE_WRITE) != 0
    kept && (writable || frozen) || throw(MappingError(
        "segment $(mapping.segment) is said to be $(mapping.seal), and its descriptor $(seals < 0 ? "is no sealed memory" : "has the seals $seals"): somebody could still change it"))
    return nothing
end

"Large tensors to fill are born in huge pages: nobody has written to them yet."
function make_huge!(c::Connection, address::Ptr{Cvoid}, place::Place)
    place.bytes >= HUGE_MIN_BYTES || return nothing
    Threads.atomic_add!(c.huge_bytes, back_with_huge_pages!(address + place.offset, place.bytes))
    return nothing
end

"""
`bool8` is true in any byte but 0; a `Bool` of Julia's with another byte than 0 and 1 reads as its lowest bit. Where there
are such bytes their pages are replaced by private ones, which are counted as copied.
"""
function make_bools!(c::Connection, address::Ptr{Cvoid}, place::Place, fd::Cint)
    place.spec.type === Bool && place.bytes > 0 || return nothing
    bytes = unsafe_wrap(Array, Ptr{UInt8}(address + place.offset), place.bytes)
    from = findfirst(>(0x01), bytes)
    from === nothing && return nothing
    begun = (place.offset + from - 1) & -PAGE_BYTES
    map_private_over(address, begun, place.offset + place.bytes - begun, fd) do
        for n in from:length(bytes)
            # A page without one is only read, and stays the segment's.
            bytes[n] > 0x01 && (bytes[n] = 0x01)
        end
    end
    Threads.atomic_add!(c.copied_bytes, length(bytes) - from + 1)
    return nothing
end

"The object whose death means that nothing refers to an array's elements any more."
@static if VERSION >= v"1.11"
    # A `reshape` shares the Memory and not the Array.
    storage(array::Array) = array.ref.mem
else
    storage(array::Array) = array
end

function array!(c::Connection, mapped::Mapped, index::Int, ::Type{T}, dims::Dims{N}) where {T,N}
    place = mapped.mapping.places[index]
    place.bytes == 0 && return Array{T,N}(undef, dims)
    start = mapped.address + place.offset
    array = unsafe_wrap(Array, Ptr{T}(start), dims)
    locked(c) do
        c.tensors[UInt(start)] = (mapped, index)
        mapped.usable[index] = true
        mapped.arrays += 1
    end
    deaths, all_deaths = mapped.deaths, c.deaths
    finalizer(storage(array)) do _
        Threads.atomic_add!(deaths, 1)
        Threads.atomic_add!(all_deaths, 1)
        signal_reaper()
    end
    return array
end

"""
The segment that `array` is the tensor of, and its number in it; `nothing` if it is none of this session's, or has other
dimensions or elements than the tensor has. Throws [`Released`](@ref).
"""
function find_tensor(c::Connection, array::Array{T}) where {T}
    isbitstype(T) && !isempty(array) || return nothing
    found = locked(() -> get(c.tensors, UInt(pointer(array)), nothing), c)
    found === nothing && return nothing
    mapped, index = found
    mapped.usable[index] || throw(Released("the array was released and reads as zeros; fetch or compute it anew"))
    spec = mapped.mapping.places[index].spec
    return spec.type === T && Tuple(spec.dims) == size(array) ? found : nothing
end
find_tensor(::Connection, ::AbstractArray) = nothing

"""
Gives an array's segment back now. Its addresses stay valid and read as zeros until it is collected.
"""
function release_tensor!(c::Connection, mapped::Mapped, index::Int)
    locked(c) do
        mapped.usable[index] = false
        any(mapped.usable) && return nothing
        mapped.released && return nothing
        map_zeros_over(mapped.address, mapped.bytes)
        give_up!(c, mapped)
    end
    return nothing
end

"Ends a segment's lease and closes its descriptor: its pages are not mapped any more."
function give_up!(c::Connection, mapped::Mapped)
    mapped.released && return nothing
    mapped.released = true
    c.mapped_bytes -= mapped.bytes
    end_lease!(c, mapped.lease)
    mapped.fd < 0 || close_fd(mapped.fd)
    mapped.fd = Cint(-1)
    return nothing
end

"Unmaps the segments whose arrays are all dead, and releases what is to be released."
function reap!(c::Connection)
    # In a forked child nothing is mapped there, or something else of its own by now.
    getpid_now() == c.owner || return nothing
    deaths = c.deaths[]
    leases = locked(c) do
        if deaths != c.reaped
            c.reaped = deaths
            for mapped in [mapped for mapped in c.mapped if mapped.deaths[] >= mapped.arrays]
                for place in mapped.mapping.places
                    delete!(c.tensors, UInt(mapped.address) + UInt(place.offset))
                end
                delete!(c.mapped, mapped)
                unmap(mapped.address, mapped.bytes)
                give_up!(c, mapped)
            end
        end
        taken = c.outdated
        c.outdated = UInt64[]
        return c.ending === nothing ? taken : UInt64[]
    end
    for part in Iterators.partition(leases, LEASES_MAX)
        tell(c, RELEASE, (leases = collect(part),))
    end
    return nothing
end

"""
Looks for dead arrays once much is mapped: the garbage collector counts an array over mapped pages as a few bytes, so a
loop of large results would otherwise never make it run.
"""
function relieve!(c::Connection)
    c.mapped_bytes < c.collect_at && return nothing
    for full in (false, true)
        GC.gc(full)
        reap!(c)
        c.mapped_bytes < c.collect_at && break
    end
    c.collect_at = max(COLLECT_BYTES_MIN, 2 * c.mapped_bytes)
    return nothing
end

# ---- the reaper: one task for all connections

mutable struct Reaper
    lock::ReentrantLock
    connections::Set{Connection}
    condition::Union{Nothing,Base.AsyncCondition}
end
const REAPER = Reaper(ReentrantLock(), Set{Connection}(), nothing)

"Wakes the reaper; allowed in a finalizer."
function signal_reaper()
    condition = REAPER.condition
    # The handle is null once the process is ending.
    condition === nothing || condition.handle == C_NULL || ccall(:uv_async_send, Cint, (Ptr{Cvoid},), condition.handle)
    return nothing
end

function enlist(c::Connection)
    lock(REAPER.lock) do
        push!(REAPER.connections, c)
        # Not when the module is loaded: a process that never connects keeps no handle open.
        if REAPER.condition === nothing
            condition = REAPER.condition = Base.AsyncCondition()
            in_background(() -> reap_for_ever(condition))
        end
    end
    return nothing
end

function reap_for_ever(condition::Base.AsyncCondition)
    while true
        try
            undisturbed(() -> wait(condition))
        catch e
            # The process is ending.
            e isa EOFError || rethrow()
            return nothing
        end
        undisturbed(reap_all)
    end
end

function reap_all()
    for c in lock(() -> collect(REAPER.connections), REAPER.lock)
        try
            quietly(() -> reap!(c))
            quietly(() -> drain!(c))
            over = locked(() -> isempty(c.mapped), c)
            over && c.abandoned[] && finish!(c, Disconnected("the session was garbage"))
            over && c.ending !== nothing && lock(() -> delete!(REAPER.connections, c), REAPER.lock)
        catch e
            e isa InterruptException && rethrow()
            # One connection's trouble must not keep the others' pages mapped.
            @error "strait: a session's mappings could not be tidied up" exception = (e, catch_backtrace())
        end
    end
    return nothing
end
