# What may be given as an array: each kind is either kept, element for element in Julia's order, or refused by name.

"An array whose indices begin at -1."
struct Shifted{T,N} <: AbstractArray{T,N}
    inside::Array{T,N}
end
Base.size(x::Shifted) = size(x.inside)
Base.axes(x::Shifted) = map(n -> Base.IdentityUnitRange(-1:n-2), size(x.inside))
Base.getindex(x::Shifted{T,N}, at::Vararg{Int,N}) where {T,N} = (checkbounds(x, at...); x.inside[(at .+ 2)...])

"An array that fails when its third element is read."
struct Failing <: AbstractVector{Float64} end
Base.size(::Failing) = (5,)
Base.getindex(::Failing, at::Int) = at == 3 ? error("no third element") : Float64(at)

"What the host is sent of the arrays: their type, shape and elements, in memory's order."
mutable struct Received
    spec::Dict{String,Any}
    fd::Cint                           # the segment's that they were copied to
    inline::Vector{UInt8}              # or the part of a frame
end

function elements(received::Received)
    T, dims = Strait.TYPE_OF[received.spec["dtype"]], Tuple(reverse(Int.(received.spec["shape"])))
    found = Array{T}(undef, dims)
    if haskey(received.spec, "length")
        GC.@preserve found unsafe_copyto!(Ptr{UInt8}(pointer(found)), pointer(received.inline), sizeof(found))
    else
        GC.@preserve found ccall(:pread, Cssize_t, (Cint, Ptr{Cvoid}, Csize_t, Int64), received.fd, pointer(found), sizeof(found), PAGE)
    end
    return found
end

received = Received(Dict{String,Any}(), -1, UInt8[])
log = Tuple{Op,Dict{String,Any}}[]
payloads = Vector{UInt8}[]
lease = Ref(0)
"Puts down what CREATE asks for, and keeps a descriptor of its own to the segment; or what comes in the frame."
function put_down(op, body)
    op == KERNELS && return (OK, done(kernels = DECLARED, more = false))
    if op == INVOKE
        x = body["inputs"]["x"]
        if haskey(x, "inline")
            received.spec = x["inline"]
            received.inline = last(payloads)[received.spec["offset"]+1:received.spec["offset"]+received.spec["length"]]
        end
        return (OK, done(results = [], notes = []))
    end
    op == CREATE || return (OK, done())
    received.spec = body["tensors"][1]
    bytes = sizeof(Strait.TYPE_OF[received.spec["dtype"]]) * prod(Int.(received.spec["shape"]))
    fd, mapping = segment(PAGE + max(bytes, PAGE), [tensor("x", received.spec["dtype"], received.spec["shape"], PAGE, bytes)]; writers = "anyone")
    received.fd < 0 || Strait.close_fd(received.fd)
    received.fd = ccall(:dup, Cint, (Cint,), fd)
    return (OK, leased(lease[] += 1, mapping), Cint[fd])
end

before = open_fds()
# Into segments, and into frames.
for inline_bytes in (0, 1024)
    with_peer(serve(put_down, log, payloads); inline_bytes = inline_bytes) do s, peer
        # Three rows of two columns, to numpy two of three; no two elements are alike.
        m = Float64[1 4; 2 5; 3 6]
        cube = reshape(collect(1.0:24.0), 2, 3, 4)
        kept = (
            m, cube, view(m, 2:3, :), view(m, :, 2), view(m, [3, 1], :), view(cube, :, 2, 3:-1:1), m', transpose(m), adjoint(ComplexF64[1+2im 3; 4 5im]), view(m', 1:2, 2:3),
            PermutedDimsArray(cube, (3, 1, 2)), PermutedDimsArray(view(cube, 1:2, 1:2, :), (2, 3, 1)), reshape(view(cube, :, 1:2, :), 8, 2), reshape(m', 6), reshape(1:6, 3, 2),
            reinterpret(Int64, m), reinterpret(Float64, ComplexF64[1+2im, 3+4im]), reinterpret(UInt8, Float32[1, 2]),
            1:5, 5:-2:1, 0.5:0.25:2, LinRange(0, 1, 7), Base.OneTo(3), UInt8(1):UInt8(9), range(1f0; stop = 2f0, length = 3),
            Bool[1, 0, 1], BitArray([true false; false true; true true]), m .> 2, view(BitVector([1, 0, 0, 1]), 2:4), trues(70),
            Symmetric([1.0 2; 9 3]), Symmetric([1.0 9; 2 3], :L), Diagonal([1.0, 2]), UpperTriangular(m * m'), Tridiagonal([1.0], [2.0, 3], [4.0]), Matrix(1.0I, 2, 2),
            sparse([1, 3], [2, 1], [5.0, 7.0], 3, 2), sparse([1, 3], [2, 1], [5.0, 7.0], 3, 2)', sparsevec([2], [1.5f0], 4), view(sparse([1], [2], [3.0], 2, 2), :, 2), sparse([true false; false true]),
            fill(7.0), fill(true), view(m, 2, 1), view(m, 2), reshape([3.0]), Float16[0.1, Inf, NaN, -0.0], BFloat16[1, 2], Float8_e5m2[1, 3], Int8[-1], UInt16[1 2],
            Union{Missing,Float64}[1.5, NaN, 3.0], Union{Missing,Bool}[true false; false true], view(Union{Nothing,Int32}[1, 2, 3], 2:3), Union{Missing,Nothing,Float32}[1 2; 3 4], fill!(Array{Union{Missing,Float64},0}(undef), 2.5),
            Float64[], zeros(Int8, 0, 3), zeros(3, 0, 2), view(m, 1:0, :), 1:0, falses(0), Union{Missing,Float64}[], sparse(zeros(0, 2)), (1.0:3.0)[1:0]',
        )
        for x in kept
            T = Strait.tensor_type(x)
            expected = Array{T}(undef, size(x))
            copyto!(expected, collect(x))
            # A name is a segment's always.
            for (use, framed) in ((() -> publish!(s, "n", x; replace = true)) => false, (() -> call(s, "mix", x)) => inline_bytes > 0)
                copied = Strait.client_stats(s).copied_bytes
                use()
                found = elements(received)
                @test haskey(received.spec, "length") == framed
                @test typeof(found) === typeof(expected) && isequal(found, expected)
                @test Strait.client_stats(s).copied_bytes - copied == sizeof(expected)
            end
        end

        # Elements in their order, whatever their indices are.
        for x in (Shifted([5.0, 6.0, 7.0]), Shifted([1 2 3; 4 5 6]), Shifted(zeros(0, 2)), view(Shifted([5.0, 6.0, 7.0]), 0:1), Shifted(Union{Missing,Int64}[1, 2]))
            publish!(s, "n", x; replace = true)
            @test elements(received) == (x isa Shifted ? x.inside : [6.0, 7.0])
            @test eltype(elements(received)) == nonmissingtype(eltype(x))
        end

        # A nothing is a null as much as a missing is.
        for (x, words) in (
            [1.0, missing, 3.0] => ("1 of 3 elements", "coalesce", "skipmissing"), [missing 1; 2 missing; 3 4] => ("2 of 6",), Union{Nothing,Float32}[nothing, 1] => ("1 of 2",),
            [missing, missing] => ("2 of 2",), fill(missing) => ("1 of 1",), view([1.0, missing], 2:2) => ("1 of 1",), Shifted([missing, 1]) => ("1 of 2",), [true, missing] => ("1 of 2",),
            Missing[] => ("Missing",), Any[1.0, 2.0] => ("Any", "convert"), Real[1, 2.0] => ("Real",), Number[1] => ("Number",), Any[1.0, missing] => ("Any",), AbstractFloat[1.0] => ("AbstractFloat",),
            Union{Int8,Float64}[Int8(1), 2.0] => ("Union",), Integer[] => ("Integer",), ['a', 'b'] => ("Char",), ["a"] => ("String",), [:a] => ("Symbol",), Int128[1] => ("Int128",), UInt128[1] => ("UInt128",),
            big.([1, 2]) => ("BigInt",), big.([1.0]) => ("BigFloat",), [1 // 2] => ("Rational",), [1 + 2im] => ("Complex{Int64}",), Complex{Float16}[1] => ("Complex{Float16}",), [π] => ("Irrational",),
            [Date(2020)] => ("Date",), [DateTime(2020) missing] => ("1 of 2",), [Second(1)] => ("Second",), [[1.0], [2.0]] => ("Array{Float64,1}",), [(1, 2)] => ("Tuple",), [nothing] => ("1 of 1",), 'a':'c' => ("Char",),
        )
            for use in (() -> publish!(s, "n", x), () -> call(s, "mix", x), () -> call(s, "mix", m, x), () -> call(s, "mix"; x = x))
                says(thrown(use, ArgumentError), words...)
            end
        end
        for x in (missing, nothing, :x, 'c', (1.0, 2.0), big(1), 1 // 2, Date(2020), Dict(1 => 2), Set([1.0]), (n for n in 1:3), sum, big(1.0))
            @test_throws ArgumentError call(s, "mix", x)
            @test_throws ArgumentError call(s, "mix", m, x)
            @test_throws ArgumentError call(s, "mix", ("x" => x,))
        end
        @test_throws ArgumentError publish!(s, "n", 1 // 2)
        @test_throws ErrorException call(s, "mix", Failing())
        @test_throws ErrorException publish!(s, "n", Failing())
        @test_throws ErrorException call(s, "mix", zeros(0, 3), Failing())

        # Nothing of all that is left but the idle segments.
        GC.gc()
        @test collect_until(() -> Strait.client_stats(s).mappings == length(s.scratch))
        @test collect_until(() -> length(s.connection.leases.held) == length(s.scratch))
    end
end
Strait.close_fd(received.fd)
@test collect_until(() -> open_fds() <= before + 2)   # the peers' own ends stay open
