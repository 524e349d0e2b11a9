# A scripted host at the other end of a socket pair, and small things that tests need.

using Strait: Op, OK, ERROR, HELLO, WELCOME, CREATE, MAP, RELEASE, RENEW, INVOKE, CANCEL, PING, PUBLISH, KERNELS, GONE, LOOKUP, STATS

struct Peer
    fd::Cint
    buffer::Vector{UInt8}
    control::Vector{UInt8}
end
Peer(fd::Cint) = Peer(fd, zeros(UInt8, 1 << 18), zeros(UInt8, 80))

"A session, and the peer that answers it as `script(peer)` says, after the greeting. Its host takes tensors in frames up to `inline_bytes`."
function with_peer(test, script; inline_bytes = 0, options...)
    ends = zeros(Cint, 2)
    kind = Strait.SOCK_SEQPACKET | Strait.SOCK_NONBLOCK | Strait.SOCK_CLOEXEC
    systemerror("socketpair", ccall(:socketpair, Cint, (Cint, Cint, Cint, Ptr{Cint}), Strait.AF_UNIX, kind, 0, ends) != 0)
    peer = Peer(ends[2])
    host = @async begin
        try
            greet(peer, inline_bytes)
            script(peer)
        finally
            # A script that failed leaves nobody waiting.
            hang_up(peer)
        end
    end
    session = Strait.begin_session(ends[1], "/nowhere"; options...)
    try
        test(session, peer)
    catch
        # What went wrong in the script is the cause.
        istaskfailed(host) ? fetch(host) : rethrow()
    finally
        close(session)
        hang_up(peer)
    end
    fetch(host)
end

function greet(peer::Peer, inline_bytes = 0)
    op, sequence, body, _ = receive(peer)
    @test op == HELLO && body["protocol"] == Strait.PROTOCOL_VERSION && startswith(body["client"], "strait-julia/")
    answer(peer, WELCOME, sequence, (protocol = Strait.PROTOCOL_VERSION, host_id = "h", move_min_bytes = 524288, inline_bytes = inline_bytes, request_id = "r"))
end

"The next frame with its payload and descriptors, or nothing once the session closed."
function receive(peer::Peer)
    while true
        count, fds, _ = Strait.receive_packet!(peer.buffer, peer.control, peer.fd)
        count in (0, -Int(Libc.ECONNRESET)) && return nothing
        count > 0 && return (Strait.decode_frame(peer.buffer, count)..., fds)
        count == -Int(Libc.EAGAIN) || error(Libc.strerror(-count))
        Strait.wait_until_ready(() -> wait(RawFD(peer.fd); readable = true))
    end
end

function answer(peer::Peer, op::Op, sequence, body, fds::Vector{Cint} = Cint[], payload::Vector{UInt8} = UInt8[])
    packet = Strait.encode_frame(op, UInt32(sequence), body; payload = payload)
    # The session may have gone meanwhile.
    @test Strait.send_packet(peer.fd, packet, fds) in (0, Libc.EPIPE)
    foreach(Strait.close_fd, fds)
end
hang_up(peer::Peer) = ccall(:shutdown, Cint, (Cint, Cint), peer.fd, Strait.SHUT_RDWR)

const SEALS = Dict("anyone" => 2 | 4, "host" => 2 | 4 | 16, "none" => 2 | 4 | 8, "creator" => 2 | 4 | 16)

"A memfd of `bytes` with `values` from `offset` on, sealed, and a mapping that says what is in it."
function segment(bytes, tensors; writers = "host", seals = SEALS[writers], id = "0"^32, values = UInt8[], offset = 65536)
    fd = ccall(:memfd_create, Cint, (Cstring, Cuint), "test", 3)   # CLOEXEC, ALLOW_SEALING
    systemerror("memfd_create", fd < 0)
    systemerror("ftruncate", ccall(:ftruncate, Cint, (Cint, Int64), fd, bytes) != 0)
    isempty(values) || fill_fd(fd, offset, values)
    systemerror("F_ADD_SEALS", ccall(:fcntl, Cint, (Cint, Cint, Cint...), fd, 1033, seals) != 0)
    mapping = Dict("strait-mmap" => 1, "host_id" => "h", "socket" => "s", "segment" => id, "generation" => 1,
        "bytes" => bytes, "writers" => writers, "tensors" => tensors)
    return fd, mapping
end
tensor(name, dtype, shape, offset, length) =
    Dict("name" => name, "dtype" => dtype, "shape" => shape, "offset" => offset, "length" => length)

function fill_fd(fd, offset, values::Array)
    GC.@preserve values systemerror("pwrite", ccall(:pwrite, Cssize_t, (Cint, Ptr{Cvoid}, Csize_t, Int64),
        fd, pointer(values), sizeof(values), offset) != sizeof(values))
    return fd
end

open_fds() = length(readdir("/proc/self/fd"))
is_mapped(address) = any(eachline("/proc/self/maps")) do line
    low, high = (parse(UInt, word; base = 16) for word in split(split(line)[1], '-'))
    low <= UInt(address) < high
end

"Collects garbage until `done()`, which finalizers and the reaper bring about."
function collect_until(done; rounds = 50)
    for _ in 1:rounds
        GC.gc()
        sleep(0.01)
        done() && return true
    end
    return false
end

"""
Runs `f` in a frame of its own, so that no slot of the caller's keeps an array alive. What outlives it goes into a
`Ref{Any}`, emptied by `drop!`.
"""
@noinline apart(f) = (Base.invokelatest(f); nothing)
drop!(box::Ref{Any}) = (box[] = nothing; nothing)

"The exception that `f` throws, which must be a `T`."
function thrown(f, ::Type{T}) where {T}
    try
        f()
    catch e
        e isa T || rethrow()
        return e
    end
    error("nothing was thrown; expected $T")
end
says(e, words...) = (text = sprint(showerror, e); all(word -> occursin(word, text), words) || error(text))

"Whether `done()` within ten seconds."
function soon(done)
    began = time()
    while time() - began < 10
        done() && return true
        sleep(0.02)
    end
    return false
end

"The descriptors that are open once nothing is left of what the tests before have forgotten."
function settled_fds()
    before = -1
    while true
        GC.gc()
        sleep(0.1)
        now = open_fds()
        now == before && return now
        before = now
    end
end
