# Against a real host, whose program STRAIT_BIN names.

function with_host(f; plugins = String[])
    mktempdir() do directory
        chmod(directory, 0o700)
        log = joinpath(directory, "log")
        given = [word for plugin in plugins for word in ("--plugin", plugin)]
        host = run(pipeline(`$(ENV["STRAIT_BIN"]) serve --directory $directory $given`; stdout = log, stderr = log); wait = false)
        try
            for _ in 1:600
                ispath(joinpath(directory, "data.sock")) && break
                process_running(host) || error("the host ended at once:\n" * read(log, String))
                sleep(0.05)
            end
            f("unix://" * directory, host)
        finally
            process_running(host) && kill(host)
            wait(host)
        end
    end
end

zscored(x, k) = (mean = sum(x; dims = k) ./ size(x, k); (x .- mean) ./ sqrt.(sum(abs2, x .- mean; dims = k) ./ size(x, k)))

with_host() do address, host
    s = connect(address)
    own() = stats(s).host["own"]

    @testset "no copy in either direction" begin
        x = zeros(s, Float64, 400, 300)
        @test 8 * length(x) >= s.welcome["move_min_bytes"]
        x .= rand.()
        for k in 1:2
            i = Strait.invocation(s, "zscore", (x = x,), (axis = k,); verify = true)
            y = i.outputs.y
            @test y ≈ zscored(x, k)
            @test i.copied_bytes == 0 && i.client_copied_bytes == 0
            # The kernel saw the very pages that these two arrays lie on.
            inode(a) = parse(Int, split(first(filter(eachline("/proc/self/maps") |> collect) do line
                low, high = (parse(UInt, word; base = 16) for word in split(split(line)[1], '-'))
                low <= UInt(pointer(a)) < high
            end))[5])
            @test Dict(page.port => page.inode for page in i.pages) == Dict("x" => inode(x), "y" => inode(y))
            @test_throws ReadOnlyMemoryError y[1] = 0
            # A result is an input as it is.
            @test call(s, "clip", y; lo = -1, hi = 1) == clamp.(y, -1, 1)
        end
        @test call(s, "zscore", x) ≈ zscored(x, 2)     # the default is the slowest axis
        @test stats(s).copied_bytes == 0
        plain = collect(x)
        @test call(s, "scale-shift", plain; a = 2, b = 1) ≈ 2 .* x .+ 1
        @test stats(s).copied_bytes == sizeof(x)
    end

    @testset "several kernels in one call" begin
        x = zeros(s, Float64, 400, 300)
        x .= rand.() .* 4
        text = "clip(lo=1, hi=3) | scale-shift(a=2, b=1)"
        i = Strait.invocation(s, text, (x = x,); verify = true)
        @test i.outputs.y == 2 .* clamp.(x, 1, 3) .+ 1
        @test i.copied_bytes == 0 && [(t.stage, t.kernel) for t in i.stages] == [("1", "clip"), ("2", "scale-shift")]
        @test call(s, text, x) == i.outputs.y
        graph = Dict("stages" => [
                Dict("name" => "up", "kernel" => "scale-shift", "parameters" => Dict("b" => 1)),
                Dict("kernel" => "clip", "parameters" => Dict("hi" => 2), "inputs" => Dict("x" => "x")),
            ], "outputs" => Dict("up" => "up.y", "low" => ".y"))
        both = call(s, graph, [1.0, 2.0, 3.0])
        @test keys(both) == (:low, :up) && both.up == [2.0, 3.0, 4.0] && both.low == [1.0, 2.0, 2.0]
        e = try; call(s, "clip | cast(to=int3)", [1.0]); catch e; e; end
        @test e isa RemoteError && e.reason == "BAD_PARAMETER" && occursin("stage 2 (`cast`)", e.message)
        @test Strait.invocation(s, "clip", (x = [1.0],)).stages == []
    end

    @testset "every type and rank goes out and comes back" begin
        for (_, T) in Strait.DTYPES, dims in ((), (1,), (5,), (3, 2), (2, 3, 4), (0,), (3, 0))
            # Bits of all kinds, but a Bool has only two.
            bytes = rand(T === Bool ? (0x00:0x01) : (0x00:0xff), sizeof(T) * prod(dims))
            x = Array{T}(undef, dims)
            GC.@preserve x bytes unsafe_copyto!(Ptr{UInt8}(pointer(x)), pointer(bytes), length(bytes))
            same(y) = y isa typeof(x) && size(y) == dims && GC.@preserve(y, [unsafe_load(Ptr{UInt8}(pointer(y)), n) for n in 1:sizeof(y)]) == bytes
            before = stats(s).copied_bytes
            publish!(s, "copied", x; replace = true)
            @test stats(s).copied_bytes - before == sizeof(x)
            @test same(fetch(s, "copied"))
            inside = zeros(s, T, dims)
            GC.@preserve inside bytes unsafe_copyto!(Ptr{UInt8}(pointer(inside)), pointer(bytes), length(bytes))
            publish!(s, "inside", inside; replace = true)
            @test same(fetch(s, "inside")) && same(inside)
            release!(s, inside)
        end
        @test stats(s).copied_bytes > 0
        @test [name for (name, _) in flights(s)] == ["copied", "inside"]
        delete!(delete!(s, "copied"), "inside")
        @test isempty(flights(s))
        @test thrown(() -> fetch(s, "copied"), RemoteError).reason == "FLIGHT_NOT_FOUND"
    end

    @testset "empty and 0-dimensional inputs, types by name" begin
        @test call(s, "clip", zeros(0, 3); hi = 1) == zeros(0, 3)
        @test call(s, "scale-shift", fill(3.0); a = 2)[] == 6 && call(s, "scale-shift", 3.0; a = 2)[] == 6
        y = call(s, "cast", Float32[1.00390625, -2, NaN, Inf]; to = BFloat16)
        @test y isa Vector{BFloat16} && isequal(Float32.(y), Float32.(BFloat16.(Float32[1.00390625, -2, NaN, Inf])))
        for T in (Float8_e4m3fn, Float8_e5m2, Float16, BFloat16)
            values = vcat(randn(1000) .* exp10.(rand(-6:6, 1000)), 464.0, 464.1, 61440.0)
            # Julia 1.5 makes a Float16 by way of a Float32, and so rounds what is none twice.
            T === Float16 && (values = Float64.(Float32.(values)))
            @test reinterpret(sizeof(T) == 1 ? UInt8 : UInt16, collect(call(s, "cast", values; to = T))) ==
                  reinterpret(sizeof(T) == 1 ? UInt8 : UInt16, T.(values))
        end
        i = Strait.invocation(s, "filter-finite", ([1.0, NaN, 2.0],) |> x -> (x = x[1],))
        @test i.outputs.y == [1, 2] && i.notes == ["dropped" => "1"]
    end

    @testset "small tensors travel in frames" begin
        told() = stats(s).host
        framed() = (copied = told()["copied"]; (copied["frame_in"], copied["frame_out"]))
        limit = s.inline_bytes
        @test limit == s.welcome["inline_bytes"] > 0
        small, larger = rand(limit ÷ 8), rand(limit ÷ 8 + 1)
        before, held, own_copies = framed(), (told()["segments"], own(), Strait.client_stats(s).mappings), stats(s).copied_bytes
        i = Strait.invocation(s, "scale-shift", (x = small,), (a = 2,))
        y = i.outputs.y
        @test y == 2 .* small && i.copied_bytes == i.client_copied_bytes == 2limit
        @test framed() == before .+ limit && stats(s).copied_bytes == own_copies + 2limit
        @test (told()["segments"], own(), Strait.client_stats(s).mappings) == held
        # It is Julia's own: written to, left alone by release!, an input that travels as it came, published by a copy.
        y .+= 1
        @test release!(s, y) === nothing && y == 2 .* small .+ 1
        @test call(s, "scale-shift", y; a = 1, b = -1) ≈ 2 .* small && framed() == before .+ 2limit
        @test_throws ArgumentError Strait.renew!(s, y)
        publish!(s, "small", y)
        @test fetch(s, "small") == y && stats(s).copied_bytes == own_copies + 5limit
        delete!(s, "small")
        # A result is a segment if that is asked for, and what is larger than allowed always is.
        between = framed()
        i = Strait.invocation(s, "scale-shift", (x = small,), (a = 2,); inline_bytes = 0)
        @test i.outputs.y == 2 .* small && i.client_copied_bytes == limit && framed() == between .+ (limit, 0)
        @test_throws ReadOnlyMemoryError i.outputs.y[1] = 0
        i = Strait.invocation(s, "scale-shift", (x = larger,), (a = 2,); inline_bytes = 1 << 40)
        @test i.outputs.y == 2 .* larger && i.client_copied_bytes == sizeof(larger) && framed() == between .+ (limit, 0)
        @test_throws ReadOnlyMemoryError i.outputs.y[1] = 0
        i = Strait.invocation(s, "scale-shift", (x = small,), (a = 2,); publish = (y = "small",))
        @test i.outputs.y == fetch(s, "small") == 2 .* small && Strait.find_tensor(s.connection, i.outputs.y) !== nothing
        i = Strait.invocation(s, "scale-shift", (x = small,), (a = 2,); map = false)
        @test isempty(i.outputs) && i.client_copied_bytes == limit
        delete!(s, "small")
        # Every type, by value: a Bool's bytes are 0 and 1.
        for (_, T) in Strait.DTYPES
            T <: Real && @test isequal(call(s, "cast", Float32[0, 1, 3]; to = T), T === Bool ? [false, true, true] : T.([0, 1, 3]))
        end
        @test call(s, "clip", fill(Float32(7)); hi = 3)[] === 3f0
        # A socket that sends no long packets: what has no room goes into a segment.
        fd, _ = Strait.connect_seqpacket(joinpath(s.directory, "data.sock"))
        @test ccall(:setsockopt, Cint, (Cint, Cint, Cint, Ref{Cint}, UInt32), fd, Strait.SOL_SOCKET, Strait.SO_SNDBUF, Cint(40_000), 4) == 0
        narrow = Strait.begin_session(fd, s.directory)
        @test narrow.connection.payload_room == 80_000 - 32 - 48 - 61440
        for (x, inside) in (rand(2310) => true, rand(2311) => false)
            was = framed()
            @test call(narrow, "scale-shift", x; a = 2) == 2 .* x
            @test (framed() .- was)[1] == (inside ? sizeof(x) : 0)
        end
        close(narrow)
    end

    @testset "prepared calls" begin
        told() = stats(s).host
        framed() = (copied = told()["copied"]; (copied["frame_in"], copied["frame_out"]))
        fds = settled_fds()
        held = (told()["segments"], told()["leases"], told()["account"]["connections"])
        p = prepare(s, "scale-shift", zeros(8, 5); a = 2, b = 1)
        @test p.inputs == [Strait.TensorSpec("x", Float64, [8, 5])] && p.outputs == [Strait.TensorSpec("y", Float64, [8, 5])]
        before, own_copies = framed(), Strait.client_stats(s).copied_bytes
        x = rand(8, 5)
        for _ in 1:50
            @test p(x) == 2 .* x .+ 1
        end
        @test framed() == before .+ 50 * 320 && Strait.client_stats(s).copied_bytes == own_copies + 50 * 640
        # Fewer rows, views, what lies in a segment.
        kept = fill!(zeros(s, Float64, 8, 5), 3)
        for given in (x[:, 1:2], view(x, 1:3, 2:3), transpose(rand(5, 8)), zeros(8, 0), kept)
            y = zeros(size(given))
            @test p(given) == 2 .* given .+ 1 == call!(y, p, given) && p(x) == 2 .* x .+ 1
        end
        release!(s, kept)
        @test_throws Released p(kept)
        @test (told()["segments"], told()["account"]["connections"]) == (held[1], held[3] + 1)
        # An axis is Julia's own; every type; the kernel's notes.
        for k in 1:2
            prepare(z -> (@test z(x) ≈ zscored(x, k)), s, "zscore", x; axis = k)
        end
        for (_, T) in Strait.DTYPES
            T <: Real || continue
            prepare(s, "cast", fill(0f0, 3); to = T) do cast
                @test cast.outputs[1].type === T && isequal(cast(Float32[0, 1, 3]), T === Bool ? [false, true, true] : T.([0, 1, 3]))
            end
        end
        prepare(s, "clip", 0f0; hi = 3) do clip
            @test clip(7f0)[] === 3f0 && clip(fill(2f0))[] === 2f0
        end
        prepare(s, "filter-finite", zeros(3)) do finite
            found = Strait.invocation(finite, [1.0, NaN, 2.0])
            @test found.outputs.y == [1, 2] && found.notes == ["dropped" => "1"] && finite([1.0, 2.0]) == [1, 2]
        end
        # What is the same for all calls is kept, whatever becomes of it.
        publish!(s, "kept", x)
        kept = prepare(s, "scale-shift", "kept"; a = 3)
        copied = prepare(s, "scale-shift", Strait.Fixed(view(x, :, 1)); a = 3)
        inside = fill!(zeros(s, Float64, 4), 2)
        segment = prepare(s, "scale-shift", Strait.Fixed(inside); a = 3)
        delete!(s, "kept")
        @test isempty(kept.inputs) && kept() == 3 .* x && copied() == 3 .* x[:, 1] && segment() == fill(6.0, 4)
        foreach(close, (kept, copied, segment))
        @test thrown(() -> prepare(s, "scale-shift", Int32[1]), RemoteError).reason == "BAD_INPUT"
        @test thrown(() -> prepare(s, "scale-shift", zeros(20_000)), RemoteError).reason in ("BAD_INPUT", "LIMIT_RESULT_BYTES")
        @test thrown(() -> prepare(s, "no-such", zeros(2)), RemoteError).reason == "KERNEL_NOT_FOUND"
        # Many tasks.
        tasks = [Threads.@spawn([sum(p(fill(Float64(n), 8, 5))) for _ in 1:20]) for n in 1:6]
        @test all(fetch(task) == fill(40.0 * (2n + 1), 20) for (n, task) in enumerate(tasks))
        close(p)
        @test_throws Disconnected p(x)
        release!(s, inside)
        @test soon(() -> (GC.gc(); told()["account"]["connections"] == held[3])) && soon(() -> (GC.gc(); open_fds() == fds))
    end

    @testset "integers arrive exactly" begin
        @test call(s, "clip", [2^53, 2^53 + 1, 2^53 + 2]; hi = 2^53 + 1) == [2^53, 2^53 + 1, 2^53 + 1]
        @test call(s, "clip", [-2^53 - 6, -2^53 - 1]; lo = -(2^53 + 1)) == [-2^53 - 1, -2^53 - 1]
        @test call(s, "clip", [UInt64(2)^63, 0x5]; hi = UInt64(2)^63 - 1) == [UInt64(2)^63 - 1, 5]
    end

    @testset "many tasks at once, and nothing is left behind" begin
        GC.gc()
        held = own()["leases"]
        x = zeros(s, Float64, 100)
        x .= 1:100
        segments = (inline_bytes = 0,)
        round(n, options) = (tasks = [Threads.@spawn(sum(call(s, "scale-shift", x; a = k, options = options))) for k in 1:n]; [fetch(task) for task in tasks])
        @test round(8, segments) == round(8, NamedTuple()) == 5050 .* (1:8)
        settled(n) = collect_until(() -> own()["leases"] <= n)
        @test settled(held + 1)
        counts() = (own()["leases"], open_fds(), count(_ -> true, eachline("/proc/self/maps")))
        GC.gc()
        before = counts()
        for n in 1:200
            call(sum, s, "scale-shift", x; a = n, options = segments)
        end
        @test collect_until(() -> all(counts() .<= before .+ (0, 0, 2)))
        # Without release! the collector does it.
        for n in 1:200
            call(s, "scale-shift", x; a = n, options = segments)
        end
        @test settled(before[1])
    end

    @testset "errors" begin
        x = zeros(s, Float64, 4, 3)
        e = thrown(() -> call(s, "no-such", x), RemoteError)
        @test e.code == "NOT_FOUND" && e.reason == "KERNEL_NOT_FOUND" && !isempty(e.request_id)
        @test thrown(() -> call(s, "clip", x; low = 1), RemoteError).reason == "UNKNOWN_PARAMETER"
        @test thrown(() -> call(s, "cast", x), RemoteError).reason == "MISSING_PARAMETER"
        @test thrown(() -> call(s, "scale-shift", Int32[1]), RemoteError).reason == "BAD_INPUT"
        @test thrown(() -> call(s, "clip"), RemoteError).reason == "MISSING_INPUT"
        @test thrown(() -> call(s, "clip", x; options = (request_id = "mine-7", deadline_ms = 10^9)), RemoteError).request_id == "mine-7"
        publish!(s, "taken", x)
        @test thrown(() -> publish!(s, "taken", [1.0]), RemoteError).reason == "NAME_TAKEN"
        delete!(s, "taken")
        @test length(kernels(s)) >= 5 && kernels(s, "zscore")[1].parameters[1].kind == "axis" && isempty(kernels(s, "no-such"))
        connect(address; renew = false, lease_ms = 30) do short
            y = zeros(short, Float64, 10)
            sleep(0.3)
            @test_throws LeaseExpired call(short, "clip", y)
            @test y == zeros(10) && Strait.ping(short) === nothing
        end
    end

    @testset "the host dies" begin
        x = zeros(s, Float64, 10_000)
        x .= 3
        y = call(s, "scale-shift", x; a = 2)
        p = prepare(s, "scale-shift", zeros(3); a = 2)
        @test Strait.find_tensor(s.connection, y) !== nothing && p(ones(2)) == [2, 2]
        kill(host, 9)
        wait(host)
        @test_throws Disconnected p(ones(2))
        @test_throws Disconnected call(s, "scale-shift", x)
        @test_throws Disconnected stats(s)
        @test_throws NoHost connect(address)
        # What is mapped stays.
        @test all(==(6), y) && all(==(3), x)
        close(s)
    end
end

"A program of this folder in a process of its own."
function program(name, address, threads)
    file = joinpath(@__DIR__, name)
    return setenv(`$(Base.julia_cmd()) --startup-file=no $file $address`, merge(ENV, Dict("JULIA_NUM_THREADS" => string(threads))))
end

@testset "several threads" begin
    with_host() do address, host
        @test success(pipeline(program("threads.jl", address, 2); stderr = stderr))
    end
end

if haskey(ENV, "STRAIT_TEST_PLUGINS")
    @testset "prepared calls that fail and that are ended" begin
        plugin(name) = joinpath(ENV["STRAIT_TEST_PLUGINS"], name)
        with_host(; plugins = [plugin("traps.wasm"), plugin("spins.wasm")]) do address, host
            s = connect(address)
            running() = stats(s).host["running"]
            x = rand(10)
            beside = prepare(s, "scale-shift", x; a = 2)
            traps = prepare(s, "traps/k", x; options = (request_id = "mine-8",))
            for _ in 1:3
                e = thrown(() -> traps(x), RemoteError)
                @test (e.reason, e.request_id) == ("GUEST_TRAP", "mine-8") && e.backtrace !== nothing && beside(x) == 2 .* x
            end
            spins = prepare(s, "spins/k", x)
            overdue = prepare(s, "spins/k", x; options = (deadline_ms = 50,))
            for _ in 1:3
                @test occursin("DEADLINE", thrown(() -> overdue(x), RemoteError).reason)
                task = @async thrown(() -> spins(x), RemoteError)
                @test soon(() -> running() == 1)
                Strait.cancel!(spins)
                @test fetch(task).reason == "CANCELLED" && beside(x) == 2 .* x
                # An interrupt ends the kernel, too.
                task = @async thrown(() -> spins(x), InterruptException)
                @test soon(() -> running() == 1)
                schedule(task, InterruptException(); error = true)
                @test fetch(task) isa InterruptException && soon(() -> running() == 0) && beside(x) == 2 .* x
            end
            # Closed while it runs.
            task = @async thrown(() -> spins(x), Disconnected)
            @test soon(() -> running() == 1)
            close(spins)
            says(fetch(task), "closed by this program")
            @test soon(() -> running() == 0) && beside(x) == 2 .* x
            # So is what belongs to a session that ends.
            other = connect(address)
            spins = prepare(other, "spins/k", x)
            task = @async thrown(() -> spins(x), Disconnected)
            @test soon(() -> running() == 1)
            close(other)
            says(fetch(task), "closed by this program")
            @test soon(() -> running() == 0)
            close(s)
            @test_throws Disconnected beside(x)
        end
    end
    @testset "Ctrl-C" begin
        with_host(; plugins = [joinpath(ENV["STRAIT_TEST_PLUGINS"], "spins.wasm")]) do address, host
            s = connect(address)
            running() = stats(s).host["running"]
            child = open(pipeline(program("interrupted.jl", address, 1); stderr = stderr))
            said = String[]
            for line in eachline(child)
                push!(said, line)
                line == "spins" || continue
                @test soon(() -> running() == 1)
                sleep(0.4)
                kill(child, 2)
            end
            wait(child)
            @test said == [fill("spins", 6); "done"] && success(child)
            close(s)
        end
    end
else
    @info "STRAIT_TEST_PLUGINS is not set: no kernel is interrupted"
end
