# Channels: what travels, what is refused, and a host that sends wrongly. live_channel.jl has a real one.

using Strait: STREAM

"What a STREAM is answered: batches of up to four rows of two Int16 (`Y2` of stream.jl)."
channel_of(fd; kernel = "k", outputs = Y2, batch_bytes = 128, first = 1, fds = Cint[fd], more...) =
    (OK, (; channel = "levels", kernel = kernel, outputs = outputs, batch_bytes = batch_bytes, first = first, request_id = "r", more...), fds)
failed_channel = (code = "UNAVAILABLE", reason = "PRODUCER_LOST", message = "it left", request_id = "r", details = (chunk = 7,))
batch!(lane, number, rows...) = say(lane, CHUNK, number % UInt32, nothing, rows_payload(rows...))
over(s, reader) = !isopen(reader) && reader.prepared.socket.fd == -1 && isempty(s.connection.call_sockets)

"A session, the reader of a channel, the host's end of its socket, and the log of the connection."
function with_channel(test; told = channel_of, options...)
    lane, theirs = call_sockets()
    log = Tuple{Op,Dict{String,Any}}[]
    try
        with_peer(serve((op, body) -> op == STREAM ? told(theirs) : (OK, done()), log)) do s, peer
            test(s, read_channel(s, "levels"; options...), lane, log)
        end
    finally
        Strait.close_fd(lane.fd)
    end
end

"Whether that is what is said next on the reader's socket."
function acknowledged(lane, number)
    op, sequence, body, payload, fds = receive(lane)
    return (op, sequence) == (OK, number % UInt32) && isempty(body) && isempty(payload) && isempty(fds)
end
"Closes the host's end, whose descriptor is another file's from then on."
close_now(lane) = (fd = no_memory(); ccall(:dup2, Cint, (Cint, Cint), fd, lane.fd); Strait.close_fd(fd))
silent(lane) = (sleep(0.03); Strait.receive_packet!(lane.buffer, lane.control, lane.fd)[1] == -Libc.EAGAIN)

@testset "batches and acknowledgements" begin
    with_channel(; told = fd -> channel_of(fd; first = 3, more = 1), request_id = "mine") do s, reader, lane, log
        @test bodies(log, STREAM)[1] == Dict{String,Any}("channel" => "levels", "request_id" => "mine")
        @test (reader.kernel, reader.number, isempty(reader.notes), isopen(reader)) == ("k", 2, true, true)
        @test reader.outputs == [TensorSpec("y", Int16, [2, 4])]
        @test occursin("ChannelReader(\"levels\": k -> y: Int16[2, 4], batch 2)", repr(reader))
        batch!(lane, 3, (1, 2), (3, 4))
        batch!(lane, 4, (5, 6))
        y, state = iterate(reader)
        @test y isa Matrix{Int16} && y == [1 3; 2 4] && reader.number == 3 && silent(lane)
        @test iterate(reader, state)[1] == reshape([5, 6], 2, 1) && reader.number == 4
        @test acknowledged(lane, 3) && silent(lane)
        # Before the next one is asked for, and then not again.
        @test acknowledge!(reader) === nothing && acknowledged(lane, 4)
        acknowledge!(reader)
        acknowledge!(reader, 3)
        waits = @async iterate(reader)
        @test silent(lane) && !istaskdone(waits)
        batch!(lane, 5, (7, 8))
        @test fetch(waits)[1] == reshape([7, 8], 2, 1)
        say(lane, LAST, 6, (notes = [(key = "k", text = "t")],))
        # The end is acknowledged at once, and everything is over.
        @test iterate(reader) === nothing && acknowledged(lane, 5) && acknowledged(lane, 6) && receive(lane) === nothing
        @test reader.notes == ["k" => "t"] && reader.number == 5 && over(s, reader)
        @test iterate(reader) === nothing && isempty(collect(reader)) && acknowledge!(reader) === nothing
        close(reader)
        @test Strait.client_stats(s).copied_bytes == 16 && Strait.client_stats(s).calls == 0
        @test Strait.ping(s) === nothing
    end
    # A loop, and a function; without any batch, too.
    with_channel() do s, reader, lane, log
        foreach(n -> batch!(lane, n, (n, n)), 1:5)
        say(lane, LAST, 6)
        @test [(reader.number, y[1]) for y in reader] == [(n, n) for n in 1:5]
        @test all(n -> acknowledged(lane, n), 1:6) && over(s, reader)
    end
    lane, theirs = call_sockets()
    with_peer(serve((op, body) -> op == STREAM ? channel_of(theirs) : (OK, done()))) do s, peer
        say(lane, LAST, 1)
        @test read_channel(collect, s, "levels") == [] && acknowledged(lane, 1) && receive(lane) === nothing
    end
    Strait.close_fd(lane.fd)
    # Numbers go on beyond those of a frame.
    with_channel(; told = fd -> channel_of(fd; first = 2^32 - 1)) do s, reader, lane, log
        foreach(n -> batch!(lane, n, (1, 2)), 2^32-1:2^32+1)
        say(lane, LAST, 2)
        @test [reader.number for _ in reader] == 2^32-1:2^32+1
        @test all(n -> acknowledged(lane, n), 2^32-1:2^32+2)
    end
end

@testset "acknowledged by hand" begin
    with_channel(; automatic = false) do s, reader, lane, log
        foreach(n -> batch!(lane, n, (n, n)), 1:4)
        foreach(_ -> iterate(reader), 1:3)
        @test silent(lane)
        says(thrown(() -> acknowledge!(reader, 4), ArgumentError), "batch 4 has not come", "is 3")
        acknowledge!(reader, 2)
        @test acknowledged(lane, 2)
        foreach(n -> acknowledge!(reader, n), (2, 1, 0))
        iterate(reader)
        say(lane, LAST, 5)
        # The end comes as often as it is asked for, and is acknowledged with the last batch.
        @test iterate(reader) === iterate(reader) === nothing && silent(lane)
        acknowledge!(reader, 3)
        @test acknowledged(lane, 3) && silent(lane)
        acknowledge!(reader)
        @test acknowledged(lane, 5) && receive(lane) === nothing && over(s, reader) && iterate(reader) === nothing
    end
    with_channel(; automatic = false) do s, reader, lane, log
        batch!(lane, 1, (1, 2))
        iterate(reader)
        acknowledge!(reader)
        say(lane, LAST, 2)
        @test iterate(reader) === nothing && acknowledged(lane, 1) && acknowledged(lane, 2) && over(s, reader)
    end
    # It never waits: a host that takes none of them is told with the next one.
    with_channel(; automatic = false) do s, reader, lane, log
        room = Ref(Cint(4096))
        systemerror("setsockopt", ccall(:setsockopt, Cint, (Cint, Cint, Cint, Ref{Cint}, Cuint), reader.prepared.socket.fd, 1, 7, room, 4) != 0)
        for n in 1:100
            batch!(lane, n, (1, 2))
            iterate(reader)
            acknowledge!(reader)
        end
        sent = 0
        while (frame = Strait.receive_packet!(lane.buffer, lane.control, lane.fd)[1]) > 0
            sent += 1
        end
        @test 0 < sent < 100 && acknowledge!(reader) === nothing && acknowledged(lane, 100)
    end
end

@testset "several outputs" begin
    outputs = (port("y", "int16", [4, 2], 128, 16), port("flags-of", "bool8", [3], 192, 3))
    with_channel(; told = fd -> channel_of(fd; outputs = outputs, batch_bytes = 256)) do s, reader, lane, log
        say(lane, CHUNK, 1, nothing, vcat(sizes(0, 2), sizes(3), zeros(UInt8, 64), UInt8[0, 7, 1], zeros(UInt8, 61)))
        say(lane, CHUNK, 2, nothing, vcat(sizes(1, 2), sizes(0), reinterpret(UInt8, Int16[5, 6]), zeros(UInt8, 124)))
        first, second = iterate(reader)[1], iterate(reader)[1]
        @test keys(first) == (:y, Symbol("flags-of")) && size(first.y) == (2, 0) && first[2] == [false, true, true] && first[2] isa Vector{Bool}
        @test second.y == reshape([5, 6], 2, 1) && isempty(second[2])
        close(reader)
    end
end

@testset "a wrong OK to STREAM" begin
    wrongs = ("no descriptor" => fd -> (Strait.close_fd(fd); channel_of(fd; fds = Cint[])), "a pipe" => fd -> (Strait.close_fd(fd); channel_of(no_memory())), "two" => fd -> channel_of(fd; fds = Cint[fd, no_memory()]),
        "no kernel" => fd -> channel_of(fd; kernel = nothing), "a number" => fd -> channel_of(fd; kernel = 5), "no first" => fd -> channel_of(fd; first = nothing), "batch 0" => fd -> channel_of(fd; first = 0),
        "a text" => fd -> channel_of(fd; first = "1"), "half a batch" => fd -> channel_of(fd; first = 1.5), "no outputs" => fd -> channel_of(fd; outputs = nothing), "an unknown dtype" => fd -> channel_of(fd; outputs = (port("y", "float65", [1], 64, 8),)),
        "elsewhere" => fd -> channel_of(fd; outputs = (port("y", "int16", [4, 2], 0, 16),)), "beyond the payload" => fd -> channel_of(fd; batch_bytes = 64), "more than a frame" => fd -> channel_of(fd; batch_bytes = 1 << 20), "no bytes" => fd -> channel_of(fd; batch_bytes = nothing),
        "no rows" => fd -> channel_of(fd; outputs = (port("y", "int16", [], 64, 2),)), "two of one port" => fd -> channel_of(fd; outputs = (port("y", "int8", [1], 128, 1), port("y", "int8", [1], 192, 1)), batch_bytes = 256))
    for (name, wrong) in wrongs
        lane, theirs = call_sockets()
        held = open_fds() - 2
        with_peer(serve((op, body) -> op == STREAM ? wrong(theirs) : (OK, done()))) do s, peer
            e = thrown(() -> read_channel(s, "levels"), StraitError)
            @test (name, e isa Union{ProtocolError,MappingError}) == (name, true)
            @test isempty(s.connection.call_sockets) && Strait.ping(s) === nothing
        end
        Strait.close_fd(lane.fd)
        # The peer's own end is never closed.
        @test (name, open_fds()) == (name, held + 1)
    end
end

@testset "what is no batch ends the reader" begin
    good = rows_payload((1, 2))
    wrongs = ("the batch before" => n -> [(CHUNK, n - 1, nothing, good)], "the batch behind" => n -> [(CHUNK, n + 1, nothing, good)], "another LAST" => n -> [(LAST, n + 1)], "an ERROR to something" => n -> [(ERROR, n, failed_channel)],
        "an OK" => n -> [(OK, n)], "rows in an OK" => n -> [(OK, n, nothing, good)], "a CALL" => n -> [(CALL, n, nothing, good)], "a WELCOME" => n -> [(WELCOME, n)], "a LAST with rows" => n -> [(LAST, n, nothing, good)],
        "a short CHUNK" => n -> [(CHUNK, n, nothing, good[1:64])], "a long CHUNK" => n -> [(CHUNK, n, nothing, vcat(good, good))], "no payload" => n -> [(CHUNK, n)], "a CHUNK with a body" => n -> [(CHUNK, n, (notes = [],), good)],
        "no rows" => n -> [(CHUNK, n, nothing, rows_payload(; shape = (0, 2)))], "rows beyond the room" => n -> [(CHUNK, n, nothing, rows_payload((1, 2); shape = (5, 2)))], "rows that are huge" => n -> [(CHUNK, n, nothing, rows_payload(; shape = (typemax(Int), 2)))],
        "wider rows" => n -> [(CHUNK, n, nothing, rows_payload((1, 2); shape = (1, 3)))], "narrower rows" => n -> [(CHUNK, n, nothing, rows_payload((1, 2); shape = (1, 1)))], "an axis too many" => n -> [(CHUNK, n, nothing, rows_payload((1, 2); shape = (1, 2, 1)))],
        "notes that are none" => n -> [(LAST, n, (notes = 5,))], "an error without words" => n -> [(ERROR, 0, NamedTuple())], "no JSON" => :junk, "descriptors" => :fds)
    for (name, wrong) in wrongs, before in (0, 2)
        with_channel() do s, reader, lane, log
            held = open_fds()
            foreach(n -> (batch!(lane, n, (n, n)); iterate(reader)), 1:before)
            if wrong === :junk
                Strait.send_packet(lane.fd, UInt8[1, 2, 3])
            elseif wrong === :fds
                fd = no_memory()
                say(lane, CHUNK, before + 1, nothing, good; fds = Cint[fd])
                Strait.close_fd(fd)
            else
                foreach(given -> say(lane, given...), wrong(before + 1))
            end
            e = thrown(() -> iterate(reader), ProtocolError)
            @test (name, over(s, reader), open_fds()) == (name, true, held - 1)
            @test_throws ProtocolError iterate(reader)
            @test_throws ProtocolError acknowledge!(reader)
            @test reader.number == before && all(n -> acknowledged(lane, n), 1:before) && receive(lane) === nothing
            @test Strait.ping(s) === nothing
        end
    end
end

@testset "its end" begin
    for before in (0, 1), unread in (false, true)
        with_channel() do s, reader, lane, log
            held = open_fds()
            foreach(n -> batch!(lane, n, (1, 2)), 1:before)
            foreach(_ -> iterate(reader), 1:before)
            unread && acknowledge!(reader)
            say(lane, ERROR, 0, failed_channel)
            # Linux tells of what was not read before it hands on what was sent.
            unread ? close_now(lane) : hang_up(lane)
            e = thrown(() -> iterate(reader), RemoteError)
            @test (e.code, e.reason, e.details["chunk"]) == ("UNAVAILABLE", "PRODUCER_LOST", 7)
            @test over(s, reader) && open_fds() == held - 1
            says(thrown(() -> iterate(reader), Disconnected), "the channel \"levels\" has failed")
            @test_throws Disconnected acknowledge!(reader)
            @test Strait.ping(s) === nothing
        end
    end
    # The host's end, without a word; and who closes it, while somebody waits and while nobody does.
    ends = ("the host" => (s, reader, lane) -> hang_up(lane), "close" => (s, reader, lane) -> close(reader), "the session" => (s, reader, lane) -> close(s))
    words = Dict("the host" => "the host ended it", "close" => "closed by this program", "the session" => "session was closed")
    for (name, ending) in ends, waits in (false, true)
        with_channel() do s, reader, lane, log
            batch!(lane, 1, (1, 2))
            iterate(reader)
            caller = waits ? (@async thrown(() -> iterate(reader), Disconnected)) : nothing
            waits && @test acknowledged(lane, 1)
            sleep(0.02)
            ending(s, reader, lane)
            waits && says(fetch(caller), words[name])
            says(thrown(() -> iterate(reader), Disconnected), words[name])
            @test (name, over(s, reader)) == (name, true)
            isopen(s) && (close(reader); @test Strait.ping(s) === nothing)
        end
    end
    # What is garbage is closed.
    lane, theirs = call_sockets()
    with_peer(serve((op, body) -> op == STREAM ? channel_of(theirs) : (OK, done()))) do s, peer
        apart(() -> read_channel(s, "levels"))
        @test collect_until(() -> isempty(s.connection.call_sockets))
        @test receive(lane) === nothing
    end
    Strait.close_fd(lane.fd)
    with_channel() do s, reader, lane, log
        s.connection.owner += Cint(1)
        for use in (() -> iterate(reader), () -> acknowledge!(reader), () -> close(reader))
            @test_throws Forked use()
        end
        s.connection.owner -= Cint(1)
        @test isopen(reader)
    end
end

@testset "an interrupt ends the wait and nothing else" begin
    with_channel() do s, reader, lane, log
        batch!(lane, 1, (1, 2))
        iterate(reader)
        for _ in 1:3
            caller = @async thrown(() -> iterate(reader), InterruptException)
            # Other tasks go on.
            sleep(0.02)
            schedule(caller, InterruptException(); error = true)
            @test fetch(caller) isa InterruptException && isopen(reader) && reader.number == 1
        end
        batch!(lane, 2, (3, 4))
        @test iterate(reader)[1] == reshape([3, 4], 2, 1) && reader.number == 2
        @test acknowledged(lane, 1) && silent(lane)
    end
    # Before the channel is there: the answer comes all the same, and leaves nothing.
    lane, theirs = call_sockets()
    go = Channel{Nothing}(1)
    with_peer(serve((op, body) -> op == STREAM ? (take!(go); channel_of(theirs)) : (OK, done()))) do s, peer
        caller = @async thrown(() -> read_channel(s, "levels"), InterruptException)
        sleep(0.05)
        schedule(caller, InterruptException(); error = true)
        @test fetch(caller) isa InterruptException
        put!(go, nothing)
        @test receive(lane) === nothing && Strait.ping(s) === nothing && isempty(s.connection.waiting)
    end
    Strait.close_fd(lane.fd)
end

@testset "a producer's channel" begin
    for (channel, body) in ("levels" => Dict("name" => "levels"), (name = "levels",) => Dict("name" => "levels"),
        (name = SubString("levels"), batches = 3, wait_ms = 1.5, resume_ms = 60_000) => Dict("name" => "levels", "batches" => 3, "wait_ms" => 2, "resume_ms" => 60_000),
        (name = "levels", batches = nothing, resume_ms = 0) => Dict("name" => "levels"))
        log = Tuple{Op,Dict{String,Any}}[]
        make(s, kernel, given...; options) = prepare_stream(s, kernel, given...; options = (; options..., channel = channel))
        script = answering_chunks((op, sequence, payload) -> [(OK, sequence, op == LAST ? (notes = [(key = "k", text = "t")],) : nothing)])
        with_prepared(script; plan = fd -> plan(fd; outputs = (), reply_bytes = 0), make = make, log = log) do s, st, _
            @test bodies(log, PREPARE)[1]["channel"] == body && bodies(log, PREPARE)[1]["stream"] === true
            @test isempty(st.outputs) && chunk!(st, zeros(3, 3), [true, true, false]) === NamedTuple()
            # Nothing can follow.
            @test last!(st) === NamedTuple() && st.notes == ["k" => "t"] && is_over(s, st)
            @test_throws Disconnected chunk!(st, zeros(3, 1), [true])
            close(st)
        end
    end
    with_peer(serve((op, body) -> op == KERNELS ? (OK, done(kernels = DECLARED, more = false)) : (OK, done()))) do s, peer
        for (channel, words) in (5 => ("Int64",), (batches = 3,) => ("it has a name",), (name = "l", size = 1) => ("no option size",), (name = "l", wait_ms = 0) => ("wait_ms",), (name = "l", resume_ms = -1) => ("resume_ms",))
            says(thrown(() -> prepare_stream(s, "mix", zeros(3, 2), [true]; options = (channel = channel,)), ArgumentError), words...)
        end
        says(thrown(() -> prepare(s, "mix", zeros(3, 2), [true]; options = (channel = "l",)), ArgumentError), "prepare_stream")
    end
end
