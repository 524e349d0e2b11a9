"""
    Strait.JSON

JSON as in RFC 8259, and no more than the data socket's frames need.

[`decode`](@ref) reads one value, [`encode`](@ref) writes one. Objects are `Dict{String,Any}`, arrays
`Vector{Any}`, `null` is `nothing`. A number without fraction and exponent is an `Int64`, or a `UInt64`
if it needs that; every other number is a `Float64`, the nearest one. A number beyond `Float64` is refused.
"""
module JSON

"What an integer is read as."
const Whole = Union{Int64,UInt64}

"Nesting beyond this is refused, so that hostile input cannot use up the stack."
const DEPTH_MAX = 64

"""
    ParseError(position, message)

Why bytes are not JSON. `position` counts bytes from 1.
"""
struct ParseError <: Exception
    position::Int
    message::String
end

Base.showerror(io::IO, e::ParseError) = print(io, "no JSON at byte ", e.position, ": ", e.message)

mutable struct Reader
    bytes::Vector{UInt8}
    at::Int
end

fail(r::Reader, message) = throw(ParseError(r.at, message))
peek(r::Reader) = r.at <= length(r.bytes) ? @inbounds(r.bytes[r.at]) : 0x00
ended(r::Reader) = r.at > length(r.bytes)

function blanks!(r::Reader)
    while !ended(r) && peek(r) in (0x20, 0x09, 0x0a, 0x0d)
        r.at += 1
    end
end

"""
    decode(bytes::AbstractVector{UInt8})
    decode(text::AbstractString)

The one value that `bytes` hold. Throws [`ParseError`](@ref), also for an object with a duplicate key,
a string that is not UTF-8, and bytes after the value.
"""
function decode(bytes::AbstractVector{UInt8})
    r = Reader(convert(Vector{UInt8}, bytes), 1)
    found = value!(r, 0)
    blanks!(r)
    ended(r) || fail(r, "more bytes after the value")
    return found
end
decode(text::AbstractString) = decode(Vector{UInt8}(String(text)))

function value!(r::Reader, depth::Int)
    depth <= DEPTH_MAX || fail(r, "nested deeper than $DEPTH_MAX")
    blanks!(r)
    ended(r) && fail(r, "it ends where a value should be")
    c = peek(r)
    c == UInt8('{') && return object!(r, depth)
    c == UInt8('[') && return array!(r, depth)
    c == UInt8('"') && return string!(r)
    (c == UInt8('-') || isdigit8(c)) && return number!(r)
    c == UInt8('t') && return word!(r, "true", true)
    c == UInt8('f') && return word!(r, "false", false)
    c == UInt8('n') && return word!(r, "null", nothing)
    fail(r, "no value begins with $(repr(Char(c)))")
end

isdigit8(c::UInt8) = UInt8('0') <= c <= UInt8('9')

function word!(r::Reader, word::String, meaning)
    for c in codeunits(word)
        peek(r) == c || fail(r, "expected $word")
        r.at += 1
    end
    return meaning
end

function object!(r::Reader, depth::Int)
    found = Dict{String,Any}()
    r.at += 1
    blanks!(r)
    peek(r) == UInt8('}') && (r.at += 1; return found)
    while true
        blanks!(r)
        peek(r) == UInt8('"') || fail(r, "expected a key")
        key = string!(r)
        blanks!(r)
        peek(r) == UInt8(':') || fail(r, "expected ':'")
        r.at += 1
        known = length(found)
        found[key] = value!(r, depth + 1)
        length(found) > known || fail(r, "key $(repr(key)) a second time")
        next!(r, UInt8('}')) || return found
    end
end

function array!(r::Reader, depth::Int)
    found = Any[]
    r.at += 1
    blanks!(r)
    peek(r) == UInt8(']') && (r.at += 1; return found)
    while true
        push!(found, value!(r, depth + 1))
        next!(r, UInt8(']')) || return found
    end
end

"After a member: true if another one follows, false after `closing`."
function next!(r::Reader, closing::UInt8)
    blanks!(r)
    c = peek(r)
    c == UInt8(',') || c == closing || fail(r, "expected ',' or $(repr(Char(closing)))")
    r.at += 1
    return c == UInt8(',')
end

function string!(r::Reader)
    r.at += 1
    from = r.at
    # Most strings have no escape and are one slice.
    while !ended(r) && peek(r) != UInt8('"') && peek(r) != UInt8('\\') && peek(r) >= 0x20
        r.at += 1
    end
    if peek(r) == UInt8('"')
        r.at += 1
        return checked(r, slice(r, from, r.at - 2))
    end
    out = IOBuffer()
    write(out, r.bytes[from:r.at-1])
    while true
        ended(r) && fail(r, "a string without end")
        c = peek(r)
        c < 0x20 && fail(r, "a control character in a string")
        r.at += 1
        if c == UInt8('"')
            return checked(r, String(take!(out)))
        elseif c == UInt8('\\')
            print(out, escape!(r))
        else
            write(out, c)
        end
    end
end

"Bytes as a string, in one copy."
slice(r::Reader, from::Int, to::Int) = GC.@preserve r unsafe_string(pointer(r.bytes, from), to - from + 1)

function checked(r::Reader, text::String)
    isvalid(text) || fail(r, "a string that is no UTF-8")
    return text
end

function escape!(r::Reader)
    c = peek(r)
    r.at += 1
    c == UInt8('n') && return '\n'
    c == UInt8('t') && return '\t'
    c == UInt8('r') && return '\r'
    c == UInt8('b') && return '\b'
    c == UInt8('f') && return '\f'
    c in (UInt8('"'), UInt8('\\'), UInt8('/')) && return Char(c)
    c == UInt8('u') || fail(r, "no escape is written \\$(Char(c))")
    unit = hex!(r)
    0xdc00 <= unit <= 0xdfff && fail(r, "half of a surrogate pair")
    0xd800 <= unit <= 0xdbff || return Char(unit)
    peek(r) == UInt8('\\') || fail(r, "half of a surrogate pair")
    r.at += 1
    peek(r) == UInt8('u') || fail(r, "half of a surrogate pair")
    r.at += 1
    low = hex!(r)
    0xdc00 <= low <= 0xdfff || fail(r, "half of a surrogate pair")
    return Char(0x10000 + ((unit - 0xd800) << 10) + (low - 0xdc00))
end

function hex!(r::Reader)
    unit = UInt32(0)
    for _ in 1:4
        c = peek(r)
        digit = if isdigit8(c)
            c - UInt8('0')
        elseif UInt8('a') <= (c | 0x20) <= UInt8('f')
            (c | 0x20) - UInt8('a') + 0x0a
        else
            fail(r, "expected four hexadecimal digits")
        end
        unit = unit << 4 | digit
        r.at += 1
    end
    return unit
end

function digits!(r::Reader)
    isdigit8(peek(r)) || fail(r, "expected a digit")
    while isdigit8(peek(r))
        r.at += 1
    end
end

function number!(r::Reader)
    from = r.at
    peek(r) == UInt8('-') && (r.at += 1)
    if peek(r) == UInt8('0')
        r.at += 1
    else
        digits!(r)
    end
    whole = true
    if peek(r) == UInt8('.')
        whole = false
        r.at += 1
        digits!(r)
    end
    if peek(r) | 0x20 == UInt8('e')
        whole = false
        r.at += 1
        peek(r) in (UInt8('+'), UInt8('-')) && (r.at += 1)
        digits!(r)
    end
    text = slice(r, from, r.at - 1)
    if whole
        integer = something(tryparse(Int64, text), tryparse(UInt64, text), Some(nothing))
        integer === nothing || return integer
    end
    number = tryparse(Float64, text)
    # Some versions of Julia answer nothing for what is too small, too.
    number === nothing && (number = Float64(parse(BigFloat, text)))
    isfinite(number) || throw(ParseError(from, "a number beyond what a Float64 can hold"))
    return number
end

"""
    encode(value)::String

`value` as JSON on one line. It takes `nothing`, `Bool`, integers, finite floats, strings, symbols,
vectors, tuples, dictionaries and named tuples; throws `ArgumentError` for anything else, and for NaN and
the infinities, which JSON lacks.
"""
encode(value) = sprint(encode, value)

encode(io::IO, ::Nothing) = print(io, "null")
encode(io::IO, value::Bool) = print(io, value)
encode(io::IO, value::Integer) = print(io, string(value))
function encode(io::IO, value::AbstractFloat)
    isfinite(value) || throw(ArgumentError("JSON has no number $value"))
    print(io, Float64(value))
end
encode(io::IO, value::Symbol) = encode(io, String(value))
function encode(io::IO, value::AbstractString)
    isvalid(value) || throw(ArgumentError("$(repr(value)) is no UTF-8"))
    print(io, '"')
    # Most have no character that needs an escape.
    all(c -> c >= 0x20 && c != UInt8('"') && c != UInt8('\\'), codeunits(value)) && return print(io, value, '"')
    for c in value
        if c == '"' || c == '\\'
            print(io, '\\', c)
        elseif c < ' '
            print(io, "\\u", string(UInt32(c); base = 16, pad = 4))
        else
            print(io, c)
        end
    end
    print(io, '"')
end
function encode(io::IO, values::Union{AbstractVector,Tuple})
    print(io, '[')
    for (index, value) in enumerate(values)
        index == 1 || print(io, ',')
        encode(io, value)
    end
    print(io, ']')
end
function encode(io::IO, values::Union{AbstractDict,NamedTuple})
    print(io, '{')
    for (index, (key, value)) in enumerate(pairs(values))
        index == 1 || print(io, ',')
        encode(io, string(key))
        print(io, ':')
        encode(io, value)
    end
    print(io, '}')
end
encode(::IO, value) = throw(ArgumentError("JSON has no word for a $(typeof(value))"))

end
