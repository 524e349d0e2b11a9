# The JSON reader of the comparison, written by hand: Julia has none in its standard library. It reads one flat array of
# numbers and nothing else, straight into a Vector{Float64}: no document tree, no boxed numbers, no second copy. A
# reader of all of JSON is slower, so this favours JSON.

const POWERS_OF_TEN = [10.0^k for k in 0:22]

"""
    parse_numbers!(numbers, text)

Reads a JSON array of numbers from `text`, whose last byte is NUL, into `numbers`, which is resized. Throws an
`ArgumentError` that names the byte if it is none.
"""
function parse_numbers!(numbers::Vector{Float64}, text::Vector{UInt8})
    !isempty(text) && text[end] == 0x00 || throw(ArgumentError("the text does not end in a NUL"))
    count = 0
    at = skip_blanks(text, 1)
    text[at] == UInt8('[') || not_json(text, at, "'['")
    at = skip_blanks(text, at + 1)
    if text[at] != UInt8(']')
        while true
            value, at = parse_number(text, at)
            count += 1
            count <= length(numbers) || resize!(numbers, max(1024, 2count))
            @inbounds numbers[count] = value
            at = skip_blanks(text, at)
            text[at] == UInt8(',') || break
            at = skip_blanks(text, at + 1)
        end
        text[at] == UInt8(']') || not_json(text, at, "',' or ']'")
    end
    at = skip_blanks(text, at + 1)
    at == length(text) || not_json(text, at, "the end")
    return resize!(numbers, count)
end

not_json(text, at, wanted) = throw(ArgumentError("byte $at of the JSON text is $(repr(Char(text[at]))), wanted was $wanted"))

# No index needs a check: no loop goes on after the NUL that ends the text.
function skip_blanks(text, at)
    while @inbounds(text[at]) in (0x20, 0x09, 0x0a, 0x0d)
        at += 1
    end
    return at
end

"The number at a place, correctly rounded, and the place behind it."
function parse_number(text, at)
    begun = at
    negative = @inbounds(text[at]) == UInt8('-')
    at += negative
    digits, scale, from = UInt64(0), 0, at
    while (digit = @inbounds(text[at]) - 0x30) < 0x0a
        digits = 10digits + digit
        at += 1
    end
    at > from || not_json(text, at, "a number")
    if @inbounds(text[at]) == UInt8('.')
        at += 1
        fraction = at
        while (digit = @inbounds(text[at]) - 0x30) < 0x0a
            digits = 10digits + digit
            at += 1
        end
        at > fraction || not_json(text, at, "a digit")
        scale = at - fraction
    end
    exponent = @inbounds(text[at]) | 0x20 == UInt8('e')
    # Both sides of the division are exact then, so it is rounded once.
    if !exponent && at - from <= 18 && digits < UInt64(1) << 53 && scale <= 22
        value = Float64(digits) / @inbounds(POWERS_OF_TEN[scale+1])
        return negative ? -value : value, at
    end
    return GC.@preserve text parse_by_library(text, begun)
end

function parse_by_library(text, at)
    after = Ref{Ptr{UInt8}}(C_NULL)
    value = ccall(:jl_strtod_c, Cdouble, (Ptr{UInt8}, Ptr{Ptr{UInt8}}), pointer(text, at), after)
    behind = Int(after[] - pointer(text)) + 1
    behind > at || not_json(text, at, "a number")
    return value, behind
end
