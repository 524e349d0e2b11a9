using Strait: bits, frombits, dtype

@test sizeof(BFloat16) == 2 && sizeof(Float8_e4m3fn) == 1 && sizeof(Float8_e5m2) == 1
@test length(Strait.DTYPES) == 17
@test all(((name, T),) -> dtype(T) == name && isbitstype(T), Strait.DTYPES)
says(thrown(() -> dtype(Int128), ArgumentError), "Int128", "Float64")
says(thrown(() -> dtype(Union{Missing,Float64}), ArgumentError), "Missing")

# Every number is exact in Float64 and comes back from it; every NaN stays one, with its sign.
for (T, U) in ((BFloat16, UInt16), (Float8_e4m3fn, UInt8), (Float8_e5m2, UInt8))
    back(u) = bits(T(Float64(frombits(T, u))))
    @test all(u -> isnan(frombits(T, u)) ? isnan(frombits(T, back(u))) && back(u) >> (8sizeof(T) - 1) == u >> (8sizeof(T) - 1) : back(u) == u,
        typemin(U):typemax(U))
    @test all(u -> isequal(Float32(frombits(T, u)), Float32(Float64(frombits(T, u)))), typemin(U):typemax(U))
end

# Against the formats' own definitions.
values(T, U) = Float64[Float64(frombits(T, u)) for u in typemin(U):typemax(U)]
e4m3, e5m2 = values(Float8_e4m3fn, UInt8), values(Float8_e5m2, UInt8)
@test e4m3[0x7e+1] == 448 && isnan(e4m3[0x7f+1]) && e4m3[0x01+1] == 2.0^-9 && e4m3[0x08+1] == 2.0^-6 && e4m3[0x38+1] == 1
@test e5m2[0x7b+1] == 57344 && e5m2[0x7c+1] == Inf && isnan(e5m2[0x7d+1]) && e5m2[0x01+1] == 2.0^-16 && e5m2[0x3c+1] == 1
@test e5m2[0xfc+1] == -Inf && signbit(e4m3[0x80+1])

"The nearest finite number of a table, ties to the even bits; a definition to hold the conversion against."
function nearest(table, x)
    finite = [u for u in 0:length(table)÷2-1 if isfinite(table[u+1])]
    distance = minimum(u -> abs(table[u+1] - x), finite)
    best = [u for u in finite if abs(table[u+1] - x) == distance]
    return length(best) == 1 ? best[1] : first(filter(iseven, best))
end
for (T, table, largest) in ((Float8_e4m3fn, e4m3, 448.0), (Float8_e5m2, e5m2, 57344.0))
    middles = [(table[u] + table[u+1]) / 2 for u in 1:length(table)÷2-1 if isfinite(table[u+1])]
    for x in vcat(middles, nextfloat.(middles), prevfloat.(middles), 0.3, 1.7, 200.0, largest)
        @test bits(T(x)) == nearest(table, x)
        @test bits(T(-x)) == nearest(table, x) | 0x80
    end
end
# Half a step above the largest is a tie with a number that is not there; beyond it there is NaN or infinity.
@test Float8_e4m3fn(464.0) == Float8_e4m3fn(448.0) && isnan(Float8_e4m3fn(464.1)) && isnan(Float8_e4m3fn(Inf)) && isnan(Float8_e4m3fn(-1e300))
@test Float8_e5m2(61439.9) == Float8_e5m2(57344.0) && isinf(Float8_e5m2(61440.0)) && Float64(Float8_e5m2(-Inf)) == -Inf
@test iszero(Float8_e4m3fn(2.0^-10)) && Float64(Float8_e4m3fn(nextfloat(2.0^-10))) == 2.0^-9

# BFloat16: the short way over Float32 and the general one over Float64 agree on every upper half.
agree(u) = bits(BFloat16(reinterpret(Float32, u))) == bits(BFloat16(Float64(reinterpret(Float32, u))))
@test all(high -> all(low -> (u = UInt32(high) << 16 | low; isnan(reinterpret(Float32, u)) ? isnan(BFloat16(reinterpret(Float32, u))) : agree(u)),
        (0x0000, 0x0007, 0x7fff, 0x8000, 0x8001, 0xffff)), 0x0000:0xffff)
@test bits(BFloat16(1.0f0 + 2.0f0^-8)) == 0x3f80 && bits(BFloat16(1.0f0 + 3 * 2.0f0^-8)) == 0x3f82
@test bits(BFloat16(1 + 2.0^-8 + 2.0^-40)) == 0x3f81
@test isinf(BFloat16(floatmax(Float32))) && bits(BFloat16(reinterpret(Float32, 0x7f800001))) == 0x7fc0

# As numbers.
x = BFloat16(1.5)
@test x + x == BFloat16(3) && x * 2 == BFloat16(3) && x + 1.5f0 === 3.0f0 && x / Float16(2) === 0.75f0 && -x == BFloat16(-1.5) && abs(-x) == x
@test x < BFloat16(2) && x == 1.5 && hash(x) == hash(1.5) && zero(BFloat16) == 0 && one(BFloat16) == 1 && Int(BFloat16(3)) == 3
@test sum(fill(BFloat16(1), 8)) == 8 && maximum(BFloat16[1, 3, 2]) == 3 && Float32.(BFloat16[1, 2]) == [1, 2]
@test isnan(BFloat16(NaN)) && Float64(floatmax(BFloat16)) == Float64(frombits(BFloat16, 0x7f7f)) && Float64(eps(BFloat16)) == 2.0^-7
@test repr(x) == "BFloat16(1.5)" && reinterpret(UInt16, x) == 0x3fc0
