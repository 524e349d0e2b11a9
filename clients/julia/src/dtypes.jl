# Element types: Julia's own, and the three that it lacks.

"Bits of a significand (the hidden one too), the smallest normal exponent, the largest finite number."
struct Format
    precision::Int
    exponent_min::Int
    largest::Float64
    infinite::Bool
end

for (T, bits, U, precision, exponent_min, largest, infinite, doc) in (
    (:BFloat16, 16, :UInt16, 8, -126, 3.3895313892515355e38, true,
     "The upper half of a `Float32`: its range with 8 significant bits. The wire's `bfloat16`."),
    (:Float8_e4m3fn, 8, :UInt8, 4, -6, 448.0, false,
     "Eight bits, 4 of them significant: up to 448, a NaN, no infinity. The wire's `float8_e4m3fn`."),
    (:Float8_e5m2, 8, :UInt8, 3, -14, 57344.0, true,
     "Eight bits, 3 of them significant: up to 57344, with infinities. The wire's `float8_e5m2`."),
)
    @eval begin
        """
            $($(string(T))) <: AbstractFloat

        $($doc)

        It stores: `$($(string(T)))(x)` rounds to nearest even, `Float32(y)` and `Float64(y)` are exact, and
        arithmetic happens in `Float32`. `reinterpret($($(string(U))), y)` gives the bits.
        """
        primitive type $T <: AbstractFloat $bits end
        bits_type(::Type{$T}) = $U
        format(::Type{$T}) = Format($precision, $exponent_min, $largest, $infinite)
    end
end

"The types that this package brings along."
const NarrowFloat = Union{BFloat16,Float8_e4m3fn,Float8_e5m2}

bits(x::T) where {T<:NarrowFloat} = reinterpret(bits_type(T), x)
frombits(::Type{T}, x::Integer) where {T<:NarrowFloat} = reinterpret(T, x % bits_type(T))
sign_bit(::Type{T}) where {T<:NarrowFloat} = one(bits_type(T)) << (8 * sizeof(T) - 1)

"The bits of +Inf, or of the NaN of a format that has no infinity."
function top_bits(::Type{T}) where {T<:NarrowFloat}
    f = format(T)
    f.infinite ? sign_bit(T) - one(bits_type(T)) << (f.precision - 1) : sign_bit(T) - 0x1
end
"The bits of a quiet NaN."
function nan_bits(::Type{T}) where {T<:NarrowFloat}
    f = format(T)
    f.infinite ? top_bits(T) | one(bits_type(T)) << (f.precision - 2) : top_bits(T)
end

function (::Type{T})(x::Float64) where {T<:NarrowFloat}
    f = format(T)
    sign = signbit(x) ? sign_bit(T) : zero(bits_type(T))
    isnan(x) && return frombits(T, sign | nan_bits(T))
    isinf(x) && return frombits(T, sign | top_bits(T))
    x == 0 && return frombits(T, sign)
    # Scaling by a power of two is exact here, and so is rounding to an integer: rounded once in all.
    spacing = max(exponent(x), f.exponent_min) - (f.precision - 1)
    count = round(ldexp(abs(x), -spacing))
    ldexp(count, spacing) > f.largest && return frombits(T, sign | top_bits(T))
    # Counted in units of the spacing, a number's bits are its count plus those of its binade.
    binade = spacing - (f.exponent_min - (f.precision - 1))
    return frombits(T, sign | (Int(count) + binade << (f.precision - 1)))
end
(::Type{T})(x::Float32) where {T<:NarrowFloat} = T(Float64(x))
(::Type{T})(x::Float16) where {T<:NarrowFloat} = T(Float64(x))
# Over Float64 they would be rounded twice; a Rational or BigFloat that lies that near to a tie may still be.
(::Type{T})(x::Union{Integer,Rational,BigFloat}) where {T<:NarrowFloat} = T(Float64(x))
(::Type{T})(x::T) where {T<:NarrowFloat} = x
(::Type{T})(x::NarrowFloat) where {T<:NarrowFloat} = T(Float64(x))

function BFloat16(x::Float32)
    u = reinterpret(UInt32, x)
    isnan(x) && return frombits(BFloat16, (u >> 16) | 0x0040)
    return frombits(BFloat16, (u + 0x7fff + ((u >> 16) & 1)) >> 16)
end

function Base.Float64(x::T) where {T<:NarrowFloat}
    f = format(T)
    magnitude = Int(bits(x) & ~sign_bit(T))
    negative = bits(x) & sign_bit(T) != 0
    if magnitude >= Int(top_bits(T))
        found = f.infinite && magnitude == Int(top_bits(T)) ? Inf : NaN
        return negative ? -found : found
    end
    binade, low = divrem(magnitude, 1 << (f.precision - 1))
    count = binade == 0 ? low : low + 1 << (f.precision - 1)
    found = ldexp(Float64(count), max(binade, 1) - 1 + f.exponent_min - (f.precision - 1))
    return negative ? -found : found
end
Base.Float32(x::NarrowFloat) = Float32(Float64(x))
Base.Float32(x::BFloat16) = reinterpret(Float32, UInt32(bits(x)) << 16)
Base.Float16(x::NarrowFloat) = Float16(Float64(x))
(::Type{T})(x::NarrowFloat) where {T<:Integer} = T(Float64(x))
Base.Bool(x::NarrowFloat) = Bool(Float64(x))
Base.BigFloat(x::NarrowFloat) = BigFloat(Float64(x))

Base.promote_rule(::Type{<:NarrowFloat}, ::Type{T}) where {T<:Union{Float32,Float64,BigFloat}} = T
Base.promote_rule(::Type{<:NarrowFloat}, ::Type{Float16}) = Float32
Base.promote_rule(::Type{T}, ::Type{<:Integer}) where {T<:NarrowFloat} = T
Base.promote_rule(::Type{BFloat16}, ::Type{<:Union{Float8_e4m3fn,Float8_e5m2}}) = Float32
Base.promote_rule(::Type{Float8_e4m3fn}, ::Type{Float8_e5m2}) = Float32

for operation in (:+, :-, :*, :/)
    @eval Base.$operation(x::T, y::T) where {T<:NarrowFloat} = T($operation(Float32(x), Float32(y)))
end
for relation in (:(==), :<, :<=)
    @eval Base.$relation(x::T, y::T) where {T<:NarrowFloat} = $relation(Float32(x), Float32(y))
end
Base.:-(x::T) where {T<:NarrowFloat} = frombits(T, bits(x) ⊻ sign_bit(T))
Base.abs(x::T) where {T<:NarrowFloat} = frombits(T, bits(x) & ~sign_bit(T))
Base.signbit(x::T) where {T<:NarrowFloat} = bits(x) & sign_bit(T) != 0
Base.isnan(x::NarrowFloat) = isnan(Float64(x))
Base.isinf(x::NarrowFloat) = isinf(Float64(x))
Base.isfinite(x::NarrowFloat) = isfinite(Float64(x))
Base.zero(::Type{T}) where {T<:NarrowFloat} = frombits(T, 0)
Base.one(::Type{T}) where {T<:NarrowFloat} = T(1.0)
Base.floatmax(::Type{T}) where {T<:NarrowFloat} = T(format(T).largest)
Base.floatmin(::Type{T}) where {T<:NarrowFloat} = T(ldexp(1.0, format(T).exponent_min))
Base.eps(::Type{T}) where {T<:NarrowFloat} = T(ldexp(1.0, 1 - format(T).precision))
# An AbstractFloat without `decompose` has no hash.
Base.decompose(x::NarrowFloat) = Base.decompose(Float64(x))
Base.show(io::IO, x::T) where {T<:NarrowFloat} = print(io, nameof(T), '(', Float64(x), ')')

"""
    Strait.DTYPES

The wire's element types and Julia's, as pairs. `bool8` is one byte, true unless it is 0; the complex ones are pairs
(real, imaginary).
"""
const DTYPES = (
    "bool8" => Bool,
    "int8" => Int8, "int16" => Int16, "int32" => Int32, "int64" => Int64,
    "uint8" => UInt8, "uint16" => UInt16, "uint32" => UInt32, "uint64" => UInt64,
    "float16" => Float16, "bfloat16" => BFloat16,
    "float8_e4m3fn" => Float8_e4m3fn, "float8_e5m2" => Float8_e5m2,
    "float32" => Float32, "float64" => Float64,
    "complex64" => ComplexF32, "complex128" => ComplexF64,
)
const TYPE_OF = Dict{String,DataType}(DTYPES)
const DTYPE_OF = Dict{DataType,String}(type => name for (name, type) in DTYPES)

"""
    Strait.dtype(T)::String

The wire's name of the element type `T`. Throws `ArgumentError` if a tensor cannot have it.
"""
function dtype(T::Type)
    found = get(DTYPE_OF, T, nothing)
    found === nothing || return found
    known = join((type for (_, type) in DTYPES), ", ")
    throw(ArgumentError("a tensor's elements cannot be $T; they can be $known: convert the array first"))
end
