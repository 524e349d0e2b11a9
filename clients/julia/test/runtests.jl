# JULIA_LOAD_PATH="clients/julia:@stdlib" julia clients/julia/test/runtests.jl
# With STRAIT_BIN=<the host's program> also against a real host.

using Strait
using Dates: Date, DateTime, Day, Second
using LinearAlgebra: Adjoint, Diagonal, Symmetric, Transpose, Tridiagonal, UpperTriangular, I
using SparseArrays: sparse, sparsevec
using Test

include("peer.jl")

@testset "Strait" begin
    @testset "json" begin include("json.jl") end
    @testset "dtypes" begin include("dtypes.jl") end
    @testset "wire" begin include("wire.jl") end
    @testset "leases" begin include("leases.jl") end
    @testset "session" begin include("session.jl") end
    @testset "arrays" begin include("arrays.jl") end
    @testset "a hostile host" begin include("hostile.jl") end
    @testset "inline" begin include("inline.jl") end
    @testset "prepared" begin include("prepared.jl") end
    @testset "streams" begin include("stream.jl") end
    @testset "channels" begin include("channel.jl") end
    @testset "local hosts" begin include("local.jl") end
    if haskey(ENV, "STRAIT_BIN")
        @testset "live" begin include("live.jl") end
        @testset "live streams" begin include("live_stream.jl") end
        @testset "live channels" begin include("live_channel.jl") end
    else
        @info "STRAIT_BIN is not set: nothing is tested against a real host"
    end
end
