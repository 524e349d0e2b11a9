using Strait: TensorSpec

const PAGE = 65536
done(; more...) = (; request_id = "r", more...)
leased(lease, mapping; expires_ms = 600_000) = done(mapping = mapping, lease = lease, expires_ms = expires_ms)

"Answers every request by `reply(op, body)`: an op, a body, descriptors and a payload; what came is put down in `log` and `payloads`."
function serve(reply, log = Tuple{Op,Dict{String,Any}}[], payloads = Vector{UInt8}[])
    return function (peer)
        while true
            frame = receive(peer)
            frame === nothing && return
            op, sequence, body, payload, _ = frame
            push!(log, (op, body))
            push!(payloads, payload)
            found = reply(op, body)
            found === nothing || answer(peer, found[1], sequence, found[2:end]...)
        end
    end
end
count_of(log, op) = count(entry -> entry[1] == op, log)
bodies(log, op) = [body for (other, body) in log if other == op]
anything(op, body) = (OK, done())

"A result of two Float64 columns and three rows, numbered."
function result_of(lease; op = MAP, writers = "host")
    fd, mapping = segment(2PAGE, [tensor("x", "float64", [3, 2], PAGE, 48)]; writers = writers, values = Float64[1 3 5; 2 4 6])
    return (OK, leased(lease, mapping), Cint[fd])
end

@testset "a request and its ends" begin
    log = Tuple{Op,Dict{String,Any}}[]
    script = serve(log) do op, body
        op == PING && return (OK, done())
        op == STATS && return (ERROR, (code = "INTERNAL", reason = "GUEST_TRAP", message = "it broke", request_id = "r7", backtrace = "at f", details = (port = "x",)))
        op == LOOKUP && return (ERROR, (code = "FAILED_PRECONDITION", reason = "LEASE_EXPIRED", message = "lease 3 expired 5 ms ago", request_id = "r8"))
        return (OK, done())
    end
    with_peer(script; request_id = "job-1") do s, peer
        @test Strait.ping(s) === nothing
        @test last(log) == (PING, Dict{String,Any}("request_id" => "job-1"))
        e = thrown(() -> stats(s), RemoteError)
        @test (e.code, e.reason, e.message, e.request_id, e.backtrace, e.details) ==
              ("INTERNAL", "GUEST_TRAP", "it broke", "r7", "at f", Dict{String,Any}("port" => "x"))
        says(e, "it broke", "GUEST_TRAP", "r7", "at f")
        e = thrown(() -> Strait.ask(s.connection, LOOKUP, (name = "x",)), LeaseExpired)
        @test e.request_id == "r8" && occursin("5 ms", e.message)
        @test isopen(s)
        # A fork is refused before anything is sent.
        before = length(log)
        s.connection.owner += Cint(1)
        e = thrown(() -> Strait.ping(s), Forked)
        @test e.here == getpid() && e.owner == getpid() + 1
        @test_throws Forked close(s)
        s.connection.owner -= Cint(1)
        sleep(0.02)
        @test length(log) == before
        close(s)
        @test !isopen(s)
        says(thrown(() -> Strait.ping(s), Disconnected), "closed by this program")
    end
    says(thrown(() -> Strait.connect_to("/nowhere"; request_id = "no blanks"), ArgumentError), "no blanks")
end

@testset "the host goes" begin
    with_peer(peer -> (receive(peer); hang_up(peer))) do s, peer
        says(thrown(() -> Strait.ping(s), Disconnected), "connect again")
        says(thrown(() -> Strait.ping(s), Disconnected), "connect again")
        @test !isopen(s) && s.connection.fd == -1
    end
    for junk in (UInt8[1, 2, 3], Strait.encode_frame(HELLO, UInt32(9), NamedTuple()))
        with_peer(peer -> (receive(peer); Strait.send_packet(peer.fd, junk); receive(peer))) do s, peer
            @test_throws ProtocolError Strait.ping(s)
            @test_throws ProtocolError Strait.ping(s)
        end
    end
    says(thrown(ProtocolError) do
            with_peer((s, peer) -> Strait.ping(s), peer -> (receive(peer); answer(peer, ERROR, 0, (code = "INVALID_ARGUMENT", reason = "BAD_FRAME", message = "flags 7"))))
        end, "flags 7")
    # It is seen without a request, too.
    with_peer(peer -> hang_up(peer)) do s, peer
        sleep(0.02)
        @test !isopen(s)
    end
end

@testset "many tasks, answers in any order" begin
    script = function (peer)
        waiting = Any[]
        for _ in 1:8
            push!(waiting, receive(peer))
        end
        for (op, sequence, body, _) in reverse(waiting)
            answer(peer, OK, sequence, done(echo = body["name"]))
        end
    end
    with_peer(script) do s, peer
        tasks = [Threads.@spawn(Strait.ask(s.connection, LOOKUP, (name = "n$i",))) for i in 1:8]
        # A waiter must not keep the collector from running.
        GC.gc()
        @test [fetch(task)["echo"] for task in tasks] == ["n$i" for i in 1:8]
        @test isempty(s.connection.waiting)
    end
end

@testset "arrays over pages" begin
    before = open_fds()
    log = Tuple{Op,Dict{String,Any}}[]
    with_peer(serve((op, body) -> op == MAP ? result_of(7) : (OK, done()), log)) do s, peer
        view_of, shaped = Ref{Any}(), Ref{Any}()
        address = Ref{Any}()
        apart() do
            y = fetch(s, "x")
            @test y isa Matrix{Float64} && y == [1 3 5; 2 4 6]
            @test is_mapped(pointer(y))
            @test_throws ReadOnlyMemoryError y[1] = 2
            @test y[1] == 1
            address[] = pointer(y)
            view_of[], shaped[] = view(y, :, 2), reshape(y, 3, 2)
        end
        # A view, or a reshaped array, keeps the pages.
        @test !collect_until(() -> count_of(log, RELEASE) > 0; rounds = 3)
        apart(() -> @test(view_of[] == [3, 4] && is_mapped(address[])))
        drop!(view_of)
        GC.gc()
        apart(() -> @test(shaped[] == [1 4; 2 5; 3 6]))
        drop!(shaped)
        @test collect_until(() -> count_of(log, RELEASE) > 0)
        address = address[]
        @test !is_mapped(address)
        @test bodies(log, RELEASE)[1]["leases"] == [7]
        @test Strait.client_stats(s) == (copied_bytes = 0, huge_bytes = 0, calls = 0, mappings = 0, mapped_bytes = 0)
        @test isempty(s.connection.tensors) && isempty(s.connection.leases.held)
    end
    @test collect_until(() -> open_fds() <= before + 1)   # the peer's own end stays open
end

@testset "garbage is looked for once much is mapped" begin
    log = Tuple{Op,Dict{String,Any}}[]
    lease = Ref(0)
    with_peer(serve((op, body) -> op == MAP ? result_of(lease[] += 1) : (OK, done()), log)) do s, peer
        kept = fetch(s, "x")
        apart(() -> foreach(_ -> fetch(s, "x"), 1:5))
        @test Strait.client_stats(s).mapped_bytes == 6 * 2PAGE
        s.connection.collect_at = 6 * 2PAGE
        Strait.ping(s)
        # The one that is alive, and the last one at most, whose slot the compiler may keep.
        @test Strait.client_stats(s).mappings <= 2
        @test s.connection.collect_at == Strait.COLLECT_BYTES_MIN
        @test kept[2] == 2
    end
end

@testset "idle segments beyond the limit are released" begin
    log = Tuple{Op,Dict{String,Any}}[]
    with_peer(serve((op, body) -> op == MAP ? result_of(1) : (OK, done()), log)) do s, peer
        y = fetch(s, "x")
        for _ in 1:Strait.SCRATCH_COUNT_MAX + 1
            Strait.keep_scratch!(s, y)
        end
        @test length(s.scratch) == Strait.SCRATCH_COUNT_MAX
        @test_throws Released publish!(s, "n", y)
        empty!(s.scratch)
    end
end

@testset "release!" begin
    log = Tuple{Op,Dict{String,Any}}[]
    with_peer(serve((op, body) -> op == MAP ? result_of(9) : (OK, done()), log)) do s, peer
        address = Ref{Any}()
        apart() do
            y = fetch(s, "x")
            @test release!(s, y) === nothing
            @test collect_until(() -> count_of(log, RELEASE) == 1)
            # The addresses stay valid as long as the array lives.
            @test all(iszero, y) && is_mapped(pointer(y))
            @test_throws ReadOnlyMemoryError y[1] = 2
            @test_throws Released publish!(s, "again", y)
            @test_throws Released Strait.renew!(s, y)
            release!(s, y)
            release!(s, [1.0])
            address[] = pointer(y)
        end
        address = address[]
        @test collect_until(() -> !is_mapped(address))
        @test count_of(log, RELEASE) == 1
    end
end

@testset "several tensors, and such without elements" begin
    log = Tuple{Op,Dict{String,Any}}[]
    both() = segment(3PAGE, [tensor("a", "int32", [2], PAGE, 8), tensor("b", "bool8", [], 2PAGE, 1), tensor("c", "float64", [0, 3], 2PAGE, 0)])
    reply(op, body) = op == MAP ? ((fd, mapping) = body["name"] == "none" ? segment(PAGE, [tensor("x", "int8", [0], PAGE, 0)]) : both();
        (OK, leased(4, mapping), Cint[fd])) : (OK, done())
    with_peer(serve(reply, log)) do s, peer
        found = fetch(s, "all")
        @test keys(found) == (:a, :b, :c)
        @test found.a == [0, 0] && found.b isa Array{Bool,0} && found.b[] == false && size(found.c) == (3, 0)
        release!(s, found.a)
        @test count_of(log, RELEASE) == 0 && found.b[] == false
        @test_throws Released publish!(s, "n", found.a)
        release!(s, found)
        @test collect_until(() -> count_of(log, RELEASE) == 1)
        @test fetch(s, "none") == Int8[]
        @test collect_until(() -> count_of(log, RELEASE) == 2)
    end
end

@testset "what cannot be mapped" begin
    before = open_fds()
    short() = (found = segment(2PAGE, [tensor("x", "int8", [4], PAGE, 4)]); found[2]["bytes"] = 4PAGE; found)
    replies = Dict(
        "short" => () -> ((fd, mapping) = short(); (OK, leased(1, mapping), Cint[fd])),
        "written" => () -> result_of(2; writers = "creator"),
        "no descriptor" => () -> (OK, result_of(3)[2]),
        "no lease" => () -> ((_, body, fds) = result_of(4); (OK, done(mapping = body.mapping), fds)),
        "no mapping" => () -> ((_, body, fds) = result_of(5); (OK, done(lease = 5, expires_ms = 10_000), fds)),
    )
    log = Tuple{Op,Dict{String,Any}}[]
    with_peer(serve((op, body) -> op == MAP ? replies[body["name"]]() : (OK, done()), log)) do s, peer
        says(thrown(() -> fetch(s, "short"), MappingError), "131072", "262144")
        says(thrown(() -> fetch(s, "written"), MappingError), "creator", "publish")
        says(thrown(() -> fetch(s, "no descriptor"), ProtocolError), "0 descriptors")
        says(thrown(() -> fetch(s, "no lease"), ProtocolError), "0 leases")
        says(thrown(() -> fetch(s, "no mapping"), ProtocolError), "mapping")
        # What was granted all the same is given back.
        @test collect_until(() -> Set(lease for body in bodies(log, RELEASE) for lease in body["leases"]) == Set([1, 2, 3, 5]))
        @test isempty(s.connection.mapped) && isempty(s.connection.leases.held)
    end
    @test collect_until(() -> open_fds() <= before + 3)
end

@testset "segments to fill" begin
    log = Tuple{Op,Dict{String,Any}}[]
    keep = Cint[]
    function reply(op, body)
        op == CREATE || return (OK, done(mapping = Dict()))
        given = body["tensors"][1]
        fd, mapping = segment(2PAGE, [tensor("x", given["dtype"], given["shape"], PAGE, sizeof(Strait.TYPE_OF[given["dtype"]]) * prod(Int.(given["shape"])))]; writers = "anyone", id = "f"^32)
        push!(keep, ccall(:dup, Cint, (Cint,), fd))
        return (OK, leased(length(keep), mapping), Cint[fd])
    end
    with_peer(serve(reply, log)) do s, peer
        x = zeros(s, Float32, 4, 3, 2)
        @test x isa Array{Float32,3} && size(x) == (4, 3, 2) && all(iszero, x) && is_mapped(pointer(x))
        @test bodies(log, CREATE)[1]["tensors"] == [Dict{String,Any}("name" => "x", "dtype" => "float32", "shape" => Any[2, 3, 4])]
        x .= 5
        seen = zeros(Float32, 24)
        GC.@preserve seen ccall(:pread, Cssize_t, (Cint, Ptr{Cvoid}, Csize_t, Int64), keep[1], pointer(seen), 96, PAGE)
        @test all(==(5), seen)
        @test size(similar(s, x)) == (4, 3, 2) && eltype(similar(s, x, Int8)) == Int8 && size(similar(s, x, Int8, (2,))) == (2,)
        @test zeros(s, 3) isa Vector{Float64} && zeros(s, Bool) isa Array{Bool,0} && zeros(s, Int8, 0, 2) == zeros(Int8, 0, 2)
        @test_throws ArgumentError zeros(s, Int128, 2)
        @test_throws ArgumentError zeros(s, Int8, -1)
        # Published as it is: read-only from then on, at the same address.
        address = pointer(x)
        @test publish!(s, "name", x) === x
        @test last(log)[1] == PUBLISH && last(log)[2]["segment"] == "f"^32
        @test pointer(x) == address && all(==(5), x) && Strait.client_stats(s).copied_bytes == 0
        @test_throws ReadOnlyMemoryError x[1] = 1
        # Nobody can write any more, so that the host can seal.
        @test ccall(:fcntl, Cint, (Cint, Cint, Cint), keep[1], 1033, 0x8) == 0
        # Anything else is copied.
        publish!(s, "copy", [1.0, 2.0])
        publish!(s, "copy", view([1.0 2.0; 3.0 4.0], 1, :))
        publish!(s, "copy", transpose([1.0 2.0; 3.0 4.0]))
        @test Strait.client_stats(s).copied_bytes == 16 + 16 + 32
    end
    foreach(Strait.close_fd, keep)
end

"Bytes of huge pages in the mapping at `address`, as Linux counts them."
function in_huge_pages(address)
    inside = false
    for line in eachline("/proc/self/smaps")
        range = match(r"^([0-9a-f]+)-([0-9a-f]+) ", line)
        range === nothing || (inside = parse(UInt, range[1]; base = 16) <= UInt(address) < parse(UInt, range[2]; base = 16))
        inside && startswith(line, "ShmemPmdMapped:") && return 1024 * parse(Int, split(line)[2])
    end
    return 0
end

@testset "large segments" begin
    huge, length_of = Strait.HUGE_BYTES, 9 << 20 + PAGE
    keep = Ref{Cint}(-1)
    function reply(op, body)
        op == CREATE || op == MAP || return (OK, done())
        # At the beginning of a huge page, as the host has it, and nowhere near one.
        offset = op == MAP || body["tensors"][1]["dtype"] == "uint8" ? huge : PAGE
        writers = op == MAP ? "host" : "anyone"
        fd, mapping = segment(offset + length_of + PAGE, [tensor("x", op == MAP ? "uint8" : body["tensors"][1]["dtype"], [length_of], offset, length_of)]; writers = writers)
        keep[] < 0 || Strait.close_fd(keep[])
        keep[] = ccall(:dup, Cint, (Cint,), fd)
        return (OK, leased(1, mapping), Cint[fd])
    end
    with_peer(serve(reply)) do s, peer
        x = zeros(s, UInt8, length_of)
        @test UInt(pointer(x)) % huge == 0
        born = Strait.client_stats(s).huge_bytes
        # Not every Linux has some to give.
        @test born in 0:huge:8<<20 && in_huge_pages(pointer(x)) >= born
        @test all(iszero, x)
        x .= (1:length_of) .% UInt8
        seen = zeros(UInt8, length_of)
        GC.@preserve seen ccall(:pread, Cssize_t, (Cint, Ptr{Cvoid}, Csize_t, Int64), keep[], pointer(seen), length_of, huge)
        @test seen == x
        # The same pages at the same address once nobody may write.
        address = pointer(x)
        publish!(s, "x", x)
        @test pointer(x) == address && x == seen
        release!(s, x)
        @test all(iszero, x)
        # Only what is wholly in huge pages of the file becomes such: [PAGE, 9 MiB + 2 * PAGE) without its ends.
        before = Strait.client_stats(s).huge_bytes
        y = zeros(s, Int8, length_of)
        @test UInt(pointer(y)) % huge == PAGE && Strait.client_stats(s).huge_bytes - before in 0:huge:6<<20
        @test all(iszero, y)
        # What is read lies right for huge pages, too.
        @test UInt(pointer(fetch(s, "z"))) % huge == 0
        # Small ones are left alone.
        @test Strait.back_with_huge_pages!(Ptr{Cvoid}(pointer(y)), huge) == 0
    end
    Strait.close_fd(keep[])
    # Where Linux refuses nothing is lost: file and address out of step.
    fd, _ = segment(3huge, []; writers = "anyone")
    address = Strait.mmap_at_huge_page(C_NULL, 2huge, Strait.PROT_READ | Strait.PROT_WRITE, Strait.MAP_SHARED, fd)
    Strait.mmap(address, 2huge, Strait.PROT_READ | Strait.PROT_WRITE, Strait.MAP_SHARED | Strait.MAP_FIXED, fd, PAGE)
    @test Strait.back_with_huge_pages!(address, 2huge) == 0
    @test all(iszero, unsafe_wrap(Array, Ptr{UInt8}(address), 2huge))
    Strait.unmap(address, 2huge)
    # No address space is left over of the room that was reserved.
    count_of_maps() = count(_ -> true, eachline("/proc/self/maps"))
    maps = count_of_maps()
    for bytes in (4 << 20, 4 << 20 + 1, 6 << 20 - 1)
        address = Strait.map_fd(fd, bytes, true)
        @test UInt(address) % huge == 0
        Strait.unmap(address, bytes)
        @test count_of_maps() <= maps
    end
    @test_throws MappingError Strait.map_fd(fd, 3huge + 1, true)
    Strait.close_fd(fd)
end

@testset "leases" begin
    log = Tuple{Op,Dict{String,Any}}[]
    expired = Set{Int}()
    next = Ref(0)
    function reply(op, body)
        op == MAP && ((_, found, fds) = result_of(next[] += 1); return (OK, (; found..., expires_ms = 60), fds))
        op == RENEW || return (OK, done())
        any(in(expired), body["leases"]) && return (ERROR, (code = "FAILED_PRECONDITION", reason = "LEASE_EXPIRED", message = "gone by now", request_id = "r"))
        return (OK, done(expires_ms = 60))
    end
    with_peer(serve(reply, log)) do s, peer
        apart() do
            a, b = fetch(s, "a"), fetch(s, "b")
            # Renewed at half of their life, and again.
            @test collect_until(() -> count(body -> 1 in body["leases"], bodies(log, RENEW)) >= 2)
            @test all(body -> body["lease_ms"] == 60, bodies(log, RENEW))
            push!(expired, 1)
            @test collect_until(() -> s.connection.leases.held[1].gone !== nothing)
            # One of two is over: the other one lives on.
            @test s.connection.leases.held[2].gone === nothing
            says(thrown(() -> publish!(s, "c", a), LeaseExpired), "gone by now")
            answer(peer, GONE, 0, (lease = 2, segment = "x", reason = "expired"))
            # The renewal in the background may be the one that reads it.
            @test collect_until(() -> (isopen(s); s.connection.leases.held[2].gone !== nothing))
            e = thrown(() -> Strait.renew!(s, b), LeaseExpired)
            @test e.request_id == "-" && occursin("lease 2 is over: expired", e.message)
            # The pages stay; what is gone is not released.
            @test a == b == [1 3 5; 2 4 6]
        end
        @test collect_until(() -> isempty(s.connection.mapped))
        @test count_of(log, RELEASE) == 0
    end
    empty!(log)
    with_peer(serve(reply, log); renew = false, lease_ms = 50) do s, peer
        y = fetch(s, "a")
        @test bodies(log, MAP)[1]["lease_ms"] == 50
        sleep(0.1)
        @test count_of(log, RENEW) == 0
        @test Strait.renew!(s, y; lease_ms = 70) == 60
        @test bodies(log, RENEW)[1]["lease_ms"] == 70
        @test y[1] == 1
    end
end

const DECLARED = [(name = "mix", plugin = "p", version = "1", doc = "Mixes.\nWell.",
    inputs = [(name = "x", dtypes = ["float64"], rank_min = 1, rank_max = 8, role = "data", doc = ""), (name = "mask-of", dtypes = ["bool8", "int7"], rank_min = 1, rank_max = 8, role = "mask", doc = "")],
    outputs = [(name = "y", dtypes = ["float64"], rank_min = 1, rank_max = 8, role = "data", doc = "")],
    parameters = [(name = "axis", kind = "axis", default = 0, minimum = nothing, maximum = nothing, choices = [], doc = "Along it."),
        (name = "to-what", kind = "text", default = nothing, minimum = nothing, maximum = nothing, choices = ["a", "b"], doc = ""),
        (name = "w", kind = "reals", default = nothing, minimum = 0, maximum = 1.5, choices = [], doc = ""),
        (name = "n", kind = "integer", default = 2^53 + 1, minimum = typemin(Int64), maximum = typemax(UInt64), choices = [], doc = ""),
        (name = "r", kind = "real", default = "nan", minimum = -0.5, maximum = 2^53 + 1, choices = [], doc = "")],
    signature = "(),()->()", split_axis = 0, combine = "tree", block_tree = (block_rows = 4096, partials = "mix-blocks", merge = "mix-all"),
    streaming = false, in_place = true)]

@testset "calls" begin
    log = Tuple{Op,Dict{String,Any}}[]
    lease = Ref(100)
    function reply(op, body)
        op == KERNELS && return (OK, done(kernels = get(body, "kernel", "mix") == "mix" ? DECLARED : [], more = false))
        if op == CREATE
            given = body["tensors"][1]
            fd, mapping = segment(2PAGE, [tensor("x", given["dtype"], given["shape"], PAGE, sizeof(Strait.TYPE_OF[given["dtype"]]) * prod(Int.(given["shape"])))]; writers = "anyone", id = string(lease[] += 1; pad = 32))
            return (OK, leased(lease[], mapping), Cint[fd])
        end
        if op == INVOKE
            body["kernel"] == "mix" || return (ERROR, (code = "NOT_FOUND", reason = "KERNEL_NOT_FOUND", message = "no $(body["kernel"])", request_id = "r"))
            _, entry, fds = result_of(lease[] += 1)
            names = get(body, "publish", Dict())
            published = haskey(names, "y") ? (name = names["y"],) : NamedTuple()
            return (OK, done(results = [(; port = "y", entry..., fd = 0, published...)], notes = [(key = "k", text = "t")], copied_bytes = 8,
                input_written = false, pages = [(port = "x", device = 1, inode = 2)], minor_faults = 3, seconds = (total = 0.5,)), fds)
        end
        op == LOOKUP && return (OK, done(name = body["name"], mapping = segment(2PAGE, [tensor("c", "float64", [1, 2, 3], PAGE, 48)])[2]))
        return (OK, done())
    end
    with_peer(serve(reply, log)) do s, peer
        sent() = bodies(log, INVOKE)[end]
        x = zeros(s, Float64, 2, 3)
        id = s.connection.tensors[UInt(pointer(x))][1].mapping.segment
        y = call(s, "mix", x; axis = 1, to_what = Float32, w = [1, Inf, 0.5])
        @test y == [1 3 5; 2 4 6]
        @test sent()["inputs"] == Dict{String,Any}("x" => Dict{String,Any}("segment" => id))
        @test sent()["parameters"] == Dict{String,Any}("axis" => 1, "to-what" => "float32", "w" => Any[1, "inf", 0.5])
        # 1-based, and from the other end.
        for (axis, wire) in (1 => 1, 2 => 0)
            call(s, "mix", x; axis = axis)
            @test sent()["parameters"]["axis"] == wire
        end
        for axis in (0, 3, -1, 1.5, true)
            says(thrown(() -> call(s, "mix", x; axis = axis), ArgumentError), "axis")
        end
        # A result goes in again as it is; several inputs in each form.
        call(s, "mix", y, "flag#c"; axis = 2)
        @test sent()["inputs"] == Dict{String,Any}("x" => Dict{String,Any}("segment" => "0"^32), "mask-of" => "flag#c")
        call(s, "mix", ("x" => "flag", "mask-of" => x); axis = 3)
        @test sent()["inputs"]["x"] == "flag" && sent()["parameters"]["axis"] == 0
        call(s, "mix"; x = x, mask_of = "m")
        @test sent()["inputs"] == Dict{String,Any}("x" => Dict{String,Any}("segment" => id), "mask-of" => "m")
        call(s, "mix", Dict("x" => x))
        call(s, "mix", (x = x,))
        @test sent()["inputs"] == Dict{String,Any}("x" => Dict{String,Any}("segment" => id))
        says(thrown(() -> call(s, "mix", x, x, x), ArgumentError), "3 inputs", "takes 2")
        says(thrown(() -> call(s, "mix", x; x = x), ArgumentError), "twice")
        says(thrown(() -> call(s, "mix", :x), ArgumentError), "Symbol")
        @testset "parameters" begin
            for (given, wire) in (
                # An integer of any type is one, over the whole range of both 64-bit types.
                Int8(-3) => -3, UInt8(200) => 200, 2^53 + 1 => 2^53 + 1, -(2^53 + 1) => -(2^53 + 1), typemin(Int64) => typemin(Int64), typemax(Int64) => typemax(Int64),
                UInt64(5) => 5, UInt64(2)^63 - 1 => typemax(Int64), UInt64(2)^63 => UInt64(2)^63, typemax(UInt64) => typemax(UInt64),
                Int128(2)^64 - 1 => typemax(UInt64), -Int128(2)^63 => typemin(Int64), UInt128(7) => 7, big(2)^63 => UInt64(2)^63, big(-1) => -1, true => true, false => false,
                # Any other number is the nearest Float64, a whole one too.
                2.0 => 2.0, 1e22 => 1e22, 2.0^60 => 2.0^60, -0.0 => -0.0, 5e-324 => 5e-324, 0.1f0 => Float64(0.1f0), Float16(0.1) => Float64(Float16(0.1)), BFloat16(1.5) => 1.5,
                3 // 1 => 3.0, 1 // 3 => 1 / 3, π => Float64(π), big"0.1" => 0.1, big"1e-400" => 0.0,
                NaN => "nan", Inf => "inf", -Inf32 => "-inf", Float16(NaN) => "nan", big(Inf) => "inf", -1 // 0 => "-inf", Float8_e5m2(Inf) => "inf",
                # Lists, of whatever holds numbers only.
                [1, 2^53 + 1] => Any[1, 2^53+1], (1, 0.5) => Any[1, 0.5], 1:3 => Any[1, 2, 3], Real[1, NaN] => Any[1, "nan"], Union{Missing,Float64}[1.0] => Any[1.0],
                view([1.0, 2.0], 2:2) => Any[2.0], Float64[] => Any[], UInt64[typemax(UInt64)] => Any[typemax(UInt64)], () => Any[],
                "text" => "text", :symbol => "symbol", Float32 => "float32",
            )
                call(s, "mix", x; w = given)
                found = sent()["parameters"]["w"]
                @test isequal(found, wire) && typeof(found) === typeof(wire)
            end
            for (given, word) in (
                typemax(UInt64) + Int128(1) => "18446744073709551616", big(2)^64 => "Float64", -big(2)^63 - 1 => "-9223372036854775809", [1, big(2)^64] => "18446744073709551616",
                big"1e400" => "e+400", -(big(10)^400 // 1) => "largest number", missing => "missing", nothing => "nothing", [1.0, missing] => "missing", Any[1, nothing] => "nothing",
                1im => "Complex", 'c' => "Char", Date(2020, 1, 2) => "Date", Second(3) => "Second", DateTime(2020) => "DateTime", [Day(1)] => "Day", [true] => "Bool", ["nan"] => "String",
                [1.0 2.0] => "Array", Dict("a" => 1) => "Dict", sum => "typeof(sum)", (a = 1,) => "NamedTuple", Set([1]) => "Set",
            )
                says(thrown(() -> call(s, "mix", x; w = given), ArgumentError), "\"w\"", word)
            end
            says(thrown(() -> call(s, "mix", x; w = Int128), ArgumentError), "Int128")
            says(thrown(() -> Strait.invocation(s, "mix", (x = x,), ("w" => 1, "w" => 2)), ArgumentError), "\"w\"", "twice")
            says(thrown(() -> Strait.invocation(s, "mix", (x = x,), (1 => 2,)), ArgumentError), "a name cannot be 1")
        end
        says(thrown(() -> call(s, "no", x), RemoteError), "KERNEL_NOT_FOUND")
        @test Strait.client_stats(s).copied_bytes == 0

        # Another array is copied, always to the same segment.
        made = count_of(log, CREATE)
        plain = rand(4)
        for n in 1:3
            call(s, "mix", plain)
            @test Strait.client_stats(s).copied_bytes == 32n
        end
        @test count_of(log, CREATE) == made + 1
        # Another shape over a segment's elements is another tensor.
        call(s, "mix", reshape(x, 6))
        @test Strait.client_stats(s).copied_bytes == 96 + 48

        i = Strait.invocation(s, "mix", (x = plain,), (axis = 1,); deadline_ms = 5.5, publish = (y = "out",), replace = true, seal = true, verify = true,
            idempotency_key = "k", request_id = "q", limits = (guest_bytes = 5,))
        @test i.outputs.y == y && i.published == Dict("y" => "out") && i.notes == ["k" => "t"] && i.copied_bytes == 8 && i.client_copied_bytes == 32
        @test i.pages == [(port = "x", device = 1, inode = 2)] && i.seconds["total"] == 0.5 && i.minor_faults == 3 && i.request_id == "r"
        @test filter(entry -> entry.first != "inputs", sent()) == Dict{String,Any}("kernel" => "mix", "parameters" => Dict{String,Any}("axis" => 0), "deadline_ms" => 6,
            "publish" => Dict{String,Any}("y" => "out"), "replace" => true, "seal" => true, "verify" => true, "idempotency_key" => "k", "request_id" => "q", "limits" => Dict{String,Any}("guest_bytes" => 5))
        for wrong in (0, -1, NaN, Inf, true, "5")
            says(thrown(() -> call(s, "mix", x; options = (deadline_ms = wrong,)), ArgumentError), "deadline_ms is $(repr(wrong))")
        end

        # With a function first, the result is given back after it.
        kept = Ref{Any}()
        @test call(y -> (kept[] = y; sum(y)), s, "mix", x; axis = 1) == 21
        @test all(iszero, kept[])

        text = sprint(show, MIME"text/plain"(), kernels(s, "mix")[1])
        mix = kernels(s, "mix")[1]
        @test (mix.signature, mix.combine, mix.inputs[1].whole) == ("(),()->()", "tree", false)
        @test mix.block_tree == Strait.BlockTree(4096, "mix-blocks", "mix-all")
        @test [(p.minimum, p.maximum) for p in kernels(s, "mix")[1].parameters[4:5]] == [(typemin(Int64), typemax(UInt64)), (-0.5, 2^53 + 1)]
        for word in ("p/mix 1", "Mixes.\nWell.", "mask-of: Array of Bool", "mask", "axis: axis, default ndims(x)", "\"a\" \"b\"", "at least 0, at most 1.5",
            "n: integer, default 9007199254740993, at least -9223372036854775808, at most 18446744073709551615", "r: real, default \"nan\", at least -0.5, at most 9007199254740993")
            @test occursin(word, text)
        end
        @test count_of(log, INVOKE) == Strait.client_stats(s).calls
    end
end

@testset "cancelled and interrupted calls" begin
    log = Tuple{Op,Dict{String,Any}}[]
    running = Ref{Any}()
    script = function (peer)
        while true
            frame = receive(peer)
            frame === nothing && return
            op, sequence, body, _ = frame
            push!(log, (op, body))
            if op == INVOKE
                running[] = sequence
            elseif op == CANCEL
                answer(peer, OK, sequence, done(cancelled = body["sequence"] == running[]))
                if count_of(log, CANCEL) == 1
                    answer(peer, ERROR, running[], (code = "CANCELLED", reason = "CANCELLED", message = "ended", request_id = "r"))
                else
                    # It was done just before: its result must not stay with a caller who has gone.
                    _, entry, fds = result_of(55)
                    answer(peer, OK, running[], done(results = [(; port = "y", entry..., fd = 0)], notes = []), fds)
                end
            else
                answer(peer, OK, sequence, op == KERNELS ? done(kernels = DECLARED, more = false) : done())
            end
        end
    end
    before = open_fds()
    with_peer(script) do s, peer
        token = Strait.CancelToken()
        task = @async thrown(() -> call(s, "mix", "x"; options = (cancel = token,)), RemoteError)
        @test collect_until(() -> count_of(log, INVOKE) == 1)
        Strait.cancel!(token)
        @test fetch(task).reason == "CANCELLED"
        # A token that was cancelled before.
        @test thrown(() -> call(s, "mix", "x"; options = (cancel = token,)), RemoteError).reason == "CANCELLED"
        @test count_of(log, INVOKE) == 1

        task = @async call(s, "mix", "x")
        @test collect_until(() -> count_of(log, INVOKE) == 2)
        schedule(task, InterruptException(); error = true)
        @test collect_until(() -> count_of(log, CANCEL) == 2)
        @test istaskfailed(task)
        @test collect_until(() -> any(body -> body["leases"] == [55], bodies(log, RELEASE)))
        @test isempty(s.connection.leases.held)
        @test Strait.ping(s) === nothing
    end
    @test collect_until(() -> open_fds() <= before + 1)
end

@testset "a session that nobody has any more" begin
    log = Tuple{Op,Dict{String,Any}}[]
    connection = Ref{Any}()
    ended = Ref(false)
    script = peer -> (serve((op, body) -> op == MAP ? result_of(1) : (OK, done()), log)(peer); ended[] = true)
    ends = zeros(Cint, 2)
    ccall(:socketpair, Cint, (Cint, Cint, Cint, Ptr{Cint}), Strait.AF_UNIX, Strait.SOCK_SEQPACKET | Strait.SOCK_NONBLOCK, 0, ends)
    peer = Peer(ends[2])
    @async (greet(peer); script(peer))
    kept = Ref{Any}()
    apart(() -> kept[] = fetch(Strait.begin_session(ends[1], "/nowhere"), "x"))
    # Its arrays keep the connection, since they hold leases.
    @test !collect_until(() -> ended[]; rounds = 3)
    apart(() -> @test(kept[][2] == 2))
    drop!(kept)
    @test collect_until(() -> ended[])
    @test count_of(log, RELEASE) == 1
    @test isempty(filter(c -> c.ending === nothing, Strait.REAPER.connections))
end
