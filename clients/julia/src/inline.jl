# Small tensors, which travel in the frames: an input in its request's payload, a result in its reply's.

"""
Copies the elements that `x` shows into a request's payload, and answers where they lie, as the wire has it; `nothing` if
they are too large for the host or for the rest of the frame.
"""
function put_inline!(payload::Vector{UInt8}, s::Session, ::Type{T}, x::AbstractArray) where {T}
    before = length(payload)
    offset = cld(before, ALIGN_BYTES) * ALIGN_BYTES
    room = min(s.inline_bytes, s.connection.payload_room - offset)
    # A range may be so long that its bytes cannot be counted.
    s.inline_bytes > 0 && length(x) <= fld(room, sizeof(T)) || return nothing
    dense = x isa Array{T} ? x : copy_shown!(Array{T}(undef, size(x)), x)
    resize!(payload, offset + sizeof(dense))
    fill!(view(payload, before+1:offset), 0x00)
    GC.@preserve payload dense unsafe_copyto!(pointer(payload, offset + 1), Ptr{UInt8}(pointer(dense)), sizeof(dense))
    Threads.atomic_add!(s.connection.copied_bytes, sizeof(dense))
    return (dtype = dtype(T), shape = reverse(size(x)), offset = offset, length = sizeof(dense))
end

"The array of a result that came in a reply's payload: memory of its own, like any other array's."
take_inline(c::Connection, payload::Vector{UInt8}, place::Place) = take_inline(c, payload, place, place.spec.type, size(place.spec))

function take_inline(c::Connection, payload::Vector{UInt8}, place::Place, ::Type{T}, dims::Dims{N}) where {T,N}
    return copy_inline!(c, Array{T,N}(undef, dims), payload, place.offset)
end

"Fills an array, all but its first `filled` elements, with those that lie `offset` bytes into what came."
function copy_inline!(c::Connection, array::Array{T}, bytes::Vector{UInt8}, offset::Int, filled::Int = 0) where {T}
    rest = length(array) - filled
    if T === Bool
        # Any byte but 0 is true to the host; Julia's own are 0 and 1.
        foreach(n -> array[filled+n] = bytes[offset+n] != 0x00, 1:rest)
    elseif rest > 0
        GC.@preserve bytes array unsafe_copyto!(Ptr{UInt8}(pointer(array, filled + 1)), pointer(bytes, offset + 1), rest * sizeof(T))
    end
    Threads.atomic_add!(c.copied_bytes, rest * sizeof(T))
    return array
end
