# Small tensors in the frames: where they lie there, and what becomes of them. tests/conformance/frames.json has whole frames,
# hostile.jl what is refused.

"The bytes of arrays, each from the next multiple of 64 on."
laid(arrays...) = foldl((bytes, x) -> vcat(bytes, zeros(UInt8, mod(-length(bytes), 64)), reinterpret(UInt8, vec(x))), arrays; init = UInt8[])
placed(dtype, shape, offset, length) = Dict{String,Any}("dtype" => dtype, "shape" => shape, "offset" => offset, "length" => length)

@testset "there and back" begin
    log, payloads = Tuple{Op,Dict{String,Any}}[], Vector{UInt8}[]
    given = Ref{Any}()
    function reply(op, body)
        op == KERNELS && return (OK, done(kernels = DECLARED, more = false))
        op == CREATE && return mapped(holding(tensor("x", "float64", [2, 3], PAGE, 48); writers = "anyone"))
        return op == INVOKE ? given[] : (OK, done())
    end
    answered(payload, places...) = given[] = (OK, done(results = [(port = port, inline = place) for (port, place) in places], notes = []), Cint[], payload)
    with_peer(serve(reply, log, payloads); inline_bytes = 4096) do s, peer
        copied() = Strait.client_stats(s).copied_bytes
        y, n = Float32[1 2 3; 4 5 6], UInt8[7]
        answered(laid(y, n), "y" => placed("float32", [3, 2], 0, 24), "n" => placed("uint8", [], 64, 1), "e" => placed("int16", [0, 2], 65, 0))
        x, mask = [0.5, -1.0], BitMatrix([1 0; 0 1; 1 1])
        i = Strait.invocation(s, "mix", (("x" => x), ("mask-of" => mask), ("third" => 2.5)))
        op, body = log[end]
        @test op == INVOKE && body["inline_bytes"] == 4096
        @test body["inputs"] == Dict{String,Any}("x" => Dict{String,Any}("inline" => placed("float64", [2], 0, 16)),
            "mask-of" => Dict{String,Any}("inline" => placed("bool8", [2, 3], 64, 6)), "third" => Dict{String,Any}("inline" => placed("float64", [], 128, 8)))
        @test payloads[end] == laid(x, collect(mask), [2.5])
        @test keys(i.outputs) == (:y, :n, :e) && i.outputs.y == y && i.outputs.n[] === 0x07 && i.outputs.e == zeros(Int16, 2, 0)
        @test i.outputs.y isa Matrix{Float32} && i.outputs.n isa Array{UInt8,0} && i.outputs.e isa Matrix{Int16}
        @test i.client_copied_bytes == copied() == 30 + 25
        # Nothing of it is the session's.
        @test isempty(s.connection.tensors) && isempty(s.connection.leases.held) && isempty(s.scratch) && count_of(log, CREATE) == 0
        # A Bool of another byte than 0 and 1 is true.
        answered(UInt8[0, 2, 1, 255], "y" => placed("bool8", [2, 2], 0, 4))
        found = call(s, "mix", x)
        @test found == [false true; true true] && reinterpret(UInt8, vec(found)) == [0, 1, 1, 1]

        # Segments go as they are, beside them what is in none.
        inside = zeros(s, Float64, 3, 2)
        call(s, "mix", inside, found)
        @test log[end][2]["inputs"] == Dict{String,Any}("x" => Dict{String,Any}("segment" => "0"^32), "mask-of" => Dict{String,Any}("inline" => placed("bool8", [2, 2], 0, 4)))
        @test payloads[end] == UInt8[0, 1, 1, 1]
        call(s, "mix", inside)
        @test isempty(payloads[end])
        # An array without elements lies somewhere, too.
        call(s, "mix", x, zeros(Int8, 3, 0))
        @test log[end][2]["inputs"]["mask-of"] == Dict{String,Any}("inline" => placed("int8", [0, 3], 64, 0)) && length(payloads[end]) == 64
    end
end

@testset "what is too large for a frame" begin
    log, payloads = Tuple{Op,Dict{String,Any}}[], Vector{UInt8}[]
    function reply(op, body)
        op == KERNELS && return (OK, done(kernels = DECLARED, more = false))
        op == CREATE || return (OK, done(results = [], notes = []))
        given = body["tensors"][1]
        bytes = sizeof(Strait.TYPE_OF[given["dtype"]]) * prod(Int.(given["shape"]))
        return mapped(holding(tensor("x", given["dtype"], given["shape"], PAGE, bytes); writers = "anyone"); lease = count_of(log, CREATE))
    end
    with_peer(serve(reply, log, payloads); inline_bytes = 4096) do s, peer
        framed(x...) = (call(s, "mix", x...); [haskey(input, "inline") for input in (log[end][2]["inputs"]["x"], get(log[end][2]["inputs"], "mask-of", Dict()))])
        @test framed(zeros(512)) == [true, false] && framed(zeros(513)) == [false, false] && framed(zeros(Int8, 4097)) == [false, false]
        @test count_of(log, CREATE) == 2
        # All of them together have the room that the socket leaves.
        s.connection.payload_room = 4096 + 64 + 8
        @test framed(zeros(512), [1.0]) == [true, true] && length(payloads[end]) == 4104
        @test framed(zeros(512), zeros(9)) == [true, true] && framed(zeros(512), zeros(10)) == [true, false]
        @test length(payloads[end]) == 4096
        s.connection.payload_room = 7
        @test framed([1.0]) == [false, false] && framed(Int8[1]) == [true, false] && framed(Int8[]) == [true, false]
        s.connection.payload_room = 4096
        # A range whose bytes are too many to be counted is none that fits; nobody makes a copy of it.
        @test Strait.put_inline!(UInt8[], s, Int64, 1:typemax(Int)) === nothing
        @test Strait.put_inline!(UInt8[], s, Int64, 1:2^61) === nothing
    end
end

@testset "where results are to be" begin
    log = Tuple{Op,Dict{String,Any}}[]
    reply(op, body) = op == KERNELS ? (OK, done(kernels = DECLARED, more = false)) : (OK, done(results = [], notes = []))
    for (host, options, asked) in ((4096, NamedTuple(), 4096), (4096, (inline_bytes = 0,), nothing), (4096, (inline_bytes = 0x10,), 16), (4096, (inline_bytes = 1 << 40,), 1 << 40),
        (4096, (map = false,), nothing), (4096, (map = false, inline_bytes = 5), nothing), (0, NamedTuple(), nothing))
        with_peer(serve(reply, log); inline_bytes = host) do s, peer
            @test call(s, "mix", "flight"; options = options) === nothing
            @test get(log[end][2], "inline_bytes", nothing) === asked
        end
    end
    with_peer(serve(reply, log); inline_bytes = 4096) do s, peer
        before = count_of(log, INVOKE)
        for wrong in (-1, true, 1.5, "5", big(2)^70)
            says(thrown(() -> call(s, "mix", "flight"; options = (inline_bytes = wrong,)), ArgumentError), "inline_bytes is $(repr(wrong))")
        end
        @test count_of(log, INVOKE) == before
    end
    # A WELCOME of an older host says nothing; one that says no number is refused.
    says(thrown(() -> with_peer((s, peer) -> nothing, serve(reply); inline_bytes = "many"), ProtocolError), "inline_bytes")
end
