# What one session holds, and when each lease is to be renewed. No clock, no lock and no connection: whoever calls says
# what time it is, in seconds, and lets one task in at a time.

"A session's right to a segment."
mutable struct Lease
    life::Float64                      # seconds
    due::Float64                       # when to renew; Inf while that is under way or not wanted
    gone::Union{Nothing,String}        # why it is over
end

struct Leases
    held::Dict{UInt64,Lease}
    ended::Vector{UInt64}              # to be released
    renew::Bool
end
Leases(renew::Bool) = Leases(Dict(), UInt64[], renew)

"One RENEW or RELEASE with this many ids of 20 digits stays below the limit of a frame's body."
const LEASES_MAX = 2000
"A host that grants very short leases is not asked more often than this (seconds)."
const RENEW_INTERVAL_MIN = 0.005

"Seconds from the grant of a lease of so many seconds to its renewal."
renew_interval(life::Float64) = max(life / 2, RENEW_INTERVAL_MIN)

"A lease is granted, or has a new life. Answers when to renew it; Inf for never."
function hold!(leases::Leases, id::UInt64, life::Float64, now::Float64)
    due = leases.renew ? now + renew_interval(life) : Inf
    leases.held[id] = Lease(life, due, nothing)
    return due
end

"The host gave them a new life. Answers when the first of them is to be renewed; what is over meanwhile stays over."
function renewed!(leases::Leases, ids::Vector{UInt64}, life::Float64, now::Float64)
    alive = filter(id -> why_gone(leases, id) === nothing, ids)
    return foldl((first, id) -> min(first, hold!(leases, id, life, now)), alive; init = Inf)
end

"Why a lease is over; nothing while it is not."
function why_gone(leases::Leases, id::UInt64)
    lease = get(leases.held, id, nothing)
    return lease === nothing ? "lease $id is over" : lease.gone
end

"The host says that a lease is over."
function gone!(leases::Leases, id::UInt64, why::String)
    lease = get(leases.held, id, nothing)
    lease === nothing && return nothing
    lease.gone, lease.due = why, Inf
    return nothing
end

"Takes a lease off the books. It is to be released, unless the host ended it."
function end!(leases::Leases, id::UInt64)
    lease = pop!(leases.held, id, nothing)
    lease === nothing || lease.gone !== nothing || push!(leases.ended, id)
    return nothing
end

"What is to be released, in parts that fit a frame."
function take_ended!(leases::Leases)
    taken = copy(leases.ended)
    empty!(leases.ended)
    return [collect(part) for part in Iterators.partition(taken, LEASES_MAX)]
end

"""
What is to be renewed now: lives, and leases that one RENEW with that life has room for; and when to ask again. Nothing
is answered twice before `renewed!`.
"""
function due!(leases::Leases, now::Float64)
    by_life = Dict{Float64,Vector{UInt64}}()
    next = Inf
    for (id, lease) in leases.held
        # Half of the waiting time early still saves a frame for each neighbour in time.
        if lease.due <= now + renew_interval(lease.life) / 2
            lease.due = Inf
            push!(get!(Vector{UInt64}, by_life, lease.life), id)
        else
            next = min(next, lease.due)
        end
    end
    due = [(life, collect(part)) for (life, ids) in by_life for part in Iterators.partition(sort!(ids), LEASES_MAX)]
    return due, next
end
