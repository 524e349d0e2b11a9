# Prepared streams on a real host: the same bits as one call, however the rows are cut, and nothing left behind.

same_bits(a, b) = typeof(a) == typeof(b) && size(a) == size(b) && reinterpret(UInt8, vec(a)) == reinterpret(UInt8, vec(b))
joined(ys) = reduce((a, b) -> cat(a, b; dims = ndims(a)), ys)
"Cuts at random along the last dimension, into chunks of 0 rows, too."
function cut(x::Array)
    n = size(x, ndims(x))
    at = sort(vcat(0, rand(0:n, rand(0:12)), n))
    return [copy(selectdim(x, ndims(x), from+1:to)) for (from, to) in zip(at, at[2:end])]
end

with_host() do address, host
    s = connect(address)
    account() = (told = stats(s).host["account"]; (told["connections"], told["bytes"]))
    idle = account()

    @testset "the same bits as one call" begin
        for (T, dims) in (Float64 => (1000,), Float32 => (3, 500), Float64 => (2, 3, 100)), rows in (64, 100, 7)
            x = T.(randn(dims))
            for (kernel, given) in (("cumsum", ()), ("rolling-mean", (window = 7,)), ("fir", (taps = T[0.25, 0.5, -0.125],)), ("scale-shift", (a = 2,)), ("zscore-running", ()))
                right = call(s, kernel, x; given...)
                chunks = cut(x)
                ys = collect(stream(s, kernel, chunks; rows = rows, given...))
                @test length(ys) == length(chunks) + 1 && all(y -> y isa Array{T,length(dims)}, ys)
                @test same_bits(joined(ys), copy(right))
            end
            right = call(s, "histogram", x; bins = 9, lo = -1, hi = 1)
            ys = stream(collect, s, "histogram", cut(x); rows = rows, bins = 9, lo = -1, hi = 1)
            for port in (:counts, :outside)
                @test same_bits(joined([getproperty(y, port) for y in ys]), copy(getproperty(right, port)))
            end
        end
    end

    @testset "taps by name, views, notes, one stream after another" begin
        taps = Float64[0.5, 0.25, 0.125]
        publish!(s, "taps", taps)
        x = randn(400)
        right = copy(call(s, "fir", x; taps = "taps"))
        @test same_bits(joined(collect(stream(s, "fir", cut(x); taps = "taps", rows = 50))), right)
        delete!(s, "taps")
        prepare_stream(s, "fir", Strait.TensorSpec(Float64, 64); taps = taps) do st
            @test occursin("fir: x: Float64[64]", repr(st)) && st.inputs[1].dims == [64] && isopen(st)
            before = stats(s)
            for _ in 1:3
                @test same_bits(joined([chunk!(st, view(x, 1:300)), chunk!(st, Float64[]), chunk!(st; x = x[301:350]), last!(st, x[351:400])]), right)
            end
            after = stats(s)
            @test after.calls - before.calls == 3 && after.copied_bytes - before.copied_bytes == 3 * 2 * sizeof(x)
        end
        # What the kernel has to say comes at the end.
        finite = stream(s, "filter-finite", [[1.0, NaN], [Inf], [2.0]]; rows = 2)
        @test joined(collect(finite)) == [1, 2] && finite.notes == ["dropped" => "2"] && joined(collect(finite)) == [1, 2]
        @test isempty(collect(stream(s, "cumsum", Vector{Float64}[]; rows = 2)))
        # Bool, and rows without bytes.
        @test joined(collect(stream(s, "cast", [[true, false], Bool[]]; to = Int8, rows = 1))) == Int8[1, 0]
        @test size(joined(collect(stream(s, "scale-shift", [zeros(0, 5), zeros(0, 2)]; rows = 3)))) == (0, 7)
    end

    @testset "errors" begin
        for (reason, ask) in ("UNKNOWN_PARAMETER" => () -> prepare_stream(s, "cumsum", zeros(2); a = 1), "UNSUPPORTED" => () -> prepare_stream(s, "zscore", zeros(2)),
            "KERNEL_NOT_FOUND" => () -> first(stream(s, "no-such", [zeros(2)]; rows = 2)))
            @test (reason, thrown(ask, RemoteError).reason) == (reason, reason)
        end
        prepare_stream(s, "cumsum", Strait.TensorSpec(Float64, 2, 10)) do st
            y = chunk!(st, ones(2, 3))
            for wrong in (ones(3, 3), ones(2), ones(Float32, 2, 3), 1.0, "x")
                @test_throws ArgumentError chunk!(st, wrong)
            end
            # Nothing was sent.
            @test isopen(st) && joined([y, last!(st, ones(2, 1))]) == [1 2 3 4; 1 2 3 4]
        end
        # The host's own error, to a frame of more rows than were prepared, which the client sends only if it is made to.
        prepare_stream(s, "cumsum", Strait.TensorSpec(Float64, 10)) do st
            @test chunk!(st, ones(10)) == 1:10 && chunk!(st, ones(12)) == 11:22
            brought = st.prepared.brought
            brought[1] = Strait.CallTensor{Float64,1}("x", (11,), brought[1].place)
            e = thrown(() -> chunk!(st, ones(11)), RemoteError)
            @test e.reason == "BAD_INPUT" && e.details["chunk"] == 3
            @test !isopen(st) && st.prepared.socket.fd == -1
            says(thrown(() -> last!(st), Disconnected), "the stream of cumsum is over")
        end
        # A chunk that does not fit, in the middle of a loop.
        streamed = stream(s, "cumsum", Any[ones(2, 3), ones(3, 3)]; rows = 10)
        e = thrown(() -> collect(streamed), ArgumentError)
        says(e, "(3, 3)", "(2,)")
        @test !isopen(streamed.stream)
        @test soon(() -> account()[1] == idle[1])
    end

    @testset "what is left early is nowhere" begin
        fds = settled_fds()
        stream(s, "cumsum", [ones(10) for _ in 1:5]; rows = 10) do ys
            for y in ys
                @test y == 1:10
                @test account()[1] == idle[1] + 1
                break
            end
        end
        @test soon(() -> account()[1] == idle[1]) && open_fds() == fds
        # Without a function it ends when it is garbage.
        apart(() -> for y in stream(s, "cumsum", [ones(10) for _ in 1:5]; rows = 10)
            break
        end)
        @test collect_until(() -> account()[1] == idle[1])
        # A source that throws, and a body that does.
        source = Channel(c -> (put!(c, ones(10)); error("no more")))
        streamed = stream(s, "cumsum", source; rows = 10)
        @test_throws Exception collect(streamed)
        @test !isopen(streamed.stream)
        @test_throws ErrorException stream(ys -> (foreach(identity, ys); error("mine")), s, "cumsum", [ones(10)]; rows = 4)
        streamed = stream(s, "cumsum", [ones(10)]; rows = 4)
        iterate(streamed)
        close(streamed)
        @test_throws Disconnected last!(streamed.stream)
        @test soon(() -> (GC.gc(); account() == idle)) && soon(() -> (GC.gc(); open_fds() <= fds))
    end
    close(s)
end
