# A host that breaks the protocol: each answer is an error by name, and leaves no descriptor, lease or mapping behind.

"A pipe's end, which is no memory at all."
function no_memory()
    ends = zeros(Cint, 2)
    systemerror("pipe", ccall(:pipe, Cint, (Ptr{Cint},), ends) != 0)
    Strait.close_fd(ends[2])
    return ends[1]
end
x48(; more...) = segment(2PAGE, [tensor("x", "float64", [3, 2], PAGE, 48)]; more...)
"A good mapping with other words in it."
function but(; more...)
    fd, mapping = x48()
    for (key, value) in pairs(more)
        mapping[replace(String(key), '_' => '-')] = value
    end
    return fd, mapping
end
holding(tensors...; more...) = segment(2PAGE, collect(tensors); more...)
mapped((fd, mapping); lease = 3) = (OK, leased(lease, mapping), Cint[fd])

# ---- one mapping

mappings = (
    "no tensors' list" => () -> but(tensors = 1), "a tensor that is a list" => () -> holding([]), "no segment" => () -> but(segment = nothing), "a version as text" => () -> but(strait_mmap = "1"),
    "version true" => () -> but(strait_mmap = true), "negative bytes" => () -> but(bytes = -1), "bytes true" => () -> but(bytes = true), "bytes beyond all" => () -> but(bytes = typemax(UInt64)),
    "bytes beyond the file" => () -> but(bytes = 4PAGE), "fewer bytes than the tensor" => () -> but(bytes = PAGE), "nearly 2^63 bytes" => () -> but(bytes = typemax(Int)), "a fraction" => () -> but(bytes = 131072.5),
    "behind the end" => () -> holding(tensor("x", "int8", [1], 2PAGE, 1)), "across the end" => () -> holding(tensor("x", "int8", [64], 2PAGE - 1, 64)), "before the beginning" => () -> holding(tensor("x", "int8", [1], -64, 1)),
    "offset that overflows" => () -> holding(tensor("x", "int8", [64], typemax(Int) - 63, 64)), "a crooked offset" => () -> holding(tensor("x", "float64", [1], PAGE + 4, 8)), "length of others" => () -> holding(tensor("x", "float64", [2], PAGE, 8)),
    "negative size" => () -> holding(tensor("x", "int8", [-1], PAGE, 0)), "shape that overflows" => () -> holding(tensor("x", "int8", [2^32, 2^32], PAGE, 0)), "shape that overflows to the right length" => () -> holding(tensor("x", "int8", [2^62, 4, 2], PAGE, 0)),
    "size beyond Int" => () -> holding(tensor("x", "int8", [typemax(UInt64)], PAGE, 0)), "size as text" => () -> holding(tensor("x", "int8", ["1"], PAGE, 1)), "size true" => () -> holding(tensor("x", "int8", [true], PAGE, 1)), "size 1.0" => () -> holding(tensor("x", "int8", [1.0], PAGE, 1)),
    "9 dimensions" => () -> holding(tensor("x", "int8", fill(1, 9), PAGE, 1)), "5000 dimensions" => () -> holding(tensor("x", "int8", fill(1, 5000), PAGE, 1)), "129 tensors" => () -> holding((tensor("x$n", "int8", [1], PAGE, 1) for n in 1:129)...),
    "two of one name" => () -> holding(tensor("x", "int8", [1], PAGE, 1), tensor("x", "int8", [1], PAGE + 64, 1)), "a name with NUL" => () -> holding(tensor("a\0b", "int8", [1], PAGE, 1)), "a name of a number" => () -> holding(tensor(1, "int8", [1], PAGE, 1)),
    "dtype unknown" => () -> holding(tensor("x", "float65", [1], PAGE, 8)), "dtype null" => () -> holding(tensor("x", nothing, [1], PAGE, 8)), "writers unknown" => () -> but(writers = "wax"), "writers null" => () -> but(writers = nothing),
    "others can write" => () -> x48(writers = "anyone"), "it can still write" => () -> x48(writers = "creator"), "said to be sealed" => () -> x48(writers = "none", seals = 2 | 4 | 16), "the host's and unsealed" => () -> x48(seals = 2 | 4),
    "a file that can shrink" => () -> x48(seals = 16), "no seals at all" => () -> x48(seals = 0), "a pipe" => () -> ((fd, mapping) = x48(); Strait.close_fd(fd); (no_memory(), mapping)),
    "a device" => () -> ((fd, mapping) = x48(); Strait.close_fd(fd); (ccall(:open, Cint, (Cstring, Cint), "/dev/zero", 0), mapping)),
    "a folder" => () -> ((fd, mapping) = x48(); Strait.close_fd(fd); (ccall(:open, Cint, (Cstring, Cint), "/", 0), mapping)),
    "a sparse file larger than any address space" => () -> segment(2^56, [tensor("x", "int8", [2^56 - PAGE], PAGE, 2^56 - PAGE)]),
)
replies = Dict{String,Any}(name => () -> mapped(make()) for (name, make) in mappings)
bare() = ((fd, mapping) = x48(); Strait.close_fd(fd); mapping)
merge!(replies, Dict{String,Any}(
    "no mapping" => () -> (OK, done(lease = 3, expires_ms = 5), Cint[x48()[1]]),
    "a mapping that is a text" => () -> (OK, done(lease = 3, expires_ms = 5, mapping = "m"), Cint[x48()[1]]),
    "no descriptor" => () -> (OK, leased(3, bare())),
    "two descriptors" => () -> ((fd, mapping) = x48(); (OK, leased(3, mapping), Cint[fd, x48()[1]])),
    "16 descriptors" => () -> ((fd, mapping) = x48(); (OK, leased(3, mapping), Cint[fd; [x48()[1] for _ in 1:15]])),
    "no lease" => () -> ((fd, mapping) = x48(); (OK, done(mapping = mapping), Cint[fd])),
    "two leases" => () -> ((fd, mapping) = x48(); (OK, (; leased(3, mapping)..., results = [(lease = 4, expires_ms = 5)]), Cint[fd])),
    "an error" => () -> (ERROR, (code = "INTERNAL", reason = "HOST", message = "it broke", request_id = "r"), Cint[x48()[1]]),
    "an error that grants" => () -> (ERROR, (code = "INTERNAL", reason = "HOST", message = "m", request_id = "r", lease = 3, expires_ms = 5), Cint[x48()[1]]),
    "an error without words" => () -> (ERROR, NamedTuple(), Cint[x48()[1]]),
    "an error of numbers" => () -> (ERROR, (code = 1, reason = 2, message = 3)),
    "a welcome" => () -> (WELCOME, done()),
))

log = Tuple{Op,Dict{String,Any}}[]
before = open_fds()
with_peer(serve((op, body) -> op == MAP ? replies[body["name"]]() : (OK, done()), log)) do s, peer
    for name in sort!(collect(keys(replies)))
        held = open_fds()
        e = thrown(() -> fetch(s, name), StraitError)
        @test e isa (name in ("an error", "an error that grants") ? RemoteError : Union{ProtocolError,MappingError})
        @test open_fds() == held
        @test isempty(s.connection.mapped) && isempty(s.connection.leases.held) && isempty(s.connection.tensors) && s.connection.mapped_bytes == 0
        # The session is as usable as before.
        @test Strait.ping(s) === nothing
    end
    @test all(body -> body["leases"] ⊆ [3, 4], bodies(log, RELEASE))
end
@test collect_until(() -> open_fds() <= before + 1)

# ---- results of a call

entry(lease, (fd, mapping) = x48(); port = "y", index = 0, more...) = ((; port = port, mapping = mapping, lease = lease, expires_ms = 600_000, fd = index, more...), fd)
function results(entries...; fds = nothing, more...)
    given = Cint[fd for (_, fd) in entries]
    (OK, done(; results = [e for (e, _) in entries], notes = [], more...), fds === nothing ? given : fds(given))
end
"One result in a payload of two times 64 bytes."
inline(tensor; payload = zeros(UInt8, 128), fds = Cint[], more...) = (OK, done(results = [(; port = "y", inline = tensor, more...)], notes = []), fds, payload)
calls = Dict{String,Any}(
    "no results" => () -> (OK, done(notes = [])),
    "results of texts" => () -> (OK, done(results = ["y"], notes = [])),
    "a result without a port" => () -> results(entry(5; port = nothing)),
    "a port with NUL" => () -> results(entry(5; port = "\0")),
    "no descriptors" => () -> results(entry(5); fds = given -> (foreach(Strait.close_fd, given); Cint[])),
    "a descriptor too many" => () -> results(entry(5); fds = given -> Cint[given; x48()[1]]),
    "one descriptor for two" => () -> results(entry(5), entry(6; port = "z"); fds = given -> (Strait.close_fd(given[2]); given[1:1])),
    "one index for two" => () -> results(entry(5), entry(6; port = "z")),
    "index behind the last" => () -> results(entry(5; index = 1)), "negative index" => () -> results(entry(5; index = -1)), "an index beyond Int" => () -> results(entry(5; index = typemax(UInt64))),
    "the last index" => () -> results(entry(5; index = typemax(Int))), "index true" => () -> results(entry(5; index = true)), "no index" => () -> results(entry(5; index = nothing)),
    "two of one port" => () -> results(entry(5), entry(6; index = 1)),
    "two tensors" => () -> results(entry(5, holding(tensor("a", "int8", [1], PAGE, 1), tensor("b", "int8", [1], PAGE + 64, 1)))),
    "the second of two is bad" => () -> results(entry(5), entry(6, but(bytes = 4PAGE); port = "z", index = 1)),
    "the first of two is bad" => () -> results(entry(5, x48(seals = 0)), entry(6; port = "z", index = 1)),
    "a name of a number" => () -> results(entry(5; name = 7)),
    "notes of numbers" => () -> results(entry(5); notes = [1]), "no text" => () -> results(entry(5); notes = [(key = "k",)]),
    "pages that are negative" => () -> results(entry(5); pages = [(port = "x", device = -1, inode = 1)]), "faults beyond Int" => () -> results(entry(5); minor_faults = typemax(UInt64)),
    "neither segment nor payload" => () -> (OK, done(results = [(port = "y",)], notes = [])),
    "both segment and payload" => () -> results(entry(5; inline = tensor("y", "int8", [1], 0, 1))),
    "a payload's tensor with a lease" => () -> inline(tensor("y", "int8", [1], 0, 1); lease = 5, expires_ms = 600_000), "a text" => () -> inline("y"),
    "behind the payload" => () -> inline(tensor("y", "int8", [1], 128, 1)), "across its end" => () -> inline(tensor("y", "int8", [65], 64, 65)), "before it" => () -> inline(tensor("y", "int8", [1], -64, 1)),
    "an end that overflows" => () -> inline(tensor("y", "int8", [64], typemax(Int) - 63, 64)), "an offset beyond Int" => () -> inline(tensor("y", "int8", [1], typemax(UInt64), 1)), "an offset that is no multiple of 64" => () -> inline(tensor("y", "float64", [1], 8, 8)),
    "more bytes than elements" => () -> inline(tensor("y", "float64", [1], 0, 16)), "fewer bytes than elements" => () -> inline(tensor("y", "float64", [3], 0, 16)), "a payload's shape that overflows" => () -> inline(tensor("y", "int8", [2^62, 4, 2], 0, 0)),
    "sizes that overflow beside a 0" => () -> inline(tensor("y", "int8", [0, 4, 2^62], 0, 0)), "a payload's tensor of 9 dimensions" => () -> inline(tensor("y", "int8", fill(1, 9), 0, 1)), "a payload's unknown dtype" => () -> inline(tensor("y", "float65", [1], 0, 8)),
    "no payload" => () -> inline(tensor("y", "int8", [1], 0, 1); payload = UInt8[]), "a descriptor beside a payload" => () -> inline(tensor("y", "int8", [1], 0, 1); fds = Cint[x48()[1]]),
    "two of a port, one of them in the payload" => () -> ((e, fd) = entry(5); (OK, done(results = [e, (port = "y", inline = tensor("y", "int8", [1], 0, 1))], notes = []), Cint[fd], zeros(UInt8, 1))),
    "the payload's is good, the segment is not" => () -> ((e, fd) = entry(5, but(bytes = 4PAGE); port = "z"); (OK, done(results = [(port = "y", inline = tensor("y", "int8", [1], 0, 1)), e], notes = []), Cint[fd], zeros(UInt8, 1))),
    "the segment is good, the payload's is not" => () -> ((e, fd) = entry(5; port = "z"); (OK, done(results = [e, (port = "y", inline = tensor("y", "int8", [2], 0, 2))], notes = []), Cint[fd], zeros(UInt8, 1))),
    "seconds of a list" => () -> results(entry(5); seconds = [1]),
)
with_peer(serve((op, body) -> op == KERNELS ? (OK, done(kernels = DECLARED, more = false)) : op == INVOKE ? calls[body["inputs"]["x"]]() : (OK, done()), log)) do s, peer
    for name in sort!(collect(keys(calls)))
        held = open_fds()
        @test thrown(() -> call(s, "mix", name), StraitError) isa Union{ProtocolError,MappingError}
        @test collect_until(() -> open_fds() == held && isempty(s.connection.mapped) && isempty(s.connection.leases.held))
        @test Strait.ping(s) === nothing
    end
end

# ---- the rest of what is asked

function broken(ask, op, body, E = ProtocolError)
    with_peer(serve((asked, _) -> asked == op ? (OK, body) : (OK, done()))) do s, peer
        @test thrown(() -> ask(s), StraitError) isa E
        @test Strait.ping(s) === nothing && isempty(s.connection.leases.held)
    end
end
kernel = DECLARED[1]
for wrong in ((; kernel..., name = 1), (; kernel..., plugin = nothing), (; kernel..., inputs = 1), (; kernel..., inputs = [1]), (; kernel..., split_axis = -1), (; kernel..., split_axis = typemax(UInt64)),
    (; kernel..., streaming = 1), (; kernel..., signature = 1), (; kernel..., combine = 1), (; kernel..., block_tree = 1), (; kernel..., block_tree = (block_rows = -1, partials = "a", merge = "b")),
    (; kernel..., inputs = [(; kernel.inputs[1]..., whole = 1)]), (; kernel..., inputs = [(; kernel.inputs[1]..., rank_min = -1)]), (; kernel..., inputs = [(; kernel.inputs[1]..., rank_max = typemax(UInt64))]),
    (; kernel..., inputs = [(; kernel.inputs[1]..., dtypes = [1])]), (; kernel..., parameters = [(; kernel.parameters[1]..., minimum = true)]), (; kernel..., parameters = [(; kernel.parameters[1]..., maximum = "1")]),
    (; kernel..., parameters = [(; kernel.parameters[1]..., choices = [1])]), (; kernel..., parameters = [(; kernel.parameters[1]..., kind = nothing)]))
    broken(kernels, KERNELS, done(kernels = [wrong], more = false))
end
broken(kernels, KERNELS, done(kernels = [], more = true))
broken(kernels, KERNELS, done(kernels = DECLARED, more = true))
broken(kernels, KERNELS, done(kernels = DECLARED, more = "yes"))
broken(flights, Strait.LIST, done(flights = [(name = "a", mapping = "m")], more = false))
broken(flights, Strait.LIST, done(flights = "none", more = false))
broken(s -> zeros(s, 3), CREATE, done())
broken(s -> call(s, "mix", Float64[]), CREATE, done())
broken(s -> publish!(s, "n", Float64[]), CREATE, done(lease = 3, expires_ms = 5))

# Another array than was asked for.
for (dtype, shape, length) in (("float32", [3], 12), ("float64", [4], 32), ("float64", [3, 1], 24), ("float64", [], 8))
    with_peer(serve((op, body) -> op == CREATE ? mapped(holding(tensor("x", dtype, shape, PAGE, length); writers = "anyone")) : (OK, done()))) do s, peer
        says(thrown(() -> zeros(s, 3), ProtocolError), "CREATE")
        @test collect_until(() -> isempty(s.connection.mapped) && isempty(s.connection.leases.held))
    end
end

# Lives of leases that no clock can count.
with_peer(serve((op, body) -> op == MAP ? ((op, found, fds) = mapped(x48()); (op, (; found..., expires_ms = typemax(Int)), fds)) : (OK, done(expires_ms = typemax(Int))))) do s, peer
    y = fetch(s, "x")
    @test Strait.renew!(s, y) == Strait.LIFE_MS_MAX
    s.connection.leases.held[3].due = 0.0
    @test Strait.renew_due!(s.connection) === nothing
    answer(peer, Strait.SHUTDOWN, 0, (drain_ms = typemax(Int),))
    @test Strait.ping(s) === nothing && all(iszero, y)
end
with_peer(serve((op, body) -> (OK, done(lease = 9, expires_ms = 10)))) do s, peer
    # A lease that nobody asked for is given back.
    @test Strait.ping(s) === nothing && isempty(s.connection.leases.held)
end

# ---- frames

raw(text) = (frame = Strait.encode_frame(OK, UInt32(2), NamedTuple())[1:8]; vcat(frame, reinterpret(UInt8, [UInt32(sizeof(text))]), zeros(UInt8, 36), codeunits(text)))
frames = (
    UInt8[], UInt8[0x53], raw("{}")[1:47], raw("["), raw("[]"), raw("\"\""), raw("null"), raw("{\"a\":1e999}"), raw("{\"a\":" * "["^30000), raw("{\"a\":"^10000), raw("{\"a\":\"\\ud800\"}"), raw("{\"a\":\"\xff\"}"),
    raw("{\"a\":1,\"a\":2}"), raw("{\"a\":01}"), raw("{} {}"), raw("{\"a\":\"" * "b"^40000), vcat(raw("{}"), 0x00), raw("{\"lease\":0,\"expires_ms\":1}"), raw("{\"lease\":-1}"), raw("{\"lease\":true,\"expires_ms\":1}"),
    raw("{\"lease\":3}"), raw("{\"lease\":3,\"expires_ms\":-1}"), raw("{\"results\":[{\"lease\":\"3\"}]}"),
    Strait.encode_frame(GONE, UInt32(0), (lease = -1,)), Strait.encode_frame(GONE, UInt32(0), NamedTuple()), Strait.encode_frame(Strait.SHUTDOWN, UInt32(0), (drain_ms = "soon",)), Strait.encode_frame(Strait.CANCEL, UInt32(2), NamedTuple()),
    setindex!(raw("{}"), 0x01, 3), setindex!(raw("{}"), 0xff, 4), setindex!(raw("{}"), 0x01, 13), setindex!(raw("{}"), 0x03, 9), setindex!(raw("{}"), 0x01, 42), setindex!(raw("{}"), 0x01, 45),
)
"The peer's next word is `frame`, with a descriptor beside it."
function say_junk(peer, frame)
    receive(peer)
    fds = isempty(frame) ? Cint[] : Cint[no_memory()]
    Strait.send_packet(peer.fd, frame, fds)
    foreach(Strait.close_fd, fds)
    receive(peer)
end
for frame in frames
    held = open_fds()
    with_peer(peer -> say_junk(peer, frame)) do s, peer
        # An empty packet is how the end of the connection looks.
        @test thrown(() -> Strait.ping(s), StraitError) isa (isempty(frame) ? Disconnected : ProtocolError)
        @test_throws StraitError Strait.ping(s)
        @test !isopen(s) && s.connection.fd == -1
    end
    # The peer's own end is never closed.
    @test open_fds() == held + 1
end
# A payload in the reply to what has none.
with_peer(serve((op, body) -> (OK, done(), Cint[], zeros(UInt8, 8)))) do s, peer
    says(thrown(() -> Strait.ping(s), ProtocolError), "8 bytes of payload", "PING")
    @test !isopen(s)
end
# More descriptors than a frame may have; two more than the room for 16.
with_peer(peer -> (receive(peer); fds = [no_memory() for _ in 1:18]; Strait.send_packet(peer.fd, raw("{}"), fds); foreach(Strait.close_fd, fds); receive(peer))) do s, peer
    says(thrown(() -> Strait.ping(s), ProtocolError), "16 descriptors")
end
# Pushed frames have none.
for (op, body) in ((GONE, (lease = 1, segment = "s", reason = "expired")), (Strait.SHUTDOWN, (drain_ms = 1,)))
    with_peer(peer -> (receive(peer); answer(peer, op, 0, body, Cint[no_memory()]); receive(peer))) do s, peer
        says(thrown(() -> Strait.ping(s), ProtocolError), "with descriptors")
    end
end

# ---- the end, at each step

for last_step in (KERNELS, CREATE, INVOKE, MAP, PUBLISH, RELEASE)
    held = open_fds()
    script = function (peer)
        while true
            frame = receive(peer)
            (frame === nothing || frame[1] == last_step) && return
            op, sequence, body, _ = frame
            reply = op == KERNELS ? (OK, done(kernels = DECLARED, more = false)) : op == CREATE ? put_down(op, body) :
                op == INVOKE ? results(entry(5)) : op == MAP ? mapped(x48()) : (OK, done())
            answer(peer, reply[1], sequence, reply[2:end]...)
        end
    end
    with_peer(script) do s, peer
        e = thrown(Disconnected) do
            y = call(s, "mix", [1.0, 2.0])
            fetch(s, "x")
            publish!(s, "n", [1.0])
            release!(s, y)
            foreach(_ -> (sleep(0.01); Strait.ping(s)), 1:50)
        end
        @test !isopen(s) && s.connection.fd == -1
    end
    GC.gc()
    @test collect_until(() -> open_fds() <= held + 1)
end
# Before the greeting is over.
for script in (peer -> nothing, peer -> receive(peer), peer -> ((_, sequence, _, _) = receive(peer); answer(peer, WELCOME, sequence, done(protocol = 1))),
    peer -> ((_, sequence, _, _) = receive(peer); answer(peer, WELCOME, sequence, done(protocol = true))), peer -> ((_, sequence, _, _) = receive(peer); answer(peer, OK, sequence, done())))
    ends = zeros(Cint, 2)
    systemerror("socketpair", ccall(:socketpair, Cint, (Cint, Cint, Cint, Ptr{Cint}), Strait.AF_UNIX, Strait.SOCK_SEQPACKET | Strait.SOCK_NONBLOCK, 0, ends) != 0)
    peer = Peer(ends[2])
    @async (script(peer); hang_up(peer))
    @test thrown(() -> Strait.begin_session(ends[1], "/nowhere"), StraitError) isa Union{Disconnected,ProtocolError}
    @test ccall(:fcntl, Cint, (Cint, Cint), ends[1], 1) == -1
    Strait.close_fd(ends[2])
end

# ---- bool8: any byte but 0 is true

for (bytes, copied) in (UInt8[0, 1, 1, 0] => 0, UInt8[0, 2, 1, 0, 255, 3, 128] => 6, vcat(zeros(UInt8, 9000), 0x04) => 1, vcat(0x80, ones(UInt8, 20000)) => 20001)
    size = length(bytes)
    with_peer(serve((op, body) -> op == MAP ? mapped(segment(4PAGE, [tensor("a", "int8", [size], PAGE, size), tensor("b", "bool8", [size], 2PAGE, size)]; values = bytes, offset = 2PAGE)) : (OK, done()))) do s, peer
        found = fetch(s, "x")
        @test found.b == (bytes .!= 0) && reinterpret(UInt8, found.b) == UInt8.(bytes .!= 0) && count(found.b) == count(!iszero, bytes)
        @test all(iszero, found.a) && Strait.client_stats(s).copied_bytes == copied
        @test_throws ReadOnlyMemoryError found.b[1] = true
        publish!(s, "again", found.b)
        @test Strait.client_stats(s).copied_bytes == copied
        release!(s, found)
        @test !any(found.b)
    end
end
