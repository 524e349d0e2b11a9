# The socket of a kernel that is prepared (prepared.jl): one CALL at a time, and the reply to it; or one chunk of a stream
# (stream.jl), and the replies to it.
#
# A task that waits for a reply waits as it does for any of a session's: other tasks of its thread go on. To look for the reply for a
# while before that is no quicker on busy processors, where the host then gets its turn that much later.

"Bytes of a tensor's sizes in the payload of a CALL, and of the OK to it."
const SIZES_BYTES = 64

mutable struct CallSocket
    number::UInt64                     # by which the host knows what is prepared
    fd::Cint                           # -1 once closed
    watcher::FDWatcher
    lock::ReentrantLock                # held for the length of a call, and to close the descriptor
    closing::ReentrantLock             # held for a moment by who closes the descriptor, or shuts it down
    ending::Union{Nothing,StraitError}
    sequence::UInt32                   # of the last call
    owed::Bool                         # its reply was not received yet
    cancelled::Threads.Atomic{Bool}    # the host was sent a CANCEL that it may not have read yet
    abandoned::Threads.Atomic{Bool}    # nobody has what was prepared any more
    head::Vector{UInt8}                # of each request: header and sizes
    parts::Vector{IOVec}
    received::Vector{UInt8}
    control::Vector{UInt8}
end

function CallSocket(number::UInt64, fd::Cint, inputs::Int, request_bytes::Int, reply_bytes::Int)
    head = zeros(UInt8, HEADER_BYTES + inputs * SIZES_BYTES)
    header = Header(MAGIC, PROTOCOL_VERSION, UInt8(CALL), 0, 0, request_bytes, NO_TRACE, (0x00, 0x00, 0x00), 0)
    GC.@preserve head unsafe_store!(Ptr{Header}(pointer(head)), header)
    # An OK with what the kernel has to say, or an ERROR.
    received = Vector{UInt8}(undef, HEADER_BYTES + BODY_BYTES_MAX + reply_bytes)
    return CallSocket(number, fd, FDWatcher(RawFD(fd), true, false), ReentrantLock(), ReentrantLock(), nothing, 0, false,
        Threads.Atomic{Bool}(false), Threads.Atomic{Bool}(false), head, IOVec[], received, Vector{UInt8}(undef, CMSG_HEADER + 4 * FDS_MAX))
end

"Sends what `head` and the parts behind it are. Called, as what follows, with the lock held; the caller keeps the parts alive."
function send_call!(socket::CallSocket, op::Op = CALL)
    socket.head[4] = UInt8(op)
    socket.sequence = socket.sequence == typemax(UInt32) ? UInt32(1) : socket.sequence + UInt32(1)
    GC.@preserve socket unsafe_store!(Ptr{UInt32}(pointer(socket.head) + 4), socket.sequence)
    while true
        # Not to be interrupted: what was sent is answered.
        errno = disable_sigint() do
            errno = send_parts(socket.fd, socket.parts)
            errno == 0 && (socket.owed = true)
            errno
        end
        errno == 0 && return nothing
        errno == Libc.EAGAIN || finish!(socket, Disconnected("a call could not be sent: $(Libc.strerror(errno)); prepare it anew"))
        check_open(socket)
        wait_until_ready(() -> wait(RawFD(socket.fd); writable = true))
    end
end

"""
The bytes of the reply that is owed, in `received`. Other than to an ERROR or OK to the last call, it is thrown what is wrong,
and the socket is over: no call gets the reply to another one.
"""
function receive_call!(socket::CallSocket)
    while true
        check_open(socket)
        count, fds, flags = disable_sigint() do
            found = receive_packet!(socket.received, socket.control, socket.fd)
            found[1] > 0 && (socket.owed = false)
            found
        end
        if count == -Libc.EAGAIN
            wait_until_ready(() -> wait(socket.watcher))
        elseif count <= 0
            finish!(socket, Disconnected("what was prepared is over: $(count == 0 ? "the host ended it" : Libc.strerror(-count)); prepare it anew"))
        else
            foreach(close_fd, fds)
            isempty(fds) && flags & (MSG_TRUNC | MSG_CTRUNC) == 0 || break_off!(socket, "it is longer than was said, or brings descriptors")
            return count
        end
    end
end

"Op, one of `ops`, and body's bytes of what was received."
function reply_header(socket::CallSocket, count::Int, ops = (OK, ERROR))
    op, sequence, bytes = trusted(() -> decode_header(socket.received, count), socket)
    sequence == socket.sequence || break_off!(socket, "sequence $sequence where $(socket.sequence) was asked")
    op in ops || break_off!(socket, "it is $op")
    return op, bytes
end

"What `read` makes of a reply; after one that cannot be read the socket is over."
function trusted(read, socket::CallSocket)
    try
        return read()
    catch e
        e isa StraitError && finish!(socket, e)
        rethrow()
    end
end

function break_off!(socket::CallSocket, what::String)
    finish!(socket, ProtocolError("the reply to $(Op(socket.head[4])): $what"))
    throw(socket.ending)
end

check_open(socket::CallSocket) = socket.ending === nothing || throw(socket.ending)

"Ends what is prepared, and a call that waits. The first end stands."
function finish!(socket::CallSocket, ending::StraitError)
    socket.ending === nothing || return nothing
    socket.ending = ending
    # Wakes who waits.
    lock(() -> socket.fd < 0 || ccall(:shutdown, Cint, (Cint, Cint), socket.fd, SHUT_RDWR), socket.closing)
    close_if_ended!(socket)
    return nothing
end

"Closes the descriptor unless a call has it, which does so itself when it is over."
function close_if_ended!(socket::CallSocket)
    socket.ending !== nothing && trylock(socket.lock) || return nothing
    try
        socket.fd < 0 && return nothing
        close(socket.watcher)
        lock(() -> (close_fd(socket.fd); socket.fd = Cint(-1)), socket.closing)
    finally
        unlock(socket.lock)
    end
    return nothing
end
