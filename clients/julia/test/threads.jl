# A program of its own, run by live.jl with two threads: calls from tasks on both, and garbage that either may collect.

using Strait

Threads.nthreads() == 2 || error("$(Threads.nthreads()) threads, not 2")

function until(done, what)
    for _ in 1:500
        GC.gc()
        done() && return
        sleep(0.01)
    end
    error("$what: still not so")
end

"Calls whose results are released, dropped or kept as views for a while, from one task."
function work(s, x, expected)
    kept = Any[]
    for n in 1:60
        # A small result comes in the reply, unless it is not to.
        y = call(s, "scale-shift", x; a = n, options = (isodd(n) ? (inline_bytes = 0,) : NamedTuple()))
        sum(y) == n * expected || error("a wrong sum")
        n % 3 == 0 && release!(s, y)
        n % 5 == 0 && push!(kept, view(y, 1:2))
        n % 20 == 0 && (GC.gc(); empty!(kept))
    end
    sum(call(s, "scale-shift", fill(2.0, 7); a = 3)) == 42 || error("a wrong sum of a copy in a frame")
    sum(call(s, "scale-shift", fill(2.0, 7000); a = 3)) == 42000 || error("a wrong sum of a copy in a segment")
    return nothing
end

function rounds(s, small, large)
    tasks = [Threads.@spawn(work(s, isodd(n) ? small : large, isodd(n) ? 5050 : length(large))) for n in 1:4]
    foreach(wait, tasks)
end

connect(ARGS[1]) do s
    small, large = zeros(s, Float64, 100), zeros(s, Float64, 100_000)
    small .= 1:100
    large .= 1
    own() = stats(s).host["own"]
    counts() = (Strait.client_stats(s).mappings, own()["leases"], own()["segments"], length(readdir("/proc/self/fd")))
    rounds(s, small, large)
    # The two, and idle segments for copies, of which four tasks need at most four.
    until(() -> Strait.client_stats(s).mappings <= 6 && own()["leases"] <= 6, "results were given back")
    before = counts()
    foreach(_ -> rounds(s, small, large), 1:3)
    until(() -> all(counts() .<= before .+ (3, 3, 3, 3)), "no more is held than before")
    until(() -> all(counts()[1:3] .<= 6), "nothing of results is left")
    # A finalizer takes no lock: garbage may be collected by whoever holds one.
    foreach(n -> call(s, "scale-shift", small; a = n, options = (inline_bytes = 0,)), 1:20)
    Strait.locked(() -> lock(() -> lock(GC.gc, Strait.REAPER.lock), s.lock), s.connection)
    until(() -> all(counts()[1:3] .<= 6), "what was found under the locks is given back")
    sum(small) == 5050 && sum(large) == length(large) || error("an input changed")
end
println("done")
