# Times calls of a kernel over 1 KiB: ADDRESS CALLS. See README.md.

using Strait

const ELEMENTS = 128
const WARM_CALLS = 200

"One whole cycle: the kernel, its result read and given back."
function cycle(session, x, i)
    begun = time_ns()
    x[1] = i
    y = call(session, "scale-shift", x; a = 2, b = 1)::Vector{Float64}
    y[1] == 2i + 1 || error("the first element is $(y[1]), expected $(2i + 1)")
    release!(session, y)
    return (time_ns() - begun) / 1e3
end

"A call of what was prepared: an array of this process, and a fresh one back."
function prepared_cycle(scale, x, i)
    begun = time_ns()
    x[1] = i
    y = scale(x)::Vector{Float64}
    y[1] == 2i + 1 || error("the first element is $(y[1]), expected $(2i + 1)")
    return (time_ns() - begun) / 1e3
end

"One line of JSON."
function tell(client, times)
    sort!(times)
    println("{\"client\":\"$client\",\"calls\":$(length(times)),\"p50_us\":$(percentile(times, 50)),\"p99_us\":$(percentile(times, 99))}")
end

"Percentile of sorted times."
percentile(times, of) = times[cld(length(times) * of, 100)]

function main(address, calls)
    connect(address) do session
        x = zeros(session, Float64, ELEMENTS)
        foreach(i -> cycle(session, x, i), 1:WARM_CALLS)
        tell("Julia", [cycle(session, x, i) for i in 1:calls])
        own = zeros(ELEMENTS)
        scale = prepare(session, "scale-shift", own; a = 2, b = 1)
        foreach(i -> prepared_cycle(scale, own, i), 1:WARM_CALLS)
        tell("Julia, prepared", [prepared_cycle(scale, own, i) for i in 1:calls])
        close(scale)
    end
end

length(ARGS) == 2 || (println(stderr, "usage: julia --project=clients/julia small_calls.jl ADDRESS CALLS"); exit(2))
main(ARGS[1], parse(Int, ARGS[2]))
