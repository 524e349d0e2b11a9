# What can go wrong between this process and the host.

"""
    StraitError

Everything that the host, or the connection to it, can throw at a caller: [`RemoteError`](@ref),
[`LeaseExpired`](@ref), [`Disconnected`](@ref), [`NoHost`](@ref), [`Forked`](@ref), [`Released`](@ref),
[`MappingError`](@ref), [`ProtocolError`](@ref). A wrong argument that is detected before the host is asked
is an `ArgumentError`, as everywhere in Julia.
"""
abstract type StraitError <: Exception end

"""
    RemoteError

The host refused, or the kernel failed; the connection is fine.

- `code`: the name of a gRPC code, such as `"NOT_FOUND"`
- `reason`: the protocol's stable word, such as `"FLIGHT_NOT_FOUND"`; compare this one
- `message`: what, which, by how much, what to do
- `request_id`: the same as in the host's log
- `backtrace`: the kernel's, if it trapped, else `nothing`
- `details`: anything else the host said
"""
struct RemoteError <: StraitError
    code::String
    reason::String
    message::String
    request_id::String
    backtrace::Union{Nothing,String}
    details::Dict{String,Any}
end

"""
    LeaseExpired

The right to a segment is over, the connection is fine. The array's elements can still be read, but it
can no longer be the input of a call: `fetch` or compute it anew. `request_id` is `"-"` if this side knew without asking.
"""
struct LeaseExpired <: StraitError
    message::String
    request_id::String
end

"""
    Disconnected

The connection is over: the host ended or closed it, or this program did. Arrays stay readable;
everything else needs a new `connect`.
"""
struct Disconnected <: StraitError
    message::String
end

"""
    NoHost

No host answers where one should be.
"""
struct NoHost <: StraitError
    message::String
end

"""
    Forked

The session was made before a fork; its socket and its mapped pages are the parent's (`owner`).
"""
struct Forked <: StraitError
    owner::Int
    here::Int
end

"""
    Released

The array was given back by [`release!`](@ref); it reads as zeros now.
"""
struct Released <: StraitError
    message::String
end

"""
    MappingError

A segment cannot be mapped into this process, or must not be.
"""
struct MappingError <: StraitError
    message::String
end

"""
    ProtocolError

The host said something that the protocol does not allow. After a frame that cannot be read the session is over; an
answer that cannot be right is discarded, and the session goes on. After a wrong reply to the call of a prepared kernel
that prepared kernel is closed.
"""
struct ProtocolError <: StraitError
    message::String
end

function Base.showerror(io::IO, e::RemoteError)
    print(io, "RemoteError: ", e.message, " [", e.code, " ", e.reason, ", request ", e.request_id, "]")
    e.backtrace === nothing || print(io, "\nin the kernel:\n", e.backtrace)
end
Base.showerror(io::IO, e::LeaseExpired) =
    print(io, "LeaseExpired: ", e.message, " [request ", e.request_id, "]")
Base.showerror(io::IO, e::Union{Disconnected,NoHost,Released,MappingError}) =
    print(io, nameof(typeof(e)), ": ", e.message)
Base.showerror(io::IO, e::ProtocolError) = print(io, "ProtocolError: the host broke the protocol: ", e.message,
    "; check that host and client have the same version")
Base.showerror(io::IO, e::Forked) = print(io, "Forked: this session belongs to process ", e.owner,
    ", of which this process (", e.here, ") is a fork; connect again after the fork")
