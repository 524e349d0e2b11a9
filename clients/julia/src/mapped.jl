# Mapped segments and the arrays over them: from the reply that grants one until its arrays are dead.

"""
    map_reply!(c, mapping, lease, fd, writable)

Maps a segment and makes the arrays of its tensors, in their order. `fd` is closed, or kept if the segment is to be written.
"""
function map_reply!(c::Connection, mapping::Mapping, lease::UInt64, fd::Cint, writable::Bool)
    arrays = Any[]
    address = C_NULL
    try
        check_seals(fd, mapping, writable)
        # An array without elements needs no pages, and could not keep any (all of them may be one object).
        if any(place -> place.bytes > 0, mapping.places)
            address = map_fd(fd, mapping.bytes, writable)
            foreach(place -> writable ? make_huge!(c, address, place) : make_bools!(c, address, place, fd), mapping.places)
        end
        mapped = Mapped(address, mapping.bytes, mapping, lease, writable ? fd : Cint(-1), 0,
            Threads.Atomic{Int}(0), falses(length(mapping.places)), false)
        for (index, place) in enumerate(mapping.places)
            push!(arrays, array!(c, mapped, index, place.spec.type, Tuple(place.spec.dims)))
        end
        if mapped.arrays == 0
            address == C_NULL || unmap(address, mapping.bytes)
            close_fd(fd)
            locked(() -> end!(c.leases, lease), c)
            signal_reaper()
        else
            writable || close_fd(fd)
            locked(c) do
                push!(c.mapped, mapped)
                c.mapped_bytes += mapped.bytes
            end
        end
    catch
        # No array is handed out, so nothing can look at the pages any more.
        locked(c) do
            address == C_NULL || filter!(entry -> entry.second[1].address != address, c.tensors)
            end!(c.leases, lease)
        end
        address == C_NULL || unmap(address, mapping.bytes)
        close_fd(fd)
        signal_reaper()
        rethrow()
    end
    return arrays
end

"Linux has to vouch for what the host says of a segment."
function check_seals(fd::Cint, mapping::Mapping, writable::Bool)
    writable || mapping.writers in ("none", "host", "worker") || throw(MappingError(
        "segment $(mapping.segment) can still be written to (writers: $(mapping.writers)); it has to be published first"))
    seals = file_seals(fd)
    # Without SHRINK a shorter file would turn reads into SIGBUS.
    kept = seals >= 0 && seals & F_SEAL_SHRINK != 0
    frozen = seals & (mapping.writers == "none" ? F_SEAL_WRITE : F_SEAL_WRITE | F_SEAL_FUTURE_WRITE) != 0
    kept && (writable || frozen) || throw(MappingError(
        "segment $(mapping.segment) is said to have the writers $(repr(mapping.writers)), and its descriptor $(seals < 0 ? "is no sealed memory" : "has the seals $seals"): somebody could still change it"))
    return nothing
end

"Large tensors to fill are born in huge pages: nobody has written to them yet."
function make_huge!(c::Connection, address::Ptr{Cvoid}, place::Place)
    place.bytes >= HUGE_MIN_BYTES || return nothing
    Threads.atomic_add!(c.huge_bytes, back_with_huge_pages!(address + place.offset, place.bytes))
    return nothing
end

"""
`bool8` is true in any byte but 0; a `Bool` of Julia's with another byte than 0 and 1 reads as its lowest bit. Where there
are such bytes their pages are replaced by private ones, which are counted as copied.
"""
function make_bools!(c::Connection, address::Ptr{Cvoid}, place::Place, fd::Cint)
    place.spec.type === Bool && place.bytes > 0 || return nothing
    bytes = unsafe_wrap(Array, Ptr{UInt8}(address + place.offset), place.bytes)
    from = findfirst(>(0x01), bytes)
    from === nothing && return nothing
    begun = (place.offset + from - 1) & -PAGE_BYTES
    map_private_over(address, begun, place.offset + place.bytes - begun, fd) do
        for n in from:length(bytes)
            # A page without one is only read, and stays the segment's.
            bytes[n] > 0x01 && (bytes[n] = 0x01)
        end
    end
    Threads.atomic_add!(c.copied_bytes, length(bytes) - from + 1)
    return nothing
end

"The object whose death means that nothing refers to an array's elements any more."
@static if VERSION >= v"1.11"
    # A `reshape` shares the Memory and not the Array.
    storage(array::Array) = array.ref.mem
else
    storage(array::Array) = array
end

function array!(c::Connection, mapped::Mapped, index::Int, ::Type{T}, dims::Dims{N}) where {T,N}
    place = mapped.mapping.places[index]
    place.bytes == 0 && return Array{T,N}(undef, dims)
    start = mapped.address + place.offset
    array = unsafe_wrap(Array, Ptr{T}(start), dims)
    locked(c) do
        c.tensors[UInt(start)] = (mapped, index)
        mapped.usable[index] = true
        mapped.arrays += 1
    end
    deaths, all_deaths = mapped.deaths, c.deaths
    finalizer(storage(array)) do _
        Threads.atomic_add!(deaths, 1)
        Threads.atomic_add!(all_deaths, 1)
        signal_reaper()
    end
    return array
end

"""
The segment that `array` is the tensor of, and its number in it; `nothing` if it is none of this session's, or has other
dimensions or elements than the tensor has. Throws [`Released`](@ref).
"""
function find_tensor(c::Connection, array::Array{T}) where {T}
    isbitstype(T) && !isempty(array) || return nothing
    found = locked(() -> get(c.tensors, UInt(pointer(array)), nothing), c)
    found === nothing && return nothing
    mapped, index = found
    mapped.usable[index] || throw(Released("the array was released and reads as zeros; fetch or compute it anew"))
    spec = mapped.mapping.places[index].spec
    return spec.type === T && Tuple(spec.dims) == size(array) ? found : nothing
end
find_tensor(::Connection, ::AbstractArray) = nothing

"""
Gives an array's segment back now. Its addresses stay valid and read as zeros until it is collected.
"""
function release_tensor!(c::Connection, mapped::Mapped, index::Int)
    locked(c) do
        mapped.usable[index] = false
        any(mapped.usable) && return nothing
        mapped.released && return nothing
        map_zeros_over(mapped.address, mapped.bytes)
        give_up!(c, mapped)
    end
    return nothing
end

"Ends a segment's lease and closes its descriptor: its pages are not mapped any more."
function give_up!(c::Connection, mapped::Mapped)
    mapped.released && return nothing
    mapped.released = true
    c.mapped_bytes -= mapped.bytes
    end!(c.leases, mapped.lease)
    mapped.fd < 0 || close_fd(mapped.fd)
    mapped.fd = Cint(-1)
    return nothing
end

"Unmaps the segments whose arrays are all dead, and releases what is to be released."
function reap!(c::Connection)
    # In a forked child nothing is mapped there, or something else of its own by now.
    getpid_now() == c.owner || return nothing
    deaths = c.deaths[]
    leases = locked(c) do
        if deaths != c.reaped
            c.reaped = deaths
            for mapped in [mapped for mapped in c.mapped if mapped.deaths[] >= mapped.arrays]
                for place in mapped.mapping.places
                    delete!(c.tensors, UInt(mapped.address) + UInt(place.offset))
                end
                delete!(c.mapped, mapped)
                unmap(mapped.address, mapped.bytes)
                give_up!(c, mapped)
            end
        end
        taken = take_ended!(c.leases)
        return c.ending === nothing ? taken : empty(taken)
    end
    for part in leases
        tell(c, RELEASE, (leases = part,))
    end
    return nothing
end

"""
Looks for dead arrays once much is mapped: the garbage collector counts an array over mapped pages as a few bytes, so a
loop of large results would otherwise never make it run.
"""
function relieve!(c::Connection)
    c.mapped_bytes < c.collect_at && return nothing
    for full in (false, true)
        GC.gc(full)
        reap!(c)
        c.mapped_bytes < c.collect_at && break
    end
    c.collect_at = max(COLLECT_BYTES_MIN, 2 * c.mapped_bytes)
    return nothing
end
