# What goes on beside the callers: renewals, the reaper, answers that nobody waits for any more.
#
# Julia throws an interrupt (Ctrl-C) into whatever task ran last. So tasks of ours are often the ones it hits: they hand it
# on to the program's own, and they never end, since an interrupt of a task that has ended ends the process.

mutable struct Background
    lock::ReentrantLock
    idle::Vector{Channel{Any}}         # of workers without a job
end
const BACKGROUND = Background(ReentrantLock(), Channel{Any}[])

"Runs `job` in a task of its own."
function in_background(job)
    jobs = lock(BACKGROUND.lock) do
        isempty(BACKGROUND.idle) ? nothing : pop!(BACKGROUND.idle)
    end
    if jobs === nothing
        jobs = Channel{Any}(1)
        @async work(jobs)
    end
    put!(jobs, job)
    return nothing
end

function work(jobs::Channel{Any})
    while true
        undisturbed() do
            job = take!(jobs)
            try
                job()
            catch e
                e isa InterruptException && rethrow()
                @error "strait: work in the background failed" exception = (e, catch_backtrace())
            end
        end
        lock(() -> push!(BACKGROUND.idle, jobs), BACKGROUND.lock)
    end
end

"`f()`, once more when an interrupt came that was meant for somebody else."
function undisturbed(f)
    while true
        try
            return f()
        catch e
            e isa InterruptException || rethrow()
            hand_on(e)
        end
    end
end

function hand_on(interrupt::InterruptException)
    main = main_task()
    main === nothing || main === current_task() || istaskdone(main) || schedule(main, interrupt; error = true)
    return nothing
end

"The task that somebody at the keyboard means: what the REPL evaluates, if it does, or the program. Julia's own names."
function main_task()
    backend = isdefined(Base, :active_repl_backend) ? Base.active_repl_backend : nothing
    backend === nothing && return isdefined(Base, :roottask) ? Base.roottask : nothing
    return backend.in_eval ? backend.backend_task : nothing
end

"What wakes the reaper (reaper.jl); nothing before the first connection."
const REAPER_BELL = Ref{Union{Nothing,Base.AsyncCondition}}(nothing)

"Wakes the reaper; allowed in a finalizer."
function signal_reaper()
    bell = REAPER_BELL[]
    # The handle is null once the process is ending.
    bell === nothing || bell.handle == C_NULL || ccall(:uv_async_send, Cint, (Ptr{Cvoid},), bell.handle)
    return nothing
end
