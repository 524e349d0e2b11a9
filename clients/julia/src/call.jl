# Calling kernels.

"""
    Strait.CancelToken()

Ends a call from another task: pass it to [`call`](@ref) or [`invocation`](@ref) as the option `cancel`, then
[`cancel!`](@ref) it. One token serves one call.
"""
mutable struct CancelToken
    lock::ReentrantLock
    cancelled::Bool
    running::Union{Nothing,Tuple{Connection,UInt32}}
end
CancelToken() = CancelToken(ReentrantLock(), false, nothing)

"""
    Strait.cancel!(token)

Asks the host to end the call that has this token; the call then throws a [`RemoteError`](@ref) with reason
`CANCELLED`. It has no effect on a call that was answered already; a call that has not begun will not begin.
"""
function cancel!(token::CancelToken)
    running = lock(token.lock) do
        token.cancelled = true
        token.running
    end
    running === nothing || quietly(() -> tell(running[1], CANCEL, (sequence = running[2],)))
    return nothing
end

"""
    Strait.Invocation

What a kernel gave back, in full:
- `outputs`: `NamedTuple` of `Array`s by port; empty with `map = false`
- `published`: names of the outputs that were published, by port
- `notes`: the kernel's notes, `key => text`
- `copied_bytes`: bytes of this call's tensors that the host copied, `client_copied_bytes`: those that this side copied
- `pages`: with `verify = true`, the pages that the kernel saw: `(port, device, inode)`
- `slices`: slices of its rows that it ran in; 0: it ran whole
- `minor_faults`, `seconds`: what it cost the host (a `Dict`: queue, instantiate, open, reserve, move_in, run, move_out, total)
- `stages`: of a pipeline, what is told of each: `(stage, kernel, copied_bytes, seconds)`
- `request_id`: id of this call in the host's log
"""
struct Invocation
    outputs::NamedTuple
    published::Dict{String,String}
    notes::Vector{Pair{String,String}}
    copied_bytes::Int
    client_copied_bytes::Int
    pages::Vector{NamedTuple{(:port, :device, :inode),Tuple{String,Int,Int}}}
    minor_faults::Int
    slices::Int
    seconds::Dict{String,Float64}
    stages::Vector{NamedTuple{(:stage, :kernel, :copied_bytes, :seconds),Tuple{String,String,Int,Float64}}}
    request_id::String
end

Base.show(io::IO, i::Invocation) = print(io, "Strait.Invocation(", join(("$port = $(summary(y))" for (port, y) in pairs(i.outputs)), ", "),
    "; copied_bytes = ", i.copied_bytes, ", request_id = ", repr(i.request_id), ')')

# A kernel's name or a pipeline's text, or a pipeline as JSON has it.
const Asked = Union{AbstractString,AbstractDict}

"The field of a request that says what is asked for."
asked_field(kernel::AbstractString) = Dict{String,Any}("kernel" => String(kernel))
asked_field(pipeline::AbstractDict) = Dict{String,Any}("pipeline" => pipeline)

"What it is kept by."
asked_name(kernel::AbstractString) = String(kernel)
asked_name(pipeline::AbstractDict) = String(JSON.encode(pipeline))

"""
    call(session, kernel, x; parameters...)
    call(session, kernel, ("x" => a, "m" => b); parameters...)
    call(session, kernel; x = a, m = b, parameters...)
    call(f, session, kernel, ...; parameters...)
    call(session, "clip(lo=0) | cast(to=int8)", x)

Runs a kernel, or a pipeline of several, and returns its output: an `Array` over the pages of the result, read-only, or, for a small result, an ordinary
`Array`; a `NamedTuple` of them by port if the kernel has several outputs, `nothing` if none was mapped.

```julia
x = zeros(s, Float64, 1000, 1000)       # an Array inside a segment
x .= rand.()
y = call(s, "zscore", x; axis = 1)      # no copy in either direction
```

*Inputs* are arrays, numbers (0-dimensional), or names of flights (`"name"`, `"name#tensor"`). Given by position they
belong to the kernel's input ports in order. An `Array` of this session (from `zeros(session, ...)`, `similar`, `call` or
`fetch`) goes in as it is; of any other array (a view, range, sparse matrix or other wrapper) one dense copy is made of the
elements that it shows, counted in [`stats`](@ref): into the request itself if it is small (`session.welcome["inline_bytes"]`,
usually 32 KiB), else into a segment. An array that contains `missing` is refused. Do not write to an input while
the call runs.

*Dimensions.* Tensors are row-major outside of Julia, `Array`s column-major. The same bytes are seen with the dimensions
in reverse order: an `Array` of `size` `(c, r)` is the host's tensor of shape `[r, c]`. Nothing is ever transposed or
moved. So `axis` counts as it does everywhere in Julia: from 1 (the fastest) to `ndims(x)`, and `axis = k` is the host's axis
`ndims(x) - k`. It refers to the first input port. And a matrix product of two inputs `a`, `b` computes `b * a` in
Julia's terms, since each matrix is seen transposed: swap the inputs.

*Parameters* are keywords: `Bool`s, numbers, text (a `String`, a `Symbol`, or an element type, as in `to = BFloat16`), vectors of
numbers. `kernels(session, name)` says which ones a kernel takes. An integer of any type arrives exactly, in the whole range of `Int64`
and `UInt64` (beyond that it is an `ArgumentError`); any other number as the nearest `Float64`.

*A pipeline* is the text of one, as `docs/protocol.md` has it, or the same as a dictionary (`Dict("stages" => [...])`). Its inputs go by position or by name as a
kernel's do; its parameters are in it, and an `axis` there is the host's: row-major, from 0.

*`options = (...)`*, a `NamedTuple`, is about the call itself; see [`invocation`](@ref), which also says what the call
cost: `options = (deadline_ms = 500,)`.

*Lifetime.* A result's pages are given back when the `Array` is garbage-collected, by [`release!`](@ref), or, with a function first,
once that function has returned: `call(sum, s, "zscore", x; axis = 1)`; then keep nothing of the output. A small result
came in the reply and is an ordinary `Array`: it has no pages to give back, and is published by a copy. `options = (inline_bytes = 0,)`
asks for a segment.

Throws a [`RemoteError`](@ref) if the host refuses or the kernel fails.
"""
function call(s::Session, kernel::Asked, inputs...; options::NamedTuple = NamedTuple(), parameters...)
    found = declaration(s, kernel)
    given, kept = split_keywords(found, values(parameters))
    outputs = invocation(s, kernel, merge_inputs(found, kernel, inputs, given), kept; options...).outputs
    return length(outputs) == 1 ? outputs[1] : isempty(outputs) ? nothing : outputs
end

function call(f::Function, s::Session, kernel::Asked, inputs...; parameters...)
    output = call(s, kernel, inputs...; parameters...)
    try
        return f(output)
    finally
        output === nothing || release!(s, output)
    end
end

"Declarations that a session keeps."
const KERNELS_KEPT = 256

"The kernel's declaration, kept by the session; `nothing` if there is none or more than one: the host then says so."
function declaration(s::Session, kernel::Asked)
    name = asked_name(kernel)
    found = lock(() -> get(s.kernels, name, nothing), s.lock)
    if found === nothing
        found = kernels(s, kernel)
        length(found) == 1 && lock(s.lock) do
            # A program may make any number of pipelines that differ in a parameter.
            length(s.kernels) < KERNELS_KEPT || empty!(s.kernels)
            s.kernels[name] = found
        end
    end
    return length(found) == 1 ? found[1] : nothing
end

"Keywords that are input ports, and those that are parameters."
function split_keywords(found::Union{Nothing,Kernel}, keywords)
    inputs = Pair{String,Any}[]
    parameters = Pair{String,Any}[]
    for (key, value) in pairs(keywords)
        port = found === nothing ? value isa AbstractArray && !(value isa AbstractVector) :
               any(port -> port.name == dashed(found.inputs, key), found.inputs)
        names = found === nothing ? () : port ? found.inputs : found.parameters
        push!(port ? inputs : parameters, dashed(names, key) => value)
    end
    return inputs, parameters
end

"A keyword cannot contain a dash; a port or parameter can."
function dashed(declared, key::Symbol)
    name = String(key)
    any(entry -> entry.name == name, declared) && return name
    other = replace(name, '_' => '-')
    return any(entry -> entry.name == other, declared) ? other : name
end

# The last two: for `prepare` only.
const Given = Union{AbstractArray,Number,AbstractString,TensorSpec,Fixed}

function merge_inputs(found::Union{Nothing,Kernel}, kernel, inputs::Tuple, given::Vector{Pair{String,Any}})
    if all(input -> input isa Given, inputs)
        # Without a declaration the host has the last word, and says that it knows no such kernel.
        ports = found === nothing ? ["x$i" for i in eachindex(inputs)] : [port.name for port in found.inputs]
        length(inputs) <= length(ports) || throw(ArgumentError(
            "$(length(inputs)) inputs; $kernel takes $(length(ports)): $(join(ports, ", "))"))
        return vcat(Pair{String,Any}[port => input for (port, input) in zip(ports, inputs)], given)
    end
    length(inputs) == 1 || throw(ArgumentError("inputs are either arrays in the order of the kernel's ports, or one collection of port => array"))
    return vcat(named(inputs[1]), given)
end

named(entries::Union{NamedTuple,AbstractDict}) = Pair{String,Any}[entry_name(key) => value for (key, value) in pairs(entries)]
named(entry::Pair) = named((entry,))
function named(entries::Union{Tuple,AbstractVector})
    all(entry -> entry isa Pair, entries) || throw(ArgumentError("several inputs are given as port => array: (\"x\" => a, \"m\" => b)"))
    return Pair{String,Any}[entry_name(key) => value for (key, value) in entries]
end
entry_name(key::Union{AbstractString,Symbol}) = String(key)
entry_name(key) = throw(ArgumentError("a name cannot be $(repr(key)), a $(typeof(key)); it is a String or a Symbol"))
named(other) = refuse_input(other)

"""
    Strait.invocation(session, kernel, inputs, parameters = (); options...)

[`call`](@ref) with every option, and with the host's whole answer, as an [`Invocation`](@ref). `inputs` and `parameters` are
collections of `name => value` (named tuples, dictionaries, tuples of pairs). Options:

- `deadline_ms`: wall time for the call, from the host's receipt on
- `lease_ms`: lifetime of the results' leases
- `publish`: names for outputs, `(y = "name",)`; `replace = false`: whether they may take names from other flights
- `seal = false`: outputs are sealed permanently, so that not even the host can write to them again
- `map = true`: whether the outputs are mapped here; if not, publish each
- `inline_bytes`: results that cannot become larger than this come in the reply, as ordinary `Array`s, and not in
  segments; 0: none does. The default is what the host allows (with `publish` or `seal` all are segments)
- `limits`: lower limits than the host's own: `(guest_bytes =, window_bytes =, result_bytes =, log_bytes =)`
- `threads`: slices to cut the rows into, if the kernel can be cut, 1 to 64; the default is as many as are worth it
- `verify = false`: whether the host reports which pages the kernel saw
- `idempotency_key`: a repeat of the same call with the same key within a minute gets the same results without another run;
  another call with that key is refused with reason `IDEMPOTENCY_KEY_REUSED`
- `request_id`: id of this call in the host's log and in errors
- `cancel`: a [`CancelToken`](@ref)

An interrupt (an exception thrown into the calling task) cancels the kernel as well.
"""
function invocation(s::Session, kernel::Asked, inputs, parameters = ();
    deadline_ms = nothing, lease_ms = nothing, publish = nothing, replace::Bool = false, seal::Bool = false, map::Bool = true, inline_bytes = nothing,
    limits = nothing, threads = nothing, verify::Bool = false, idempotency_key = nothing, request_id = nothing, cancel::Union{Nothing,CancelToken} = nothing)
    c = ready!(s)
    given = named(inputs)
    body = asked_field(kernel)
    deadline_ms === nothing || (body["deadline_ms"] = milliseconds(deadline_ms, "deadline_ms"))
    publish === nothing || (body["publish"] = Dict(named(publish)))
    limits === nothing || (body["limits"] = Dict(named(limits)))
    threads === nothing || (body["threads"] = thread_count(threads))
    idempotency_key === nothing || (body["idempotency_key"] = String(idempotency_key))
    for (key, value, usual) in (("replace", replace, false), ("seal", seal, false), ("map", map, true), ("verify", verify, false))
        value == usual || (body[key] = value)
    end
    for (key, value) in pairs(with_options(s, NamedTuple(); lease_ms = something(lease_ms, s.lease_ms, Some(nothing)), request_id = request_id))
        body[String(key)] = value
    end
    largest = inline_bytes === nothing ? s.inline_bytes : byte_count(inline_bytes, "inline_bytes")
    # What is not to be here does not come in the reply either.
    map && largest > 0 && (body["inline_bytes"] = largest)
    body["parameters"] = wire_parameters(s, kernel, named(parameters), given)
    inputs = Inputs()
    # The arrays are alive while the kernel runs.
    return GC.@preserve given begin
        reply = try
            body["inputs"] = take_inputs!(inputs, s, given)
            Threads.atomic_add!(c.calls, 1)
            invoke(c, body, inputs.payload, cancel)
        catch e
            # An answered call does not look at its inputs any more; an interrupted one may for a while.
            give_back!(s, inputs.held, e isa Union{RemoteError,LeaseExpired})
            rethrow()
        end
        give_back!(s, inputs.held, true)
        answered(c, reply, inputs.copied_bytes)
    end
end

thread_count(value) = value isa Integer && !(value isa Bool) && 1 <= value <= 64 ? Int(value) :
    throw(ArgumentError("threads is $(repr(value)); it is a number from 1 to 64"))

byte_count(value, what) = value isa Integer && !(value isa Bool) && 0 <= value <= typemax(Int) ? Int(value) :
    throw(ArgumentError("$what is $(repr(value)); it is a number of bytes from 0 on"))

"The inputs of one call on their way to the host."
mutable struct Inputs
    payload::Vector{UInt8}             # elements that travel in the frame
    copied_bytes::Int
    held::Vector{Any}                  # to be given back after the call: arrays that were copied to, and leases
end
Inputs() = Inputs(UInt8[], 0, Any[])

"The inputs as the wire has them, by port."
function take_inputs!(inputs::Inputs, s::Session, given::Vector{Pair{String,Any}})
    wires = Dict{String,Any}()
    for (port, value) in given
        haskey(wires, port) && throw(ArgumentError("input $(repr(port)) is given twice"))
        wires[port] = wire_input!(inputs, s, value)
    end
    return wires
end

function give_back!(s::Session, held::Vector{Any}, reusable::Bool)
    for copy in held
        if copy isa UInt64
            locked(() -> end!(s.connection.leases, copy), s.connection)
        else
            reusable ? keep_scratch!(s, copy) : release!(s, copy)
        end
    end
end

function invoke(c::Connection, body::Dict{String,Any}, payload::Vector{UInt8}, cancel::Union{Nothing,CancelToken})
    cancel === nothing && return request(c, INVOKE, body; payload = payload)
    begun(sequence) = lock(() -> (cancel.running = (c, sequence); cancel.cancelled), cancel.lock) &&
        tell(c, CANCEL, (sequence = sequence,))
    early = lock(() -> cancel.cancelled, cancel.lock)
    early && throw(RemoteError("CANCELLED", "CANCELLED", "the call of $(body["kernel"]) was cancelled before it was sent",
        get(body, "request_id", "-"), nothing, Dict{String,Any}()))
    try
        return request(c, INVOKE, body; payload = payload, begun = begun)
    finally
        # A late cancel must not hit another call's sequence.
        lock(() -> cancel.running = nothing, cancel.lock)
    end
end

"An input as the wire has it. What has to be copied is."
function wire_input!(inputs::Inputs, s::Session, x::Array)
    found = find_tensor(s.connection, x)
    return found === nothing ? copied_input!(inputs, s, x) : segment_input(s.connection, found...)
end
wire_input!(inputs::Inputs, s::Session, x::AbstractArray) = copied_input!(inputs, s, x)
wire_input!(inputs::Inputs, s::Session, x::Number) = copied_input!(inputs, s, fill(x))
wire_input!(::Inputs, ::Session, name::AbstractString) = String(name)
wire_input!(::Inputs, ::Session, x) = refuse_input(x)
refuse_input(x) = throw(ArgumentError("an input cannot be a $(typeof(x)); it is an array, a number, or a flight's name"))

function segment_input(c::Connection, mapped::Mapped, index::Int)
    check_lease(c, mapped.lease)
    segment = (segment = mapped.mapping.segment,)
    several = length(mapped.mapping.places) > 1
    return several ? (; segment..., tensor = mapped.mapping.places[index].spec.name) : segment
end

function copied_input!(inputs::Inputs, s::Session, x::AbstractArray)
    T = tensor_type(x)
    inline = put_inline!(inputs.payload, s, T, x)
    if inline !== nothing
        inputs.copied_bytes += inline.length
        return (inline = inline,)
    end
    if isempty(x)
        segment, lease = empty_segment(s, T, size(x))
        push!(inputs.held, lease)
        return segment
    end
    array = take_scratch!(s, T, size(x))
    wire = try
        segment_input(s.connection, something(find_tensor(s.connection, fill!!(s, array, x)))...)
    catch
        # An array of somebody else's may throw as it is read.
        release!(s, array)
        rethrow()
    end
    push!(inputs.held, array)
    inputs.copied_bytes += sizeof(array)
    return wire
end

function wire_parameters(s::Session, kernel, parameters::Vector{Pair{String,Any}}, inputs::Vector{Pair{String,Any}})
    found = declaration(s, kernel)
    axes = found === nothing ? String[] : [p.name for p in found.parameters if p.kind == "axis"]
    wires = Dict{String,Any}()
    for (name, value) in parameters
        haskey(wires, name) && throw(ArgumentError("parameter $(repr(name)) is given twice"))
        wires[name] = name in axes ? wire_axis(s, found, name, value, inputs) : wire_value(name, value)
    end
    return wires
end

function wire_axis(s::Session, kernel::Kernel, name, axis, inputs)
    axis isa Integer && !(axis isa Bool) || throw(ArgumentError("$name is $(repr(axis)); an axis is an integer from 1 on"))
    first = isempty(kernel.inputs) ? nothing : findfirst(input -> input.first == kernel.inputs[1].name, inputs)
    # The host says that the input is missing.
    first === nothing && return 0
    rank = rank_of(s, inputs[first].second)
    1 <= axis <= rank || throw(ArgumentError("$name is $axis; $(inputs[first].first) has $rank dimensions, so it goes from 1 to $rank"))
    return rank - Int(axis)
end

rank_of(::Session, x::Union{AbstractArray,Number}) = ndims(x)
rank_of(::Session, x) = refuse_input(x)
function rank_of(s::Session, name::AbstractString)
    flight, tensor = occursin('#', name) ? split(name, '#'; limit = 2) : (name, nothing)
    places = Mapping(field(ask(s.connection, LOOKUP, with_options(s, (name = String(flight),))), "mapping", Dict{String,Any})).places
    found = tensor === nothing ? 1 : findfirst(place -> place.spec.name == tensor, places)
    # The host says that there is no such tensor.
    return found === nothing || isempty(places) ? typemax(Int) : ndims(places[found].spec)
end

wire_value(name, value::Union{Bool,AbstractString,Symbol}) = value
wire_value(name, T::Type) = dtype(T)
wire_value(name, value::Real) = wire_number(name, value)
wire_value(name, values::Union{AbstractVector,Tuple}) = Any[wire_element(name, value) for value in values]
wire_value(name, value) = refuse_parameter(name, value)
wire_element(name, value::Real) = wire_number(name, value)
wire_element(name, value) = refuse_parameter(name, value)
# A `Bool` is a number in Julia and none in JSON; no kernel takes a list of them.
wire_element(name, value::Bool) = refuse_parameter(name, value)

refuse_parameter(name, value) = throw(ArgumentError(
    "parameter $(repr(String(name))) cannot be $(value === missing || value === nothing ? value : "a $(typeof(value))"); it is a Bool, a number, a text, an element type, or a vector of numbers"))

# An integer stays one up to the kernel. What is no integer travels as the nearest Float64.
function wire_number(name, value::Integer)
    typemin(Int64) <= value <= typemax(UInt64) || throw(ArgumentError(
        "parameter $(repr(String(name))) is $value; an integer lies between $(typemin(Int64)) and $(typemax(UInt64)): make it a Float64 if it need not be exact"))
    return value <= typemax(Int64) ? Int64(value) : UInt64(value)
end
function wire_number(name, value::Real)
    nearest = Float64(value)
    # JSON has no word for these three; the protocol has.
    isnan(nearest) && return "nan"
    isfinite(nearest) && return nearest
    isfinite(value) && throw(ArgumentError(
        "parameter $(repr(String(name))) is $value; the largest number is $(floatmax(Float64)) (Inf if you mean that)"))
    return nearest > 0 ? "inf" : "-inf"
end

"A result as an INVOKE's reply tells of it: a segment to be mapped, a tensor in the payload, or neither if it is not to be here."
struct Result
    port::String
    name::Union{Nothing,String}
    mapping::Union{Nothing,Mapping}
    lease::UInt64
    fd::Cint
    inline::Union{Nothing,Place}
end

function Result(entry::Dict{String,Any}, reply::Reply)
    port, name = symbolic(entry, "port"), field(entry, "name", String, nothing)
    has(key) = get(entry, key, nothing) !== nothing
    has("mapping") == has("inline") && throw(ProtocolError(
        "result $(repr(port)) has $(has("mapping") ? "both a mapping and" : "neither a mapping nor") bytes in the payload"))
    if has("inline")
        has("lease") && throw(ProtocolError("result $(repr(port)) has a lease, and no segment"))
        return Result(port, name, nothing, 0, -1, place(port, field(entry, "inline", Dict{String,Any}), "payload", length(reply.payload)))
    end
    has("lease") || return Result(port, name, nothing, 0, -1, nothing)
    mapping = Mapping(field(entry, "mapping", Dict{String,Any}))
    length(mapping.places) == 1 || throw(ProtocolError("result $(repr(port)) has $(length(mapping.places)) tensors"))
    index = size_field(entry, "fd")
    index < length(reply.fds) || throw(ProtocolError("result $(repr(port)) has descriptor $index of $(length(reply.fds))"))
    return Result(port, name, mapping, UInt64(entry["lease"]), reply.fds[index+1], nothing)
end

function results_of(reply::Reply)
    results = Result[Result(entry, reply) for entry in objects(reply.body, "results")]
    allunique(result.port for result in results) || throw(ProtocolError("two results of one port"))
    taken = [result.fd for result in results if result.mapping !== nothing]
    allunique(taken) && length(taken) == length(reply.fds) ||
        throw(ProtocolError("$(length(taken)) results to map came with $(length(reply.fds)) descriptors, which are not one for each"))
    return results
end

"Maps, or takes out of its payload, what an INVOKE answered. `copied`: bytes that were copied for the request."
function answered(c::Connection, reply::Reply, copied::Int)
    # All of it is read before anything is mapped.
    results, told = try
        (results_of(reply), told_of(reply.body))
    catch
        locked(() -> discard!(c, reply), c)
        signal_reaper()
        rethrow()
    end
    here = [result for result in results if result.mapping !== nothing || result.inline !== nothing]
    outputs = Any[]
    for (index, result) in enumerate(here)
        try
            if result.inline === nothing
                append!(outputs, map_reply!(c, result.mapping, result.lease, result.fd, false))
            else
                push!(outputs, take_inline(c, reply.payload, result.inline))
                copied += result.inline.bytes
            end
        catch
            # What is mapped already is garbage.
            rest = [result for result in here[index+1:end] if result.mapping !== nothing]
            foreach(result -> close_fd(result.fd), rest)
            locked(() -> foreach(result -> end!(c.leases, result.lease), rest), c)
            signal_reaper()
            rethrow()
        end
    end
    return Invocation(NamedTuple{Tuple(Symbol(result.port) for result in here)}(Tuple(outputs)),
        Dict{String,String}(result.port => result.name for result in results if result.name !== nothing),
        told.notes, told.copied_bytes, copied, told.pages, told.minor_faults, told.slices, told.seconds, told.stages, told.request_id)
end

"What an INVOKE's reply tells beside its results."
told_of(body::Dict{String,Any}) = (
    notes = told_notes(body),
    copied_bytes = size_field(body, "copied_bytes", 0),
    pages = [(port = field(page, "port", String), device = size_field(page, "device"), inode = size_field(page, "inode"))
             for page in (haskey(body, "pages") ? objects(body, "pages") : Dict{String,Any}[])],
    minor_faults = size_field(body, "minor_faults", 0),
    slices = size_field(body, "slices", 0),
    seconds = numbers(field(body, "seconds", Dict{String,Any}, Dict{String,Any}())),
    stages = [(stage = field(told, "stage", String), kernel = field(told, "kernel", String), copied_bytes = size_field(told, "copied_bytes", 0),
               seconds = get(numbers(told), "seconds", 0.0)) for told in (haskey(body, "stages") ? objects(body, "stages") : Dict{String,Any}[])],
    request_id = field(body, "request_id", String, "-"),
)

function numbers(body::Dict{String,Any})
    found = Dict{String,Float64}()
    for (key, value) in body
        value isa Union{JSON.Whole,Float64} && (found[key] = value)
    end
    return found
end
