# Kernels that are prepared: what travels, what is refused, and a host that answers wrongly. live.jl has a real one.

using Strait: PREPARE, CALL

"Two ends of a socket for calls: the peer's, and the one that goes to the session."
function call_sockets()
    ends = zeros(Cint, 2)
    kind = Strait.SOCK_SEQPACKET | Strait.SOCK_NONBLOCK | Strait.SOCK_CLOEXEC
    systemerror("socketpair", ccall(:socketpair, Cint, (Cint, Cint, Cint, Ptr{Cint}), Strait.AF_UNIX, kind, 0, ends) != 0)
    return Peer(ends[1]), ends[2]
end
port(name, dtype, shape, offset, length) = (port = name, dtype = dtype, shape = shape, offset = offset, length = length)
"What is prepared in most of these tests: `x`, two rows of three Float64, and a mask in; `y`, up to four Int16, out."
const X = (port("x", "float64", [2, 3], 128, 48), port("mask-of", "bool8", [2], 192, 2))
const Y = (port("y", "int16", [4], 64, 8),)
plan(fd; inputs = X, outputs = Y, request_bytes = 256, reply_bytes = 128, more...) =
    (OK, (; prepared = 7, request_bytes = request_bytes, inputs = inputs, reply_bytes = reply_bytes, outputs = outputs, request_id = "r", more...), Cint[fd])
sizes(shape...) = collect(reinterpret(UInt8, UInt64[shape..., zeros(Int, 8 - length(shape))...]))
"The payload of an OK with one `y`."
y_payload(values; shape = (length(values),)) = (bytes = vcat(sizes(shape...), reinterpret(UInt8, Int16.(values))); vcat(bytes, zeros(UInt8, 128 - length(bytes))))
say(peer, op, sequence, body = nothing, payload = UInt8[]; fds = Cint[]) =
    (packet = Strait.encode_frame(op, UInt32(sequence), something(body, NamedTuple()); payload = payload); body === nothing && (packet = bare_body(packet)); Strait.send_packet(peer.fd, packet, fds))
"The same frame without a body, where there was `{}`."
bare_body(packet) = (packet[9:12] .= 0x00; vcat(packet[1:48], packet[51:end]))

"A session, what it prepared (by `make`) over a scripted socket, and the log of the connection. `script(calls)` is the socket's host."
function with_prepared(test, script; plan = plan, given = (zeros(3, 2), [true, false]), make = prepare, log = Tuple{Op,Dict{String,Any}}[], answer = (op, body) -> (OK, done()))
    calls, theirs = call_sockets()
    reply(op, body) = op == KERNELS ? (OK, done(kernels = DECLARED, more = false)) : op == PREPARE ? plan(theirs) : answer(op, body)
    host = @async script(calls)
    with_peer(serve(reply, log)) do s, peer
        try
            test(s, make(s, "mix", given...; options = (deadline_ms = 500,)), log)
        finally
            hang_up(calls)
        end
    end
    Strait.close_fd(calls.fd)
    fetch(host)
end
"Answers each call by `reply(sequence, payload)`, the arguments of `say`."
answering(reply) = function (calls)
    while true
        frame = receive(calls)
        frame === nothing && return
        op, sequence, body, payload, fds = frame
        @test op == CALL && isempty(body) && isempty(fds)
        foreach(given -> say(calls, given...), reply(sequence, payload))
    end
end
failed_call(reason) = (code = "INTERNAL", reason = reason, message = "it broke", request_id = "r7")

@testset "there and back" begin
    sent = Vector{UInt8}[]
    replies = Any[s -> [(OK, s, nothing, y_payload([1, -2, 3]))], s -> [(OK, s, (notes = [(key = "k", text = "t")],), y_payload(1:4))],
        s -> [(ERROR, s, failed_call("GUEST_TRAP"))], s -> [(OK, s, nothing, y_payload(Int16[]))], s -> [(OK, s, nothing, y_payload([5, 6]))],
        s -> [(OK, s, nothing, y_payload([5, 6, 7]))], s -> [(OK, s, nothing, y_payload([8]))]]
    with_prepared(answering((sequence, payload) -> (push!(sent, payload); popfirst!(replies)(sequence)))) do s, p, log
        prepared = [body for (op, body) in log if op == PREPARE][1]
        @test prepared["kernel"] == "mix" && prepared["deadline_ms"] == 500
        @test prepared["inputs"] == Dict{String,Any}("x" => Dict{String,Any}("dtype" => "float64", "shape" => [2, 3]), "mask-of" => Dict{String,Any}("dtype" => "bool8", "shape" => [2]))
        @test p.inputs == [Strait.TensorSpec("x", Float64, [3, 2]), Strait.TensorSpec("mask-of", Bool, [2])] && p.outputs == [Strait.TensorSpec("y", Int16, [4])]
        @test isopen(p) && occursin("mix: x: Float64[3, 2]", repr(p))
        x, mask = [1.0 2; 3 4; 5 6], [true, false]
        before = Strait.client_stats(s)
        y = p(x, mask)
        @test y isa Vector{Int16} && y == [1, -2, 3]
        @test sent[end][1:176] == vcat(sizes(2, 3), sizes(2), reinterpret(UInt8, vec(x))) && sent[end][193:194] == [1, 0] && length(sent[end]) == 256
        @test Strait.client_stats(s).copied_bytes - before.copied_bytes == 48 + 2 + 6 && Strait.client_stats(s).calls == before.calls + 1
        # Fewer rows, what is no dense Array, by port.
        found = Strait.invocation(p, view(x, :, 1:1); mask_of = BitVector([true]))
        @test found.outputs == (y = [1, 2, 3, 4],) && found.notes == ["k" => "t"] && found.client_copied_bytes == 24 + 1 + 8
        @test sent[end][1:152] == vcat(sizes(1, 3), sizes(1), reinterpret(UInt8, x[:, 1])) && sent[end][193] == 1 && length(sent[end]) == 256
        e = thrown(() -> p(x, mask), RemoteError)
        @test (e.reason, e.request_id) == ("GUEST_TRAP", "r7")
        # The next one is not concerned; nothing is a size, too.
        @test p(zeros(3, 0), Bool[]) == Int16[] && sent[end][1:128] == vcat(sizes(0, 3), sizes(0))
        into = zeros(Int16, 2)
        @test call!(into, p, x, mask) === into == [5, 6]
        says(thrown(() -> call!(into, p, x, mask), DimensionMismatch), "result", "(3,)", "(2,)")
        @test into == [5, 6] && p(x, mask) == [8]
        # Refused before anything is sent.
        calls = length(sent)
        for case in (((x,), "1 inputs", "x, mask-of"), ((x, mask, x), "3 inputs"), ((Float32.(x), mask), "Float32", "Float64"), ((vec(x), mask), "1 dimensions", "2 were"),
            ((zeros(3, 3), mask), "(3, 3)", "(3, 2)"), ((zeros(4, 1), mask), "(4, 1)"), ((x, "flight"), "cannot be a String"), ((x, [true missing]), "missing"), ((x, true), "0 dimensions"))
            says(thrown(() -> p(case[1]...), ArgumentError), case[2:end]...)
        end
        says(thrown(() -> p(x; y = mask), ArgumentError), "no input \"mask-of\"")
        says(thrown(() -> call!(zeros(2), p, x, mask), ArgumentError), "\"y\"")
        says(thrown(() -> call!((into, into), p, x, mask), ArgumentError), "2 arrays")
        s.connection.owner += Cint(1)
        @test_throws Forked p(x, mask)
        @test_throws Forked close(p)
        s.connection.owner -= Cint(1)
        @test length(sent) == calls && isopen(p)
        close(p)
        @test !isopen(p) && p.socket.fd == -1 && isempty(s.connection.call_sockets)
        says(thrown(() -> p(x, mask), Disconnected), "closed by this program")
        @test isopen(s)
    end
end

@testset "what is the same for all calls" begin
    log = Tuple{Op,Dict{String,Any}}[]
    made(op, body) = op == CREATE ? mapped(holding(tensor("x", "float64", [2], PAGE, 16); writers = "anyone")) : (OK, done())
    one = (port("x", "float64", [], 64, 8),)
    with_prepared(answering((sequence, payload) -> [(OK, sequence, nothing, y_payload([1]))]); log = log, answer = made,
        plan = fd -> plan(fd; inputs = one, request_bytes = 128), given = (("x" => Strait.TensorSpec(Float64), "mask-of" => Strait.Fixed([1.0, 2.0]), "third" => "flight#t"),)) do s, p, _
        body = [body for (op, body) in log if op == PREPARE][1]
        @test body["inputs"]["x"] == Dict{String,Any}("dtype" => "float64", "shape" => []) && body["inputs"]["mask-of"] == Dict{String,Any}("segment" => "0"^32) && body["inputs"]["third"] == "flight#t"
        @test isempty(s.scratch) && Strait.client_stats(s).copied_bytes == 16
        @test collect_until(() -> Strait.client_stats(s).mappings == 0 && count_of(log, RELEASE) == 1)
        @test p(2.5) == [1] && p(x = fill(2.5)) == [1]
    end
end

@testset "a wrong OK to PREPARE" begin
    wrongs = ("no descriptor" => fd -> (Strait.close_fd(fd); plan(fd)[1:2]), "a pipe" => fd -> (Strait.close_fd(fd); plan(no_memory())), "two" => fd -> (OK, plan(fd)[2], Cint[fd, no_memory()]),
        "no number" => fd -> plan(fd; prepared = nothing), "a text" => fd -> plan(fd; prepared = "7"), "no inputs" => fd -> plan(fd; inputs = nothing),
        "an unknown dtype" => fd -> plan(fd; outputs = (port("y", "float65", [1], 64, 8),)), "elsewhere" => fd -> plan(fd; outputs = (port("y", "int16", [4], 0, 8),)),
        "beyond the payload" => fd -> plan(fd; reply_bytes = 64), "more payload than tensors" => fd -> plan(fd; reply_bytes = 192), "more than a frame" => fd -> plan(fd; reply_bytes = 1 << 20),
        "a wrong length" => fd -> plan(fd; outputs = (port("y", "int16", [4], 64, 6),)), "9 axes" => fd -> plan(fd; outputs = (port("y", "int8", ones(Int, 9), 64, 1),), reply_bytes = 128),
        "two of one port" => fd -> plan(fd; inputs = (port("x", "int8", [1], 128, 1), port("x", "int8", [1], 192, 1))))
    for (name, wrong) in wrongs
        calls, theirs = call_sockets()
        held = open_fds() - 2
        with_peer(serve((op, body) -> op == KERNELS ? (OK, done(kernels = DECLARED, more = false)) : op == PREPARE ? wrong(theirs) : (OK, done()))) do s, peer
            e = thrown(() -> prepare(s, "mix", zeros(3, 2), [true, false]), StraitError)
            @test (name, e isa Union{ProtocolError,MappingError}) == (name, true)
            @test isempty(s.connection.call_sockets) && Strait.ping(s) === nothing
        end
        Strait.close_fd(calls.fd)
        # The peer's own end is never closed.
        @test (name, open_fds()) == (name, held + 1)
    end
end

@testset "a wrong reply ends what is prepared" begin
    good = y_payload([1])
    wrongs = ("another sequence" => s -> [(OK, s + 1, nothing, good)], "sequence 0" => s -> [(ERROR, 0, failed_call("X"))], "another op" => s -> [(WELCOME, s, NamedTuple())], "a CALL" => s -> [(CALL, s, nothing, good)],
        "a short payload" => s -> [(OK, s, nothing, good[1:64])], "a long payload" => s -> [(OK, s, nothing, vcat(good, good))], "no payload" => s -> [(OK, s)],
        "an axis too long" => s -> [(OK, s, nothing, y_payload([1]; shape = (5,)))], "a size that is huge" => s -> [(OK, s, nothing, y_payload([1]; shape = (typemax(Int),)))], "an axis too many" => s -> [(OK, s, nothing, y_payload([1]; shape = (1, 1)))],
        "notes that are none" => s -> [(OK, s, (notes = 5,), good)], "an error without words" => s -> [(ERROR, s, NamedTuple())], "no JSON" => :junk, "descriptors" => :fds, "an end" => :end)
    for (name, wrong) in wrongs
        script = function (calls)
            _, sequence, _, _ = receive(calls)
            if wrong === :junk
                Strait.send_packet(calls.fd, UInt8[1, 2, 3])
            elseif wrong === :fds
                fd = no_memory()
                say(calls, OK, sequence, nothing, good; fds = Cint[fd])
                Strait.close_fd(fd)
            elseif wrong === :end
                hang_up(calls)
            else
                foreach(given -> say(calls, given...), wrong(sequence))
            end
            receive(calls)
        end
        with_prepared(script) do s, p, log
            held = open_fds()
            e = thrown(() -> p(zeros(3, 2), [true, true]), StraitError)
            @test (name, e isa (wrong === :end ? Disconnected : ProtocolError)) == (name, true)
            @test !isopen(p) && p.socket.fd == -1 && open_fds() <= held - 1
            @test_throws typeof(e) p(zeros(3, 2), [true, true])
            @test Strait.ping(s) === nothing
        end
    end
end

@testset "no call gets another one's reply" begin
    # The first call is interrupted; its reply comes late, after the CANCEL.
    log = Tuple{Op,Dict{String,Any}}[]
    go = Channel{Nothing}(1)
    replied = Ref(0)
    script = answering() do sequence, payload
        replied[] += 1
        replied[] == 1 && (take!(go); return [(ERROR, sequence, failed_call("CANCELLED"))])
        return [(OK, sequence, nothing, y_payload([replied[]]))]
    end
    with_prepared(script; log = log) do s, p, _
        x, mask = zeros(3, 2), [true, true]
        failure = Ref{Any}()
        caller = @async try
            p(x, mask)
        catch e
            failure[] = e
        end
        @test timedwait(() -> p.socket.owed, 5.0) === :ok
        sleep(0.05)
        schedule(caller, InterruptException(); error = true)
        wait(caller)
        @test failure[] isa InterruptException && isopen(p) && p.socket.owed
        @test timedwait(() -> count_of(log, CANCEL) == 1, 5.0) === :ok
        @test [body for (op, body) in log if op == CANCEL][1]["prepared"] == 7
        # The next call waits for the reply that is owed, and for the CANCEL to be over.
        next = @async p(x, mask)
        sleep(0.05)
        @test !istaskdone(next)
        put!(go, nothing)
        @test fetch(next) == [2] && count_of(log, PING) == 1 && !p.socket.owed
        # A cancel is over before the next call is sent.
        Strait.cancel!(p)
        @test count_of(log, CANCEL) == 2 && p(x, mask) == [3] && count_of(log, PING) == 2
        @test p(x, mask) == [4] && count_of(log, PING) == 2
        # One after another.
        tasks = [@async(p(x, mask)) for _ in 1:5]
        @test sort([fetch(task)[1] for task in tasks]) == 5:9
    end
end

@testset "its end" begin
    waits(calls) = (receive(calls); receive(calls))
    # A call that runs ends with close, and with the session.
    for (ending, word) in (((s, p) -> close(p), "closed by this program"), ((s, p) -> close(s), "session was closed"))
        with_prepared(waits) do s, p, log
            caller = @async thrown(() -> p(zeros(3, 2), [true, true]), Disconnected)
            @test timedwait(() -> p.socket.owed, 5.0) === :ok
            sleep(0.02)
            ending(s, p)
            says(fetch(caller), word)
            @test p.socket.fd == -1 && isempty(s.connection.call_sockets)
            # The host does not look at the socket while a call runs.
            isopen(s) && @test timedwait(() -> count_of(log, CANCEL) == 1, 5.0) === :ok
            says(thrown(() -> p(zeros(3, 2), [true, true]), Disconnected), word)
        end
    end
    # What is garbage is closed.
    calls, theirs = call_sockets()
    with_peer(serve((op, body) -> op == KERNELS ? (OK, done(kernels = DECLARED, more = false)) : op == PREPARE ? plan(theirs) : (OK, done()))) do s, peer
        apart(() -> prepare(s, "mix", zeros(3, 2), [true, false]))
        @test collect_until(() -> isempty(s.connection.call_sockets))
        @test receive(calls) === nothing
    end
    Strait.close_fd(calls.fd)
end
