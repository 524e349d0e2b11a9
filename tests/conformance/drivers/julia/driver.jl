# The conformance driver for Julia: JSON lines in, JSON lines out. See tests/conformance/README.md.

using Strait
using Strait: JSON, CancelToken, cancel!, client_stats, dtype, invocation, renew!

const TYPES = Dict(Strait.DTYPES)

struct DriverError <: Exception
    message::String
end
Base.showerror(io::IO, e::DriverError) = print(io, e.message)

"An array, and the session that it came over: it may be released after that session's end."
struct Handle
    array::Array
    session::Strait.Session
end

"What a handle leaves behind when it is released."
struct ReleasedHandle end

mutable struct Driver
    session::Union{Nothing,Strait.Session}
    handles::Dict{String,Any}
    axes::Dict{String,Vector{String}}         # of each kernel: its parameters of kind axis
    prepared::Dict{String,Strait.Prepared}
    kept::Vector{Any}                         # streams and readers of channels that are to stay open
end

session(d::Driver) = d.session === nothing ? throw(DriverError("no session")) : d.session

function handle(d::Driver, name)
    found = get(d.handles, name, nothing)
    found === nothing && throw(DriverError("no handle $(repr(name))"))
    found isa ReleasedHandle && throw(Released("handle $(repr(name)) was released"))
    return found::Handle
end
array_of(d::Driver, name) = handle(d, name).array
keep!(d::Driver, name, array::Array) = (d.handles[name] = Handle(array, session(d)); array)

# ---- what is said about arrays

"Device and inode of the pages at an array's first element, as Linux maps them."
function place(array::Array)
    nowhere = (device = 0, inode = 0)
    isempty(array) && return nowhere
    address = UInt(pointer(array))
    # Closed at once, not when it is garbage: descriptors are counted.
    return open("/proc/self/maps") do maps
        for line in eachline(maps)
            range, _, _, device, inode = split(line; limit = 6)
            low, high = (parse(UInt, word; base = 16) for word in split(range, '-'))
            low <= address < high || continue
            inode == "0" && return nowhere
            major, minor = (parse(Int, word; base = 16) for word in split(device, ':'))
            return (device = major << 8 | minor, inode = parse(Int, inode))
        end
        return nowhere
    end
end

describe(array::Array) =
    (; dtype = dtype(eltype(array)), shape = reverse(size(array)), bytes = sizeof(array), place(array)...)

# Read and written where it lies: a copy would not prove anything.
function read_into!(array::Array, file)
    size = filesize(file)
    size == sizeof(array) || throw(DriverError("$file has $size bytes, the array $(sizeof(array))"))
    GC.@preserve array open(io -> unsafe_read(io, Ptr{UInt8}(pointer(array)), sizeof(array)), file)
    return array
end
write_from(array::Array, file) = GC.@preserve array open(io -> unsafe_write(io, Ptr{UInt8}(pointer(array)), sizeof(array)), file, "w")

# ---- operations

option(request, key) = get(request, key, nothing)

function connect!(d::Driver, request)
    d.session === nothing || close(d.session)
    d.session = nothing
    empty!(d.prepared)
    empty!(d.kept)
    s = d.session = connect(request["address"]; renew = something(option(request, "renew"), true))
    return (host_id = s.welcome["host_id"], move_min_bytes = s.welcome["move_min_bytes"], inline_bytes = s.welcome["inline_bytes"])
end

function make(d::Driver, request)
    T, dims = TYPES[request["dtype"]], Tuple(reverse(Int.(request["shape"])))
    array = request["how"] == "segment" ? zeros(session(d), T, dims) : Array{T}(undef, dims)
    return describe(keep!(d, request["as"], read_into!(array, request["file"])))
end

function put(d::Driver, request)
    s = session(d)
    before = client_stats(s).copied_bytes
    publish!(s, request["name"], array_of(d, request["handle"]); replace = something(option(request, "replace"), false))
    return (copied_bytes = client_stats(s).copied_bytes - before,)
end

function get_flight(d::Driver, request)
    array = fetch(session(d), request["name"]; lease_ms = option(request, "lease_ms"))
    array isa Array || throw(DriverError("a flight of $(length(array)) tensors"))
    return describe(keep!(d, request["as"], array))
end

axes_of(d::Driver, kernel) = get!(d.axes, kernel) do
    [p.name for k in kernels(session(d), kernel) for p in k.parameters if p.kind == "axis"]
end

"An axis as Julia counts, for a client that counts so."
function parameters(d::Driver, request, inputs)
    axes = axes_of(d, request["kernel"])
    given = something(option(request, "parameters"), Dict{String,Any}())
    return [name => name in axes ? rank(d, first(values(inputs))) - value : plain(value) for (name, value) in given]
end
rank(::Driver, array::Array) = ndims(array)
rank(d::Driver, fixed::Strait.Fixed) = rank(d, fixed.value)
rank(::Driver, spec::Strait.TensorSpec) = ndims(spec)
function rank(d::Driver, name::String)
    flight, tensor = occursin('#', name) ? split(name, '#') : (name, nothing)
    tensors = Dict(flights(session(d)))[flight]
    return ndims(tensor === nothing ? tensors[1] : tensors[findfirst(t -> t.name == tensor, tensors)])
end
# An integer stays an integer; the words for what JSON lacks are the wire's, and in Julia numbers.
const WORDS = Dict("nan" => NaN, "inf" => Inf, "-inf" => -Inf)
plain(values::Vector) = Real[value isa String ? WORDS[value] : value for value in values]
plain(value) = value

function call_once(d::Driver, request, inputs, given)
    keywords = Dict{Symbol,Any}()
    for key in ("deadline_ms", "lease_ms", "verify", "replace", "publish", "request_id", "inline_bytes")
        option(request, key) === nothing || (keywords[Symbol(key)] = request[key])
    end
    after = option(request, "cancel_after_ms")
    if after !== nothing
        token = keywords[:cancel] = CancelToken()
        Timer(_ -> cancel!(token), after / 1000)
    end
    return invocation(session(d), request["kernel"], inputs, given; keywords...)
end

function call_all(d::Driver, request)
    s = session(d)
    inputs = Dict{String,Any}(port => given isa String ? given : array_of(d, given["handle"]) for (port, given) in request["inputs"])
    given = parameters(d, request, inputs)
    seconds = Float64[]
    copied = 0
    runs = something(option(request, "repeat"), 1)
    for run in 1:runs
        began = time_ns()
        found = call_once(d, request, inputs, given)
        push!(seconds, (time_ns() - began) / 1e9)
        copied += found.client_copied_bytes
        if run < runs
            release!(s, found.outputs)
            continue
        end
        answer = (ok = true, outputs = Dict(String(port) => describe(y) for (port, y) in pairs(found.outputs)),
            notes = [(key = key, text = text) for (key, text) in found.notes], pages = found.pages,
            copied_bytes = found.copied_bytes, client_copied_bytes = copied, seconds = seconds)
        for (port, y) in pairs(found.outputs)
            file = get(something(option(request, "files"), Dict()), String(port), nothing)
            file === nothing || write_from(y, file)
            kept = get(something(option(request, "as"), Dict()), String(port), nothing)
            kept === nothing ? release!(s, y) : keep!(d, kept, y)
        end
        return answer
    end
end

# ---- prepared calls

prepared_input(::Driver, name::String) = name
prepared_input(d::Driver, given) = haskey(given, "dtype") ? Strait.TensorSpec(TYPES[given["dtype"]], reverse(Int.(given["shape"]))...) :
    Strait.Fixed(array_of(d, given["handle"]))

specs(ports) = [(port = t.name, dtype = dtype(eltype(t)), shape = reverse(size(t))) for t in ports]

function prepare!(d::Driver, request)
    s = session(d)
    inputs = Dict{String,Any}(port => prepared_input(d, given) for (port, given) in request["inputs"])
    options = (; (Symbol(key) => request[key] for key in ("deadline_ms", "request_id") if option(request, key) !== nothing)...)
    keywords = (Symbol(name) => value for (name, value) in parameters(d, request, inputs))
    made = d.prepared[request["as"]] = prepare(s, request["kernel"], inputs; options = options, keywords...)
    return (inputs = specs(made.inputs), outputs = specs(made.outputs))
end

prepared(d::Driver, request) = get(() -> throw(DriverError("nothing is prepared as $(request["prepared"])")), d.prepared, request["prepared"])

function call_prepared(d::Driver, request)
    called = prepared(d, request)
    given = Dict{String,Any}(port => array_of(d, value["handle"]) for (port, value) in request["inputs"])
    ports = [input.name for input in called.inputs if haskey(given, input.name)]
    # One that is not an input is one too many.
    inputs = [given[port] for port in vcat(ports, setdiff(collect(keys(given)), ports))]
    after = option(request, "cancel_after_ms")
    seconds, copied, found = Float64[], 0, nothing
    for _ in 1:something(option(request, "repeat"), 1)
        after === nothing || Timer(_ -> @async(cancel!(called)), after / 1000)
        began = time_ns()
        found = invocation(called, inputs...)
        push!(seconds, (time_ns() - began) / 1e9)
        copied += found.client_copied_bytes
    end
    for (port, y) in pairs(found.outputs)
        file = get(something(option(request, "files"), Dict()), String(port), nothing)
        file === nothing || write_from(y, file)
    end
    return (outputs = Dict(String(port) => describe(y) for (port, y) in pairs(found.outputs)),
        notes = [(key = key, text = text) for (key, text) in found.notes], client_copied_bytes = copied, seconds = seconds)
end

close_prepared(d::Driver, request) = (close(prepared(d, request)); delete!(d.prepared, request["prepared"]); NamedTuple())

# ---- channels

"A tensor with so many rows from `from` on."
rows_of(x::Array, from::Int, count::Int) = copy(selectdim(x, ndims(x), from+1:from+count))

function channel_produce(d::Driver, request)
    s = session(d)
    given = Dict{String,Array}(port => array_of(d, x["handle"]) for (port, x) in request["inputs"])
    specs = [port => Strait.TensorSpec(eltype(x), Base.front(size(x))..., request["rows"]) for (port, x) in given]
    keywords = (Symbol(name) => value for (name, value) in parameters(d, request, given))
    channel = (; (Symbol(key) => value for (key, value) in request["channel"])...)
    options = (; (Symbol(key) => request[key] for key in ("deadline_ms", "request_id", "limits") if option(request, key) !== nothing)..., channel = channel)
    stream = prepare_stream(s, request["kernel"], specs...; options = options, keywords...)
    how, cuts, from = something(option(request, "end"), "last"), request["cuts"], 0
    try
        isempty(cuts) && how == "last" && last!(stream)
        for (index, cut) in enumerate(cuts)
            ports = (; (Symbol(spec.name) => rows_of(given[spec.name], from, cut) for spec in stream.inputs)...)
            how == "last" && index == length(cuts) ? last!(stream; ports...) : chunk!(stream; ports...)
            from += cut
        end
    catch
        close(stream)
        rethrow()
    end
    how == "keep" ? push!(d.kept, stream) : close(stream)
    return (chunks = how == "last" ? max(1, length(cuts)) : length(cuts),)
end

function channel_read(d::Driver, request)
    reader = read_channel(session(d), request["channel"]; request_id = option(request, "request_id"))
    most, files = option(request, "batches"), something(option(request, "files"), Dict())
    numbers, ended = Int[], false
    rows = Dict(spec.name => Int[] for spec in reader.outputs)
    try
        while length(numbers) != most
            next = iterate(reader)
            next === nothing && (ended = true; break)
            push!(numbers, reader.number)
            found = length(reader.outputs) == 1 ? (next[1],) : Tuple(next[1])
            for (spec, y) in zip(reader.outputs, found)
                push!(rows[spec.name], size(y, ndims(y)))
                file = get(files, spec.name, nothing)
                file === nothing || open(io -> write(io, y), file, "a")
            end
        end
        something(option(request, "acknowledge"), false) && acknowledge!(reader)
    catch
        close(reader)
        rethrow()
    end
    something(option(request, "keep"), false) ? push!(d.kept, reader) : close(reader)
    return (kernel = reader.kernel, outputs = specs(reader.outputs), numbers = numbers, rows = rows, ended = ended,
        notes = [(key = key, text = text) for (key, text) in reader.notes])
end

function concurrent(d::Driver, request)
    repeat = something(option(request, "repeat"), 1)
    foreach(call -> axes_of(d, call["kernel"]), request["calls"])
    tasks = map(request["calls"]) do call
        Threads.@spawn begin
            answer = nothing
            for _ in 1:repeat
                answer = answered(() -> call_all(d, call))
            end
            answer
        end
    end
    return (answers = fetch.(tasks),)
end

function release(d::Driver, request)
    found = handle(d, request["handle"])
    release!(found.session, found.array)
    d.handles[request["handle"]] = ReleasedHandle()
    return NamedTuple()
end

function forget(d::Driver, request)
    handle(d, request["handle"])
    delete!(d.handles, request["handle"])
    return NamedTuple()
end

"""
A child by `fork` alone. It has this thread only, so it must not collect garbage (that waits for the others), and it
leaves by `_exit`.
"""
function fork_child(d::Driver)
    s = session(d)
    ends = zeros(Cint, 2)
    systemerror("pipe", ccall(:pipe, Cint, (Ptr{Cint},), ends) != 0)
    # A child cannot compile: all that it will do is done here once, the refusal by a stand-in.
    attempt(ask) = JSON.encode(answered(() -> (ask(); NamedTuple())))
    attempt(() -> throw(Forked(1, 2)))
    refused = Function[() -> flights(s), () -> throw(Forked(1, 2))]
    foreach(attempt, refused)
    GC.enable(false)
    child = ccall(:fork, Cint, ())
    if child == 0
        text = attempt(refused[1])
        ccall(:write, Cssize_t, (Cint, Ptr{UInt8}, Csize_t), ends[2], text, sizeof(text))
        ccall(:_exit, Cvoid, (Cint,), 0)
    end
    GC.enable(true)
    ccall(:close, Cint, (Cint,), ends[2])
    systemerror("fork", child < 0)
    text = read(fdio(ends[1], true), String)
    ccall(:waitpid, Cint, (Cint, Ptr{Cint}, Cint), child, C_NULL, 0)
    return (child = JSON.decode(text),)
end

function perform(d::Driver, request)
    op = request["op"]
    op == "hello" && return (language = "julia", client = "strait-julia/$(Strait.CLIENT_VERSION)", fork = "refused", channels = true)
    op == "connect" && return connect!(d, request)
    op == "close" && return (close(session(d)); empty!(d.kept); NamedTuple())
    op == "make" && return make(d, request)
    op == "put" && return put(d, request)
    op == "get" && return get_flight(d, request)
    op == "read" && (array = array_of(d, request["handle"]); write_from(array, request["file"]); return describe(array))
    op == "write" && (read_into!(array_of(d, request["handle"]), request["file"]); return NamedTuple())
    op == "call" && return call_all(d, request)
    op == "concurrent" && return concurrent(d, request)
    op == "prepare" && return prepare!(d, request)
    op == "call_prepared" && return call_prepared(d, request)
    op == "close_prepared" && return close_prepared(d, request)
    op == "channel_produce" && return channel_produce(d, request)
    op == "channel_read" && return channel_read(d, request)
    op == "delete" && (delete!(session(d), request["name"]); return NamedTuple())
    op == "list" && return (flights = [(name = name, tensors = [(name = t.name, dtype = dtype(eltype(t)), shape = reverse(size(t)))
                                                                for t in tensors]) for (name, tensors) in flights(session(d))],)
    op == "kernels" && return (kernels = [(name = k.name, plugin = k.plugin, doc = k.doc, inputs = [p.name for p in k.inputs],
        outputs = [p.name for p in k.outputs], parameters = [p.name for p in k.parameters]) for k in kernels(session(d))],)
    op == "stats" && return (stats = stats(session(d)).host,)
    op == "client_stats" && return client_stats(session(d))
    op == "renew" && return (expires_ms = renew!(session(d), array_of(d, request["handle"]); lease_ms = option(request, "lease_ms")),)
    op == "release" && return release(d, request)
    op == "forget" && return forget(d, request)
    op == "fork" && return fork_child(d)
    throw(DriverError("unknown op $(repr(op))"))
end

# ---- answers

answered(f) =
    try
        (; f()..., ok = true)
    catch e
        failed(e)
    end

kind(::RemoteError) = "remote"
kind(::LeaseExpired) = "lease_expired"
kind(::Disconnected) = "disconnected"
kind(::NoHost) = "no_host"
kind(::Released) = "released"
kind(::Forked) = "forked"
kind(::ArgumentError) = "argument"
kind(::Any) = "driver"

function failed(e)
    answer = (ok = false, kind = kind(e), message = sprint(showerror, e))
    e isa LeaseExpired && return (; answer..., request_id = e.request_id)
    e isa RemoteError || return answer
    answer = (; answer..., code = e.code, reason = e.reason, request_id = e.request_id)
    isempty(e.details) || (answer = (; answer..., details = e.details))
    return e.backtrace === nothing ? answer : (; answer..., backtrace = e.backtrace)
end

function main()
    driver = Driver(nothing, Dict(), Dict(), Dict(), [])
    for line in eachline(stdin)
        isempty(line) && continue
        request = JSON.decode(line)
        ended = request["op"] == "exit"
        answer = ended ? (ok = true,) : answered(() -> perform(driver, request))
        # The request's own frame is gone here, so nothing of it keeps a forgotten array alive.
        request["op"] == "forget" && (GC.gc(); GC.gc(); yield())
        println(stdout, JSON.encode(answer))
        flush(stdout)
        ended && break
    end
    driver.session === nothing || close(driver.session)
end

main()
