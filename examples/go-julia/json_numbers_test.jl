# julia json_numbers_test.jl

using Test

include("json_numbers.jl")

parsed(text) = parse_numbers!(Float64[], vcat(Vector{UInt8}(text), 0x00))

@testset "JSON numbers" begin
    @test parsed("[]") == []
    @test parsed(" [ 1 ,\n-2.5,\t3e2 ,0.001, -0, 1E-3]\n") == [1, -2.5, 300, 0.001, -0.0, 0.001]
    @test signbit(parsed("[-0.0]")[1])
    # Each way through the reader, against Julia's own.
    for text in ("0.1", "123456789012345678", "9007199254740993", "0.30000000000000004", "0.49999999999999994",
        "1.7976931348623157e308", "5e-324", "0.0000000000000000000001", "0.00000000000000000000001234", "12345678901234567890123")
        @test parsed("[$text]") == [parse(Float64, text)]
    end
    for number in (rand(1000) .- 0.5, exp.(100 .* randn(1000)))
        @test parsed("[" * join(number, ",") * "]") == number
    end
    for text in ("", "1", "[", "[1", "[1,", "[1,]", "[,1]", "[1 2]", "[1]]", "[1] x", "[-]", "[.5]", "[1.]", "[1.,2]", "[nan]", "[\"1\"]", "[1e]")
        @test_throws ArgumentError parsed(text)
    end
end
