# Prepared streams: what travels, what is refused, and a host that answers wrongly. live_stream.jl has a real one.

using Strait: CHUNK, LAST

"Rows of two Int16, of which the host said that up to four come in a frame."
const Y2 = (port("y", "int16", [4, 2], 64, 16),)
streamed(fd; outputs = Y2, more...) = plan(fd; outputs = outputs, more...)
rows_payload(values...; shape = (length(values), 2)) = (bytes = vcat(sizes(shape...), reinterpret(UInt8, Int16[n for row in values for n in row])); vcat(bytes, zeros(UInt8, 128 - length(bytes))))
with_stream(test, script; plan = streamed, more...) = with_prepared(test, script; plan = plan, make = prepare_stream, more...)
"Answers each chunk by `reply(op, sequence, payload)`."
answering_chunks(reply) = function (calls)
    while true
        frame = receive(calls)
        frame === nothing && return
        op, sequence, body, payload, fds = frame
        @test op in (CHUNK, LAST) && isempty(body) && isempty(fds) && length(payload) == 256
        foreach(given -> say(calls, given...), reply(op, sequence, payload))
    end
end
is_over(s, st) = !isopen(st) && st.prepared.socket.fd == -1 && isempty(s.connection.call_sockets)

@testset "there and back" begin
    sent = Tuple{Op,Vector{UInt8}}[]
    note = (notes = [(key = "k", text = "t")],)
    replies = Any[s -> [(CHUNK, s, nothing, rows_payload((1, 2))), (CHUNK, s, nothing, rows_payload((3, 4), (5, 6))), (OK, s, nothing, rows_payload())],
        s -> [(OK, s, nothing, rows_payload((7, 8)))], s -> [(OK, s, nothing, rows_payload())], s -> [(OK, s, nothing, rows_payload())],
        s -> [(CHUNK, s, nothing, rows_payload((9, 9))), (OK, s, note, rows_payload((1, 1)))], s -> [(OK, s, nothing, rows_payload())],
        s -> [(CHUNK, s, nothing, rows_payload((1, 2))), (ERROR, s, (; failed_call("GUEST_TRAP")..., details = (chunk = 6,)))]]
    with_stream(answering_chunks((op, s, payload) -> (push!(sent, (op, payload)); popfirst!(replies)(s)))) do s, st, log
        body = [body for (op, body) in log if op == PREPARE][1]
        @test body["stream"] === true && body["deadline_ms"] == 500 && body["inputs"]["x"]["shape"] == [2, 3]
        @test occursin("PreparedStream(mix: x: Float64[3, 2], mask-of: Bool[2] -> y: Int16[2, 4])", repr(st))
        # Five rows are three frames: two, two, and one.
        x, mask = reshape(collect(1.0:15), 3, 5), [true, false, true, true, false]
        before = Strait.client_stats(s)
        y = chunk!(st, x, mask)
        @test y isa Matrix{Int16} && y == [1 3 5 7; 2 4 6 8] && isempty(st.notes)
        @test [op for (op, _) in sent] == [CHUNK, CHUNK, CHUNK]
        for (n, (from, to)) in enumerate(((1, 2), (3, 4), (5, 5)))
            payload, count = sent[n][2], to - from + 1
            @test payload[1:128] == vcat(sizes(count, 3), sizes(count)) && payload[129:128+24count] == reinterpret(UInt8, vec(x[:, from:to])) && payload[193:192+count] == mask[from:to]
        end
        after = Strait.client_stats(s)
        @test after.copied_bytes - before.copied_bytes == 15 * 8 + 5 + 16 && after.calls == before.calls + 1
        # None at all, of what is no dense Array, by port; and the last.
        y = chunk!(st, view(x, :, 1:0); mask_of = BitVector([]))
        @test y isa Matrix{Int16} && size(y) == (2, 0) && sent[end][2][1:128] == vcat(sizes(0, 3), sizes(0))
        @test last!(st, x[:, 1:1], mask[1:1]) == [9 1; 9 1] && st.notes == ["k" => "t"] && sent[end][1] == LAST
        # Another one.
        @test size(last!(st)) == (2, 0) && sent[end][1] == LAST && isempty(st.notes)
        @test sent[end][2][1:128] == vcat(sizes(0, 3), sizes(0)) && Strait.client_stats(s).calls == before.calls + 2
        # Refused before anything is sent.
        frames = length(sent)
        for case in (((x,), "1 inputs", "x, mask-of"), ((Float32.(x), mask), "Float32", "Float64"), ((vec(x), mask), "1 dimensions", "2 were"), ((x, true), "0 dimensions"),
            ((zeros(4, 1), mask), "(4, 1)", "rows of size (3,)"), ((x, "flight"), "cannot be a String"), ((x, [true missing]), "missing"))
            says(thrown(() -> chunk!(st, case[1]...), ArgumentError), case[2:end]...)
            says(thrown(() -> last!(st, case[1]...), ArgumentError), case[2:end]...)
        end
        s.connection.owner += Cint(1)
        @test_throws Forked chunk!(st, x, mask)
        s.connection.owner -= Cint(1)
        @test length(sent) == frames && isopen(st)
        # An error ends it, though rows came before.
        fds = open_fds()
        e = thrown(() -> chunk!(st, x[:, 1:2], mask[1:2]), RemoteError)
        @test e.reason == "GUEST_TRAP" && e.details["chunk"] == 6
        @test is_over(s, st) && open_fds() < fds && count_of(log, CANCEL) == 0
        says(thrown(() -> chunk!(st, x, mask), Disconnected), "the stream of mix is over", "RemoteError")
        says(thrown(() -> last!(st), Disconnected), "over")
        close(st)
        @test Strait.ping(s) === nothing
    end
end

@testset "a wrong reply ends the stream" begin
    good = rows_payload((1, 2))
    wrongs = ("another sequence" => s -> [(OK, s + 1, nothing, good)], "a CHUNK of another sequence" => s -> [(CHUNK, s, nothing, good), (CHUNK, s - 1, nothing, good)], "an OK of another sequence" => s -> [(CHUNK, s, nothing, good), (OK, s + 1, nothing, good)],
        "a CALL" => s -> [(CALL, s, nothing, good)], "a LAST" => s -> [(LAST, s, nothing, good)], "a WELCOME" => s -> [(CHUNK, s, nothing, good), (WELCOME, s)],
        "a short OK" => s -> [(CHUNK, s, nothing, good), (OK, s, nothing, good[1:64])], "a long CHUNK" => s -> [(CHUNK, s, nothing, vcat(good, good))], "no payload" => s -> [(OK, s)], "a CHUNK without" => s -> [(CHUNK, s)],
        "rows beyond the room" => s -> [(CHUNK, s, nothing, rows_payload((1, 2); shape = (5, 2)))], "rows that are huge" => s -> [(OK, s, nothing, rows_payload(; shape = (typemax(Int), 2)))],
        "wider rows" => s -> [(CHUNK, s, nothing, rows_payload((1, 2); shape = (1, 3)))], "narrower rows" => s -> [(CHUNK, s, nothing, good), (OK, s, nothing, rows_payload((1, 2); shape = (2, 1)))],
        "an axis too many" => s -> [(OK, s, nothing, rows_payload((1, 2); shape = (1, 2, 1)))], "notes that are none" => s -> [(OK, s, (notes = 5,), good)], "an error without words" => s -> [(ERROR, s, NamedTuple())],
        "no JSON" => :junk, "descriptors" => :fds, "an end" => :end)
    for (name, wrong) in wrongs
        script = function (calls)
            _, sequence, _, _ = receive(calls)
            if wrong === :junk
                Strait.send_packet(calls.fd, UInt8[1, 2, 3])
            elseif wrong === :fds
                fd = no_memory()
                say(calls, CHUNK, sequence, nothing, good; fds = Cint[fd])
                Strait.close_fd(fd)
            elseif wrong === :end
                say(calls, CHUNK, sequence, nothing, good)
                hang_up(calls)
            else
                foreach(given -> say(calls, given...), wrong(sequence))
            end
            receive(calls)
        end
        with_stream(script) do s, st, log
            held = open_fds()
            e = thrown(() -> chunk!(st, zeros(3, 2), [true, true]), StraitError)
            @test (name, e isa (wrong === :end ? Disconnected : ProtocolError)) == (name, true)
            @test is_over(s, st) && open_fds() <= held - 1
            @test_throws typeof(e) last!(st)
            @test Strait.ping(s) === nothing
        end
    end
    # Rows without bytes that no number can count.
    narrow = fd -> streamed(fd; outputs = (port("y", "int16", [1 << 60, 0], 64, 0),), reply_bytes = 64)
    many = answering_chunks((op, s, payload) -> vcat([(CHUNK, s, nothing, sizes(1 << 60, 0)) for _ in 1:4], [(OK, s, nothing, sizes(0, 0))]))
    with_stream(many; plan = narrow) do s, st, log
        says(thrown(() -> last!(st), ProtocolError), "more rows", "counted")
        @test is_over(s, st)
    end
end

@testset "a wrong OK to the PREPARE of a stream" begin
    for (name, wrong) in ("an input without rows" => fd -> streamed(fd; inputs = (X[1], port("mask-of", "bool8", [], 192, 1))), "no room for any" => fd -> streamed(fd; inputs = (X[1], port("mask-of", "bool8", [0], 192, 0)), request_bytes = 192),
        "an output without rows" => fd -> streamed(fd; outputs = (port("y", "int16", [], 64, 2),)))
        calls, theirs = call_sockets()
        with_peer(serve((op, body) -> op == KERNELS ? (OK, done(kernels = DECLARED, more = false)) : op == PREPARE ? wrong(theirs) : (OK, done()))) do s, peer
            e = thrown(() -> prepare_stream(s, "mix", zeros(3, 2), [true, false]), ProtocolError)
            @test (name, occursin("no rows", e.message)) == (name, true)
            @test isempty(s.connection.call_sockets) && receive(calls) === nothing
            # The same, here: nothing is asked.
            says(thrown(() -> prepare_stream(s, "mix", 1.0, [true]), ArgumentError), "\"x\"", "rows")
            says(thrown(() -> prepare_stream(s, "mix", zeros(3, 0), [true]), ArgumentError), "\"x\"", "(3, 0)")
        end
        Strait.close_fd(calls.fd)
    end
end

@testset "an iterator of chunks" begin
    echo(op, s, payload) = [(OK, s, nothing, rows_payload((payload[1], op == LAST)))]
    x(n) = (zeros(3, n), trues(n))
    with_stream(answering_chunks(echo)) do s, _, log
        prepares = count_of(log, PREPARE)
        @test_throws ArgumentError stream(s, "mix", [x(1)]; rows = 0)
        for (chunk, words) in (zeros(3, 2) => ("1 arrays", "x, mask-of"), (1, [true]) => ("\"x\"", "Int64"), (fill(1.0), [true]) => ("\"x\"", "no dimension"))
            says(thrown(() -> collect(stream(s, "mix", [chunk]; rows = 2)), ArgumentError), words...)
        end
        @test isempty(collect(stream(s, "mix", []; rows = 2))) && count_of(log, PREPARE) == prepares
    end
    # What is prepared is as long as was said, and not as the first chunk.
    calls, theirs = call_sockets()
    log = Tuple{Op,Dict{String,Any}}[]
    host = @async answering_chunks(echo)(calls)
    with_peer(serve((op, body) -> op == KERNELS ? (OK, done(kernels = DECLARED, more = false)) : op == PREPARE ? streamed(theirs) : (OK, done()), log)) do s, peer
        all = stream(s, "mix", [x(1), (x = zeros(3, 2), mask_of = trues(2)), x(3)]; rows = 2)
        @test occursin("ChunkStream(mix, rows = 2)", repr(all)) && count_of(log, PREPARE) == 0
        @test collect(all) == [reshape([1, 0], 2, 1), reshape([2, 0], 2, 1), [2 1; 0 0], reshape([0, 1], 2, 1)]
        @test [body["inputs"]["x"]["shape"] for (op, body) in log if op == PREPARE] == [[2, 3]]
        @test is_over(s, all.stream) && isempty(all.notes)
    end
    fetch(host)
    Strait.close_fd(calls.fd)
end

@testset "a stream that is broken off is over" begin
    # Rows for ever, until the other end is closed.
    function for_ever(calls)
        _, sequence, _, _ = receive(calls)
        while Strait.send_packet(calls.fd, bare_body(Strait.encode_frame(CHUNK, sequence, NamedTuple(); payload = rows_payload((1, 2))))) in (0, Libc.EAGAIN)
            sleep(0.001)
        end
    end
    silent(calls) = (receive(calls); receive(calls))
    interrupt(s, st, task) = schedule(task, InterruptException(); error = true)
    endings = ("an interrupt" => (interrupt, InterruptException), "close" => ((s, st, task) -> close(st), Disconnected), "the session's end" => ((s, st, task) -> close(s), Disconnected))
    for script in (for_ever, silent), (name, (ending, E)) in endings
        with_stream(script) do s, st, log
            failure = Ref{Any}()
            caller = @async try
                chunk!(st, zeros(3, 2), [true, true])
            catch e
                failure[] = e
            end
            @test timedwait(() -> st.prepared.socket.owed, 5.0) === :ok
            sleep(0.05)
            ending(s, st, caller)
            wait(caller)
            @test (name, typeof(failure[])) == (name, E)
            @test is_over(s, st)
            @test_throws Disconnected chunk!(st, zeros(3, 2), [true, true])
            # The host does not look at the socket while a chunk runs.
            isopen(s) && @test timedwait(() -> count_of(log, CANCEL) >= 1, 5.0) === :ok
            isopen(s) && @test [body for (op, body) in log if op == CANCEL][1]["prepared"] == 7
        end
    end
    # What is garbage is closed.
    calls, theirs = call_sockets()
    with_peer(serve((op, body) -> op == KERNELS ? (OK, done(kernels = DECLARED, more = false)) : op == PREPARE ? streamed(theirs) : (OK, done()))) do s, peer
        apart(() -> prepare_stream(s, "mix", zeros(3, 2), [true, false]))
        @test collect_until(() -> isempty(s.connection.call_sockets))
        @test receive(calls) === nothing
    end
    Strait.close_fd(calls.fd)
end
