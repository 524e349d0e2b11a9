# The reaper: one task that tidies up for all connections when it is signalled.

struct Reaper
    lock::ReentrantLock
    connections::Set{Connection}
end
const REAPER = Reaper(ReentrantLock(), Set{Connection}())

"From now on a connection's dead arrays are looked for."
function enlist(c::Connection)
    lock(REAPER.lock) do
        push!(REAPER.connections, c)
        # Not when the module is loaded: a process that never connects keeps no handle open.
        if REAPER_BELL[] === nothing
            bell = REAPER_BELL[] = Base.AsyncCondition()
            in_background(() -> reap_for_ever(bell))
        end
    end
    return nothing
end

function reap_for_ever(condition::Base.AsyncCondition)
    while true
        try
            undisturbed(() -> wait(condition))
        catch e
            # The process is ending.
            e isa EOFError || rethrow()
            return nothing
        end
        undisturbed(reap_all)
    end
end

function reap_all()
    for c in lock(() -> collect(REAPER.connections), REAPER.lock)
        try
            close_abandoned!(c)
            quietly(() -> reap!(c))
            quietly(() -> drain!(c))
            over = locked(() -> isempty(c.mapped), c)
            over && c.abandoned[] && finish!(c, Disconnected("the session was garbage"))
            over && c.ending !== nothing && lock(() -> delete!(REAPER.connections, c), REAPER.lock)
        catch e
            e isa InterruptException && rethrow()
            # One connection's trouble must not keep the others' pages mapped.
            @error "strait: a session's mappings could not be tidied up" exception = (e, catch_backtrace())
        end
    end
    return nothing
end
