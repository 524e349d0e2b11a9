"""
Tensors in memory that is shared with a strait host, and sandboxed kernels over them, without a copy.

```julia
using Strait
s = connect()
x = zeros(s, Float64, 1000, 1000)    # an Array inside shared memory
x .= rand.()
y = call(s, "zscore", x; axis = 1)   # an Array over the result's pages
```

[`connect`](@ref), [`connect_local`](@ref), [`call`](@ref), [`prepare`](@ref), [`stream`](@ref), [`read_channel`](@ref), [`kernels`](@ref), [`publish!`](@ref), `fetch(session, name)`, `delete!(session, name)`,
`zeros(session, T, dims...)`, `similar(session, x)`, [`release!`](@ref), [`stats`](@ref). Errors: [`StraitError`](@ref).

Linux on x86-64, the same machine as the host; nothing but Julia's standard library.
"""
module Strait

using FileWatching: FDWatcher, poll_fd

@static if !(Sys.islinux() && Sys.ARCH === :x86_64)
    error("Strait needs Linux on x86-64; this is $(Sys.KERNEL) on $(Sys.ARCH)")
end

export connect, connect_local, call, prepare, call!, stream, prepare_stream, chunk!, last!, read_channel, acknowledge!, kernels, publish!, release!, flights, stats
export StraitError, RemoteError, LeaseExpired, Disconnected, NoHost, Forked, Released, MappingError, ProtocolError
export BFloat16, Float8_e4m3fn, Float8_e5m2

include("json.jl")
include("dtypes.jl")
include("errors.jl")
include("linux.jl")
include("wire.jl")
include("address.jl")
include("background.jl")
include("leases.jl")
include("callsocket.jl")
include("connection.jl")
include("mapped.jl")
include("reaper.jl")
include("kernels.jl")
include("session.jl")
include("local.jl")
include("inline.jl")
include("prepared.jl")
include("stream.jl")
include("channel.jl")
include("call.jl")

end
