using Strait.JSON: decode, encode, ParseError

for (text, value) in (
    "null" => nothing, " true " => true, "false\n" => false, "0" => 0, "-0" => 0, "-0.0" => -0.0, "1e-999" => 0.0, "-12" => -12, "9007199254740993" => 2^53 + 1, "-9223372036854775808" => typemin(Int64), "1.5" => 1.5, "1e3" => 1000.0,
    "1E-2" => 0.01, "9223372036854775807" => typemax(Int64), "18446744073709551615" => typemax(UInt64),
    "18446744073709551616" => 1.8446744073709552e19, "\"\"" => "", "\"aé😀\"" => "aé😀", "\"\\u00e9\\ud83d\\ude00\\n\\/\\\\\\\"\"" => "é😀\n/\\\"",
    "[]" => Any[], "[1,[2],{}]" => Any[1, Any[2], Dict{String,Any}()], "{}" => Dict{String,Any}(),
    "{ \"a\" : 1 , \"b\" : [ ] }" => Dict{String,Any}("a" => 1, "b" => Any[]),
)
    @test isequal(decode(text), value)
    @test typeof(decode(text)) == typeof(value)
end

for text in ("", " ", "nul", "tru", "+1", "01", "1.", ".5", "1e", "1e+", "-", "NaN", "Infinity", "'a'", "\"", "\"a", "\"\n\"", "\"\\x\"", "\"\\u12\"",
    "1e999", "-1e999", "1" ^ 400, "\"\\ud800\"", "\"\\ud800\\n\"", "\"\\udc00\"", "\"\\ud800\\ud800\"", "[", "[1", "[1,", "[1,]", "[,]", "[1 2]", "{", "{1:2}", "{\"a\"}", "{\"a\":}", "{\"a\":1,}",
    "{\"a\":1,\"a\":2}", "1 2", "{}x", "[" ^ 100 * "]" ^ 100)
    @test_throws ParseError decode(text)
end
@test_throws ParseError decode(UInt8['"', 0xff, '"'])
says(thrown(() -> decode("[1,?]"), ParseError), "byte 4", "'?'")

for (value, text) in (
    nothing => "null", true => "true", 2^53 + 1 => "9007199254740993", typemin(Int64) => "-9223372036854775808", -0.0 => "-0.0", -3 => "-3", typemax(UInt64) => "18446744073709551615", 0.1 => "0.1", 1.0f0 => "1.0", 1e300 => "1.0e300",
    "a\"\\\n\e é" => "\"a\\\"\\\\\\u000a\\u001b é\"", :name => "\"name\"", [1, 2] => "[1,2]", () => "[]", (1, "x") => "[1,\"x\"]",
    (a = 1, b = Any[]) => "{\"a\":1,\"b\":[]}", Dict("k" => nothing) => "{\"k\":null}", NamedTuple() => "{}",
)
    @test encode(value) == text
end
for value in (NaN, Inf, 1im, missing, [1.0 2.0], "\xff")
    @test_throws ArgumentError encode(value)
end

# What is written is read again.
for value in (5e-324, 1.7976931348623157e308, -0.1, 1 / 3, "\u0000\u007f\u2028", Any[Any[], Dict{String,Any}("" => Any[nothing])])
    @test decode(encode(value)) == value
end
