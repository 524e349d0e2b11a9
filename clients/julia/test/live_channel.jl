# Channels on a real host: the same bits as one call, in two sessions and two processes, and what either end is told.

"The program channels.jl as one end of a channel; `f(child)` is called when a line came."
function with_end(f, address, what; threads = 1)
    file = joinpath(@__DIR__, "channels.jl")
    command = setenv(`$(Base.julia_cmd()) --startup-file=no $file $address $what`, merge(ENV, Dict("JULIA_NUM_THREADS" => string(threads))))
    child = open(pipeline(command; stderr = stderr), "r+")
    try
        f(child)
    finally
        process_running(child) && kill(child, 9)
        wait(child)
        close(child)
    end
end

with_host() do address, host
    s, other = connect(address), connect(address)
    account() = (told = stats(s).host["account"]; (told["connections"], told["bytes"]))
    channels() = stats(s).host["channels"]
    idle = account()
    levels = Strait.TensorSpec(Float64, 4)
    produces(; more...) = prepare_stream(s, "cumsum", levels; options = (channel = (; name = "levels", more...),))

    @testset "the same bits as one call" begin
        for (kernel, given, dims) in (("cumsum", (), (3, 500)), ("scale-shift", (a = 2,), (2, 3, 100)), ("filter-finite", (), (700,)), ("histogram", (bins = 9, lo = -1, hi = 1), (2, 300))), early in (false, true)
            x = randn(dims)
            x[rand(length(x)).<0.1] .= NaN
            right = Strait.invocation(s, kernel, (x = x,), given)
            st = prepare_stream(s, kernel, Strait.TensorSpec(Float64, dims[1:end-1]..., 16); options = (channel = (name = "levels", batches = 3),), given...)
            @test isempty(st.outputs)
            reader = early ? read_channel(other, "levels") : nothing
            writer = @async (foreach(chunk -> chunk!(st, chunk), cut(x)); last!(st))
            reader = something(reader, Some(nothing))
            reader === nothing && (reader = read_channel(other, "levels"))
            @test reader.kernel == kernel
            numbers, ys = Int[], Any[]
            for y in reader
                push!(numbers, reader.number)
                push!(ys, y)
            end
            @test numbers == 1:length(ys) && fetch(writer) === NamedTuple()
            for (port, y) in pairs(right.outputs)
                parts = length(right.outputs) == 1 ? ys : [getproperty(y, port) for y in ys]
                @test same_bits(joined(parts), copy(y))
            end
            @test reader.notes == right.notes == st.notes && !isopen(reader)
            @test thrown(() -> read_channel(other, "levels"), RemoteError).reason == "CHANNEL_NOT_FOUND"
        end
        # Of an iterable, and none of its rows.
        writer = @async collect(stream(s, "cumsum", [Float64[], ones(3), ones(9)]; rows = 4, options = (channel = "levels",)))
        @test soon(() -> !isempty(channels()))
        @test joined(read_channel(collect, other, "levels")) == 1:12 && fetch(writer) == fill(NamedTuple(), 4)
        st = produces()
        writer = @async last!(st)
        @test isempty(collect(read_channel(other, "levels"))) && fetch(writer) === NamedTuple()
    end

    @testset "a full channel holds its producer up and drops nothing" begin
        st = produces(batches = 2)
        reader = read_channel(other, "levels"; automatic = false)
        foreach(_ -> chunk!(st, [1.0]), 1:2)
        third = @async chunk!(st, [1.0])
        sleep(0.2)
        told = channels()[1]
        @test !istaskdone(third) && (told["name"], told["batches"], told["lag_batches"], told["is_read"]) == ("levels", 2, 2, true)
        @test [iterate(reader)[1] for _ in 1:2] == [[1.0], [2.0]]
        sleep(0.1)
        @test !istaskdone(third)
        acknowledge!(reader, 1)
        @test fetch(third) === NamedTuple()
        acknowledge!(reader)
        over = @async last!(st)
        @test collect(reader) == [[3.0]]
        sleep(0.1)
        @test !istaskdone(over)
        acknowledge!(reader)
        @test fetch(over) === NamedTuple()
    end

    @testset "who comes back goes on where it had acknowledged" begin
        st = produces(batches = 2, resume_ms = 60_000)
        writer = @async (foreach(_ -> chunk!(st, [1.0]), 1:6); last!(st))
        @test read_channel(reader -> [iterate(reader)[1][1] for _ in 1:3], other, "levels") == [1, 2, 3]
        # Over another session, from the batch on that was not done with.
        connect(address) do again
            read_channel(again, "levels") do reader
                @test reader.number == 2 && iterate(reader)[1] == [3.0] && reader.number == 3
                acknowledge!(reader)
            end
        end
        @test collect(read_channel(other, "levels")) == [[4.0], [5.0], [6.0]] && fetch(writer) === NamedTuple()
    end

    @testset "names and turns" begin
        st = produces()
        @test thrown(produces, RemoteError).reason == "NAME_TAKEN"
        read_channel(other, "levels") do reader
            e = thrown(() -> read_channel(s, "levels"; request_id = "mine"), RemoteError)
            @test (e.code, e.reason, e.request_id) == ("FAILED_PRECONDITION", "WRONG_STATE", "mine")
        end
        close(st)
        @test thrown(() -> produces(name = "a#b"), RemoteError).reason == "BAD_NAME" && thrown(() -> produces(batches = 0), RemoteError).reason == "BAD_REQUEST"
        @test soon(() -> isempty(channels()))
    end

    @testset "either end is told what became of the other" begin
        # A producer that is killed.
        with_end(address, "produces") do child
            @test readline(child) == "came"
            reader = read_channel(s, "levels")
            @test [iterate(reader)[1] for _ in 1:2] == [[1.0], [2.0]]
            waits = @async thrown(() -> iterate(reader), RemoteError)
            sleep(0.1)
            @test !istaskdone(waits)
            kill(child, 9)
            e = fetch(waits)
            @test (e.code, e.reason) == ("UNAVAILABLE", "PRODUCER_LOST") && !isopen(reader)
        end
        # One that closes its stream: what it had written comes first.
        st = produces()
        chunk!(st, [1.0])
        close(st)
        @test soon(() -> isempty(channels()))
        # A reader that closes its own, and one that is killed.
        for how in (:close, :kill)
            st = produces(batches = 1)
            with_end(address, "reads") do child
                chunk!(st, [1.0])
                @test readline(child) == "came"
                waits = @async thrown(() -> chunk!(st, [1.0]), RemoteError)
                sleep(0.1)
                @test !istaskdone(waits)
                how === :kill ? kill(child, 9) : println(child)
                e = fetch(waits)
                @test (e.code, e.reason, e.details["chunk"]) == ("UNAVAILABLE", "CONSUMER_LOST", 1) && !isopen(st)
            end
        end
        # A kernel that may not keep as many rows as its window has.
        st = prepare_stream(s, "rolling-mean", Strait.TensorSpec(Float64, 4096); window = 10^6, options = (limits = (guest_bytes = 4 << 20,), channel = "levels"))
        writer = @async thrown(() -> foreach(_ -> chunk!(st, ones(4096)), 1:1000), RemoteError)
        reader = read_channel(other, "levels")
        came = Ref(0)
        theirs = thrown(() -> foreach(y -> came[] += length(y), reader), RemoteError)
        mine = fetch(writer)
        @test mine.reason in ("LIMIT_GUEST_BYTES", "KERNEL_FAILED") && (mine.code, mine.reason) == (theirs.code, theirs.reason)
        @test mine.details["chunk"] == theirs.details["chunk"] > 10 && came[] == 4096 * theirs.details["chunk"]
        @test_throws Disconnected iterate(reader)
        # A producer that waited for long enough.
        for is_read in (false, true)
            st = produces(batches = 1, wait_ms = 150)
            reader = is_read ? read_channel(other, "levels") : nothing
            chunk!(st, [1.0])
            @test thrown(() -> chunk!(st, [1.0]), RemoteError).reason == "DEADLINE"
            is_read && @test iterate(reader)[1] == [1.0] && thrown(() -> iterate(reader), RemoteError).details["chunk"] == 1
        end
        # One that is interrupted while it waits.
        st = produces(batches = 1)
        reader = read_channel(other, "levels")
        chunk!(st, [1.0])
        waits = @async thrown(() -> chunk!(st, [1.0]), InterruptException)
        sleep(0.1)
        schedule(waits, InterruptException(); error = true)
        @test fetch(waits) isa InterruptException && iterate(reader)[1] == [1.0]
        @test thrown(() -> iterate(reader), RemoteError).reason in ("CANCELLED", "PRODUCER_LOST")
    end

    @testset "nothing is left" begin
        @test collect_until(() -> account() == idle)
        fds = open_fds()
        for leave in ((st, reader) -> close(reader), (st, reader) -> close(st), (st, reader) -> nothing)
            apart() do
                st = produces()
                reader = read_channel(other, "levels")
                chunk!(st, [1.0])
                iterate(reader)
                leave(st, reader)
            end
            @test collect_until(() -> isempty(channels()) && account() == idle)
        end
        @test collect_until(() -> open_fds() <= fds)
    end
    close(s)
    close(other)

    @testset "several threads" begin
        with_end(address, "both"; threads = 2) do child
            @test readline(child) == "done"
        end
    end
end

# A host that ends says so, or is gone.
with_host() do address, host
    s = connect(address)
    st = prepare_stream(s, "cumsum", Strait.TensorSpec(Float64, 4); options = (channel = "levels",))
    reader = read_channel(s, "levels")
    chunk!(st, [1.0])
    @test iterate(reader)[1] == [1.0]
    waits = @async thrown(() -> iterate(reader), StraitError)
    sleep(0.05)
    kill(host)
    wait(host)
    e = fetch(waits)
    @test e isa Disconnected || e.reason == "PRODUCER_LOST"
    @test_throws Disconnected iterate(reader)
end
