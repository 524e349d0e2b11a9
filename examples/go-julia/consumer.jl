# The consumer of the pipeline: maps each result and reduces it in place, with no copy and no allocation.
#
#   JULIA_LOAD_PATH="clients/julia:@stdlib" julia examples/go-julia/consumer.jl [ADDRESS]
#
# Lines on stdin, one for each tensor (Float64 or Float32, any dimensions):
#
#   NAME            a flight to map, to reduce and to delete
#   keep NAME       the same without deleting it
#
# Each is answered by one line on stdout, after the pages were given back:
#
#   done NAME ELEMENTS SUM SQUARES MAP_NS REDUCE_NS
#
# or `error NAME REASON TEXT`; then it goes on. The first line on stdout is `ready`, once everything is compiled. At the
# end of stdin it prints `total RESULTS BYTES REDUCE_NS ALLOCATED GB_PER_S` and exits with 0: ALLOCATED is what Julia
# allocated in all reductions together, and has to be 0. GB_PER_S are bytes over the reductions' own time.

using Strait

"Sum and sum of squares, in one pass over the pages where they lie."
function reduce_in_place(x::Array{T}) where {T<:Union{Float32,Float64}}
    total, squares = 0.0, 0.0
    @inbounds @simd for i in eachindex(x)
        value = Float64(x[i])
        total += value
        squares += value * value
    end
    return total, squares
end

"What a reduction found, stored so that measuring it allocates nothing."
mutable struct Measured
    total::Float64
    squares::Float64
    nanoseconds::Int
end

function measure!(found::Measured, x::Array)
    began = time_ns()
    found.total, found.squares = reduce_in_place(x)
    found.nanoseconds = time_ns() - began
    return nothing
end

# The element type is known from here on, so that the call itself needs no dispatch.
allocated!(found::Measured, x::Array) = @allocated measure!(found, x)

function consume(s, name, found::Measured)
    began = time_ns()
    x = fetch(s, name)
    map_ns = time_ns() - began
    x isa Array{<:Union{Float32,Float64}} || throw(ArgumentError("$name is $(summary(x)); this program reduces Float64 and Float32"))
    allocated = allocated!(found, x)
    @assert allocated == 0 "the reduction of $name allocated $allocated bytes"
    line = "done $name $(length(x)) $(found.total) $(found.squares) $map_ns $(found.nanoseconds)"
    bytes = sizeof(x)
    # Now, and not when the collector runs: the next result takes these pages.
    release!(s, x)
    return line, bytes, allocated
end

function main(arguments)
    s = isempty(arguments) ? connect() : connect(arguments[1])
    found = Measured(0.0, 0.0, 0)
    # Compiled before the first result is timed: the whole way, with tensors of one element.
    for T in (Float64, Float32), dims in ((1,), (1, 1), (1, 1, 1))
        name = "consumer.jl warms up $(getpid())"
        publish!(s, name, ones(T, dims); replace = true)
        consume(s, name, found)
        delete!(s, name)
    end
    println("ready")
    flush(stdout)
    results, bytes, nanoseconds, allocated = 0, 0, 0, 0
    for line in eachline(stdin)
        isempty(line) && continue
        keep = startswith(line, "keep ")
        name = keep ? line[6:end] : line
        try
            answer, size, more = consume(s, name, found)
            keep || delete!(s, name)
            results, bytes, nanoseconds, allocated = results + 1, bytes + size, nanoseconds + found.nanoseconds, allocated + more
            println(answer)
        catch e
            e isa Union{RemoteError,ArgumentError} || rethrow()
            reason = e isa RemoteError ? e.reason : "BAD_INPUT"
            println("error $name $reason ", replace(sprint(showerror, e), '\n' => ' '))
        end
        flush(stdout)
    end
    println("total $results $bytes $nanoseconds $allocated ", round(bytes / max(nanoseconds, 1); digits = 3))
    close(s)
end

main(ARGS)
