# The system calls: a SEQPACKET socket with descriptors beside its packets, and mappings.

const AF_UNIX = Cint(1)
const SOCK_SEQPACKET = Cint(5)
const SOCK_NONBLOCK = Cint(0o4000)
const SOCK_CLOEXEC = Cint(0o2000000)
const SOL_SOCKET = Cint(1)
const SO_TYPE = Cint(3)
const SO_SNDBUF = Cint(7)
const SCM_RIGHTS = Cint(1)
const SHUT_RDWR = Cint(2)
const MSG_CTRUNC = Cint(0x8)
const MSG_TRUNC = Cint(0x20)
const MSG_DONTWAIT = Cint(0x40)
const MSG_NOSIGNAL = Cint(0x4000)
const MSG_CMSG_CLOEXEC = Cint(0x40000000)
const PROT_READ = Cint(1)
const PROT_WRITE = Cint(2)
const MAP_SHARED = Cint(1)
const MAP_PRIVATE = Cint(2)
const MAP_FIXED = Cint(0x10)
const MAP_ANONYMOUS = Cint(0x20)
const MAP_NORESERVE = Cint(0x4000)
const MAP_FAILED = Ptr{Cvoid}(-1)
const MADV_DONTFORK = Cint(10)
const MADV_COLLAPSE = Cint(25)
const O_CLOEXEC = Cint(0o2000000)
const F_GET_SEALS = Cint(1034)
const F_SEAL_SHRINK = Cint(2)
const F_SEAL_WRITE = Cint(8)
const F_SEAL_FUTURE_WRITE = Cint(16)
const PAGE_BYTES = 4096
const HUGE_BYTES = 2 << 20
"From so many bytes on a tensor begins on a huge page of its segment's file, and a segment is mapped accordingly."
const HUGE_MIN_BYTES = 4 << 20
"Bytes collapsed between two looks at the clock, and what ends it: nanoseconds of one step, and of all for each MiB."
const HUGE_STEP_BYTES = 8 << 20
const HUGE_STEP_NS = 50_000_000
const HUGE_MIB_NS = 2_000_000

"Descriptors beside one frame, at most."
const FDS_MAX = 16
const CMSG_HEADER = 16
"Bytes of `sun_path`, of which one is the closing zero."
const SUN_PATH = 108

struct SockaddrUn
    family::UInt16
    path::NTuple{SUN_PATH,UInt8}
end
struct IOVec
    base::Ptr{UInt8}
    len::Csize_t
end
struct MsgHdr
    name::Ptr{Cvoid}
    namelen::UInt32
    iov::Ptr{IOVec}
    iovlen::Csize_t
    control::Ptr{UInt8}
    controllen::Csize_t
    flags::Cint
end
struct CmsgHdr
    len::Csize_t
    level::Cint
    type::Cint
end

getpid_now() = ccall(:getpid, Cint, ())
close_fd(fd::Cint) = ccall(:close, Cint, (Cint,), fd)

"A connected, non-blocking socket, or the errno why not."
function connect_seqpacket(path::String)
    bytes = codeunits(path)
    length(bytes) < SUN_PATH || throw(ArgumentError(
        "the socket's path has $(length(bytes)) bytes, a unix socket takes $(SUN_PATH - 1): use a shorter directory; it is $path"))
    fd = ccall(:socket, Cint, (Cint, Cint, Cint), AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
    systemerror("socket", fd < 0)
    address = Ref(SockaddrUn(AF_UNIX, ntuple(i -> i <= length(bytes) ? bytes[i] : 0x00, SUN_PATH)))
    for _ in 1:500
        ccall(:connect, Cint, (Cint, Ref{SockaddrUn}, UInt32), fd, address, sizeof(SockaddrUn)) == 0 && return (fd, 0)
        errno = Libc.errno()
        if errno != Libc.EAGAIN && errno != Libc.EINTR
            close_fd(fd)
            return (Cint(-1), errno)
        end
        # The host's queue of new connections is full.
        sleep(0.01)
    end
    close_fd(fd)
    return (Cint(-1), Libc.EAGAIN)
end

"A socket's send buffer; 0 if Linux does not say."
send_buffer_bytes(fd::Cint) = socket_option(fd, SO_SNDBUF)
"Whether a descriptor is a socket of whole packets."
is_seqpacket(fd::Cint) = socket_option(fd, SO_TYPE) == SOCK_SEQPACKET

function socket_option(fd::Cint, option::Cint)
    value, size = Ref{Cint}(0), Ref{UInt32}(sizeof(Cint))
    ccall(:getsockopt, Cint, (Cint, Cint, Cint, Ref{Cint}, Ref{UInt32}), fd, SOL_SOCKET, option, value, size)
    return Int(value[])
end

"Sends one packet with descriptors beside it: 0, or the errno."
function send_packet(fd::Cint, packet::Vector{UInt8}, fds::Vector{Cint} = Cint[])
    control = zeros(UInt8, isempty(fds) ? 0 : CMSG_HEADER + 8 * cld(4 * length(fds), 8))
    GC.@preserve packet control begin
        if !isempty(fds)
            unsafe_store!(Ptr{CmsgHdr}(pointer(control)), CmsgHdr(CMSG_HEADER + 4 * length(fds), SOL_SOCKET, SCM_RIGHTS))
            for (index, given) in enumerate(fds)
                unsafe_store!(Ptr{Cint}(pointer(control) + CMSG_HEADER), given, index)
            end
        end
        iov = Ref(IOVec(pointer(packet), length(packet)))
        GC.@preserve iov begin
            message = Ref(MsgHdr(C_NULL, 0, Base.unsafe_convert(Ptr{IOVec}, iov), 1,
                isempty(fds) ? Ptr{UInt8}(C_NULL) : pointer(control), length(control), 0))
            send_message(fd, message)
        end
    end
end

"Sends one packet of parts that lie apart: 0, or the errno. The caller keeps them alive."
send_parts(fd::Cint, parts::Vector{IOVec}) = GC.@preserve parts send_message(fd,
    Ref(MsgHdr(C_NULL, 0, pointer(parts), length(parts), Ptr{UInt8}(C_NULL), 0, 0)))

function send_message(fd::Cint, message::Ref{MsgHdr})
    while true
        sent = ccall(:sendmsg, Cssize_t, (Cint, Ref{MsgHdr}, Cint), fd, message, MSG_DONTWAIT | MSG_NOSIGNAL)
        sent >= 0 && return 0
        errno = Libc.errno()
        errno == Libc.EINTR || return errno
    end
end

"""
Takes one packet into `buffer`: its length (0 at the end) with its descriptors and the flags, or minus the errno.
`control` is the caller's too, so that receiving allocates little.
"""
function receive_packet!(buffer::Vector{UInt8}, control::Vector{UInt8}, fd::Cint)
    GC.@preserve buffer control begin
        iov = Ref(IOVec(pointer(buffer), length(buffer)))
        GC.@preserve iov begin
            message = Ref(MsgHdr(C_NULL, 0, Base.unsafe_convert(Ptr{IOVec}, iov), 1, pointer(control), length(control), 0))
            while true
                count = ccall(:recvmsg, Cssize_t, (Cint, Ref{MsgHdr}, Cint), fd, message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC)
                count >= 0 && return (Int(count), fds_in(control, Int(message[].controllen)), message[].flags)
                errno = Libc.errno()
                errno == Libc.EINTR || return (-Int(errno), NO_FDS, Cint(0))
            end
        end
    end
end

"Never filled."
const NO_FDS = Cint[]

function fds_in(control::Vector{UInt8}, filled::Int)
    filled == 0 && return NO_FDS
    fds = Cint[]
    at = 0
    GC.@preserve control while at + CMSG_HEADER <= filled
        header = unsafe_load(Ptr{CmsgHdr}(pointer(control) + at))
        CMSG_HEADER <= header.len <= filled - at || break
        if header.level == SOL_SOCKET && header.type == SCM_RIGHTS
            for index in 1:(Int(header.len)-CMSG_HEADER)÷4
                push!(fds, unsafe_load(Ptr{Cint}(pointer(control) + at + CMSG_HEADER), index))
            end
        end
        at += 8 * cld(Int(header.len), 8)
    end
    return fds
end

"The seals of a memfd; -1 for whatever else a descriptor may be."
file_seals(fd::Cint) = ccall(:fcntl, Cint, (Cint, Cint, Cint...), fd, F_GET_SEALS)

mmap(address, bytes, protection, flags, fd, offset = 0) = ccall(:mmap, Ptr{Cvoid},
    (Ptr{Cvoid}, Csize_t, Cint, Cint, Cint, Int64), address, bytes, protection, flags, fd, offset)

"Keeps a forked child from seeing pages that the host may give to somebody else while the child lives."
keep_from_children(address, bytes) =
    systemerror("madvise", ccall(:madvise, Cint, (Ptr{Cvoid}, Csize_t, Cint), address, bytes, MADV_DONTFORK) != 0)

"Maps `bytes` of `fd`, at `address` if that is not null; the mapping there is then replaced in one step."
function map_fd(fd::Cint, bytes::Int, writable::Bool, address::Ptr{Cvoid} = C_NULL)
    # Reading beyond the end of a file is a SIGBUS.
    size = filesize(stat(RawFD(fd)))
    size >= bytes || throw(MappingError("the segment's file has $size bytes, its mapping $bytes; the host should be asked what is wrong"))
    fixed = address == C_NULL ? Cint(0) : MAP_FIXED
    protection = writable ? PROT_READ | PROT_WRITE : PROT_READ
    map = address == C_NULL && bytes >= HUGE_MIN_BYTES ? mmap_at_huge_page : mmap
    found = map(address, bytes, protection, MAP_SHARED | fixed, fd)
    # Some versions of Linux refuse to share what is sealed against writing.
    if found == MAP_FAILED && !writable
        found = map(address, bytes, protection, MAP_PRIVATE | fixed, fd)
    end
    found == MAP_FAILED && throw(MappingError(
        "cannot map $bytes bytes: $(Libc.strerror()); /proc/sys/vm/max_map_count and the address space limit what a process may map"))
    keep_from_children(found, bytes)
    return found
end

"`mmap` at an address that is a multiple of huge pages: where file and addresses have one phase Linux can map huge pages."
function mmap_at_huge_page(address::Ptr{Cvoid}, bytes::Int, protection, flags, fd)
    pages = (bytes + PAGE_BYTES - 1) & -PAGE_BYTES
    reserved = mmap(C_NULL, pages + HUGE_BYTES, Cint(0), MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, Cint(-1))
    # Too little room for both is no reason to fail.
    reserved == MAP_FAILED && return mmap(address, bytes, protection, flags, fd)
    start = round_up(reserved, HUGE_BYTES)
    found = mmap(start, bytes, protection, flags | MAP_FIXED, fd)
    errno = Libc.errno()
    if found == MAP_FAILED
        unmap(reserved, pages + HUGE_BYTES)
    else
        before = Int(start - reserved)
        before == 0 || unmap(reserved, before)
        unmap(start + pages, HUGE_BYTES - before)
    end
    Libc.errno(errno)
    return found
end

round_up(address::Ptr{Cvoid}, of::Int) = Ptr{Cvoid}((UInt(address) + UInt(of - 1)) & ~UInt(of - 1))

"""
Backs the huge pages that lie wholly in `bytes` from `address` on with memory, and answers how many bytes that are. To be
called before anybody wrote there: a nearly empty range costs a tenth of what filling it in small pages would, a full one
would be copied. Where Linux refuses, or is slow since it has none at hand, the rest stays in small pages.
"""
function back_with_huge_pages!(address::Ptr{Cvoid}, bytes::Int)
    start = round_up(address, HUGE_BYTES)
    whole = Int(address + bytes - min(start, address + bytes)) & -HUGE_BYTES
    done = 0
    began = time_ns()
    while done < whole
        step = min(HUGE_STEP_BYTES, whole - done)
        before = time_ns()
        # Linux collapses no range without any page.
        foreach(at -> unsafe_store!(Ptr{UInt8}(start + done + at), 0x00), 0:HUGE_BYTES:step-1)
        ccall(:madvise, Cint, (Ptr{Cvoid}, Csize_t, Cint), start + done, step, MADV_COLLAPSE) == 0 || break
        done += step
        after = time_ns()
        after - before > HUGE_STEP_NS || after - began > (done >> 20) * HUGE_MIB_NS && break
        # Other threads may be waiting for this one, to collect garbage.
        GC.safepoint()
    end
    return done
end

"""
Replaces a writable mapping by a read-only one of the same pages, in one step. A descriptor of its own: in older
versions of Linux a shared mapping from one that can write counts as writable, and would hinder sealing.
"""
function map_readonly_over(address::Ptr{Cvoid}, bytes::Int, fd::Cint)
    reading = ccall(:open, Cint, (Cstring, Cint), "/proc/self/fd/$fd", O_CLOEXEC)
    systemerror("open a segment read-only", reading < 0)
    try
        map_fd(reading, bytes, false, address)
    finally
        close_fd(reading)
    end
    return nothing
end

"""
Replaces a part of a mapping at `address`, from a page's beginning on, by a private one that `change` may write to: what
it writes stays in this process. Read-only again afterwards.
"""
function map_private_over(change, address::Ptr{Cvoid}, offset::Int, bytes::Int, fd::Cint)
    start = address + offset
    found = mmap(start, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, fd, offset)
    found == MAP_FAILED && throw(MappingError("cannot map $bytes bytes for this process alone: $(Libc.strerror())"))
    keep_from_children(start, bytes)
    change()
    systemerror("mprotect", ccall(:mprotect, Cint, (Ptr{Cvoid}, Csize_t, Cint), start, bytes, PROT_READ) != 0)
    return nothing
end

"Puts zeros over a mapping, so that its pages are given up while its addresses stay valid."
function map_zeros_over(address::Ptr{Cvoid}, bytes::Int)
    found = mmap(address, bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, Cint(-1))
    systemerror("mmap", found == MAP_FAILED)
    return nothing
end

unmap(address::Ptr{Cvoid}, bytes::Int) =
    systemerror("munmap", ccall(:munmap, Cint, (Ptr{Cvoid}, Csize_t), address, bytes) != 0)
