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
    payload::Vector{UInt8}
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
    payload_room::Int                  # bytes of small tensors that one request can carry
    watcher::FDWatcher
    changed::Threads.Condition         # its lock guards everything below but the atomics
    sequence::UInt32
    waiting::Dict{UInt32,Pending}
    leading::Bool
    users::Int                         # tasks that wait for the descriptor: it is closed after them
    ending::Union{Nothing,StraitError}
    leases::Leases
    timer::Union{Nothing,Timer}
    timer_at::Float64
    mapped::Set{Mapped}
    tensors::Dict{UInt,Tuple{Mapped,Int}}   # by the address of an array's first element
    call_sockets::Set{CallSocket}      # of kernels that are prepared: they end with the connection
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
    epitaph::Any                       # called once it is over: what is known of the host's own end, as text
end

"Mapped bytes from which on garbage is looked for: the collector itself does not see them."
const COLLECT_BYTES_MIN = 1 << 30

now() = time_ns() / 1e9

function Connection(fd::Cint; renew::Bool = true)
    return Connection(getpid_now(), fd, payload_room(send_buffer_bytes(fd)), FDWatcher(RawFD(fd), true, false), Threads.Condition(), 0, Dict(), false, 0,
        nothing, Leases(renew), nothing, Inf, Set{Mapped}(), Dict(), Set{CallSocket}(), 0, COLLECT_BYTES_MIN, Inf,
        Threads.Atomic{Int}(0), 0, Threads.Atomic{Bool}(false), Threads.Atomic{Int}(0), Threads.Atomic{Int}(0), Threads.Atomic{Int}(0),
        Vector{UInt8}(undef, HEADER_BYTES + BODY_BYTES_MAX + PAYLOAD_BYTES_MAX), zeros(UInt8, CMSG_HEADER + 4 * FDS_MAX), () -> "")
end

locked(f, c::Connection) = lock(f, c.changed)

check_owner(c::Connection) = (here = getpid_now(); here == c.owner || throw(Forked(c.owner, here)))

# ---- requests

"Sends a request and waits for its reply, whose descriptors the caller owns. Throws what an ERROR says."
function request(c::Connection, op::Op, body; payload::Vector{UInt8} = UInt8[], begun = nothing)
    check_owner(c)
    sequence, pending = expect!(c, op)
    try
        transmit(c, encode_frame(op, sequence, body; payload = payload))
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
    op = locked(c) do
        pending = get(c.waiting, sequence, nothing)
        pending === nothing && return nothing
        if pending.reply !== nothing || c.ending !== nothing
            delete!(c.waiting, sequence)
            pending.reply === nothing || discard!(c, pending.reply)
            return nothing
        end
        pending.wanted = false
        return pending.op
    end
    if op in (INVOKE, PREPARE, STREAM)
        op == STREAM || quietly(() -> tell(c, CANCEL, (sequence = sequence,)))
        # Its answer is waited for all the same: results that were under way hold memory in the host, and nobody else reads the channel.
        in_background(() -> quietly(() -> undisturbed(() -> await(() -> !haskey(c.waiting, sequence), c))))
    end
    signal_reaper()
    return nothing
end

"What nobody waits for: its descriptors are closed, its leases released."
function discard!(c::Connection, reply::Reply)
    foreach(close_fd, reply.fds)
    reply.op == OK && foreach(((lease, _),) -> end!(c.leases, lease), granted(reply.body))
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
            finish!(c, Disconnected("the host closed the connection ($(Libc.strerror(errno))); connect again$(c.epitaph())"))
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
        broken && finish!(c, Disconnected("the connection is over: the host ended; connect again$(c.epitaph())"))
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
            return finish!(c, Disconnected("the connection is over: $why; connect again$(c.epitaph())"))
        end
        try
            flags & (MSG_TRUNC | MSG_CTRUNC) == 0 || throw(ProtocolError(
                "a frame of more than $(length(c.buffer)) bytes, or with more than $FDS_MAX descriptors or more than this process may open"))
            op, sequence, body, payload = decode_frame(c.buffer, count)
            locked(() -> dispatch!(c, Reply(op, body, payload, fds), sequence), c)
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
        lease = UInt64(size_field(reply.body, "lease"))
        gone!(c.leases, lease, "lease $lease is over: $(field(reply.body, "reason", String, "no reason given"))")
    elseif reply.op == SHUTDOWN
        c.draining_until = now() + size_field(reply.body, "drain_ms") / 1000
    elseif reply.op == ERROR && sequence == 0
        throw(ProtocolError("it refused a frame: $(field(reply.body, "message", String, "no message"))"))
    elseif reply.op in (OK, WELCOME, ERROR)
        # Known here already, since their GONE may come before anybody looked at the reply.
        for (lease, life) in (reply.op == OK ? granted(reply.body) : Pair{UInt64,Int}[])
            plan!(c, hold!(c.leases, lease, life / 1000, now()))
        end
        pending = get(c.waiting, sequence, nothing)
        isempty(reply.payload) || pending === nothing || pending.op == INVOKE ||
            throw(ProtocolError("$(length(reply.payload)) bytes of payload in the reply to $(pending.op)"))
        if pending !== nothing && pending.wanted && pending.reply === nothing
            pending.reply = reply
        else
            pending === nothing || pending.wanted || delete!(c.waiting, sequence)
            discard!(c, reply)
            isempty(c.leases.ended) || signal_reaper()
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
            foreach(socket -> finish!(socket, ending), c.call_sockets)
            empty!(c.call_sockets)
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

function check_lease(c::Connection, id::UInt64)
    why = locked(() -> why_gone(c.leases, id), c)
    why === nothing || throw(LeaseExpired(why, "-"))
    return nothing
end

"Renews, together, the leases that are due or nearly so."
function renew_due!(c::Connection)
    getpid_now() == c.owner || return nothing
    due = locked(c) do
        c.timer_at = Inf
        found, next = due!(c.leases, now())
        plan!(c, next)
        return found
    end
    for (life, leases) in due
        undisturbed(() -> renew!(c, leases, round(Int, life * 1000)))
    end
    return nothing
end

function renew!(c::Connection, leases::Vector{UInt64}, life_ms::Int)
    try
        renewed!(c, leases, ask(c, RENEW, (leases = leases, lease_ms = life_ms)))
    catch e
        e isa LeaseExpired || rethrow()
        if length(leases) == 1
            locked(() -> gone!(c.leases, leases[1], e.message), c)
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
    locked(() -> plan!(c, renewed!(c.leases, leases, life / 1000, now())), c)
    return life
end
