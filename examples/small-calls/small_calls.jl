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

"Percentile of sorted times."
percentile(times, of) = times[cld(length(times) * of, 100)]

function main(address, calls)
    connect(address) do session
        x = zeros(session, Float64, ELEMENTS)
        foreach(i -> cycle(session, x, i), 1:WARM_CALLS)
        times = sort!([cycle(session, x, i) for i in 1:calls])
        println("{\"client\":\"Julia\",\"calls\":$calls,\"p50_us\":$(percentile(times, 50)),\"p99_us\":$(percentile(times, 99))}")
    end
end

length(ARGS) == 2 || (println(stderr, "usage: julia --project=clients/julia small_calls.jl ADDRESS CALLS"); exit(2))
main(ARGS[1], parse(Int, ARGS[2]))
