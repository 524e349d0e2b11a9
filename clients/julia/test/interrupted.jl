# A program of its own, run by live.jl: calls a kernel that never ends, says so, and is interrupted (SIGINT) each time.

Base.exit_on_sigint(false)
using Strait

function interrupted(f)
    try
        f()
    catch e
        e isa InterruptException || rethrow()
        return nothing
    end
    error("nothing interrupted it")
end

function until(done, what)
    began = time()
    while !done()
        # Long before a kernel's deadline.
        time() - began < 15 || error("$what: still not so")
        sleep(0.01)
    end
end

"Renews all leases now, as happens in the background."
function renew_all(s)
    c = s.connection
    Strait.locked(() -> foreach(lease -> lease.due = 0.0, values(c.leases.held)), c)
    Strait.renew_due!(c)
end

connect(ARGS[1]) do s
    x = zeros(s, Float64, 100)
    x .= 1:100
    # Too large for a frame.
    plain = ones(5000)
    for n in 1:4
        # Linux's signal goes to the task that ran last: that is to be one of the package's, once who renews, once the reaper.
        Strait.in_background(() -> (sleep(0.2); isodd(n) ? renew_all(s) : Strait.signal_reaper()))
        println("spins")
        flush(stdout)
        interrupted(() -> isodd(n) ? call(s, "spins/k", x) : call(s, "spins/k", plain))
        until(() -> stats(s).host["running"] == 0, "the kernel ended on the host")
        call(s, "scale-shift", x; a = n) == n .* (1:100) || error("a wrong result after an interrupt")
        until(() -> isempty(s.connection.waiting), "every answer was taken")
    end
    spins, scale = prepare(s, "spins/k", x), prepare(s, "scale-shift", x; a = 2)
    for n in 1:2
        println("spins")
        flush(stdout)
        interrupted(() -> spins(x))
        until(() -> stats(s).host["running"] == 0, "the prepared kernel ended on the host")
        scale(x) == 2 .* (1:100) || error("a wrong result after an interrupt")
    end
end
println("done")
