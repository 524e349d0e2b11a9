# What kernels there are.

"""
    Strait.Port

An input or output of a kernel: `name`, the element `types` it takes or gives, `rank_min` and `rank_max` (what
`ndims` may be), `role` (`"data"` or `"mask"`), `whole` (an input that comes whole with every chunk and slice), `doc`.
"""
struct Port
    name::String
    types::Vector{DataType}
    rank_min::Int
    rank_max::Int
    role::String
    whole::Bool
    doc::String
end

"""
    Strait.Parameter

A parameter of a kernel: `name`, `kind` (`"boolean"`, `"integer"`, `"real"`, `"number"`, `"axis"`, `"text"`, `"integers"` or `"reals"`),
`default` (`nothing`: it must be given), `minimum`, `maximum`, `choices` (of a text; empty: any), `doc`. Default and bounds
are exact: an `Int64` or `UInt64` if the host has an integer, else a `Float64`.

They are as the host states them: an axis's default counts from 0, row-major. [`call`](@ref) takes an axis as Julia
counts, from 1 to `ndims(x)`.
"""
struct Parameter
    name::String
    kind::String
    default::Any
    minimum::Union{Nothing,JSON.Whole,Float64}
    maximum::Union{Nothing,JSON.Whole,Float64}
    choices::Vector{String}
    doc::String
end

"""
    Strait.BlockTree

How a reduction gives the same bits for any slicing: the kernel `partials` gives one row for each `block_rows` rows, counted
from the first, and the kernel `merge` makes the result from all those rows.
"""
struct BlockTree
    block_rows::Int
    partials::String
    merge::String
end

"""
    Strait.Kernel

A kernel of the host: `name`, `plugin` and its `version`, `doc`, `inputs` and `outputs` ([`Port`](@ref)s),
`parameters` ([`Parameter`](@ref)s), `signature` (which axes are equal, in the wire's order, such as `"(n),(k)->(m)"`, or `nothing`),
`split_axis` (the wire's axis along which the host may cut an invocation, or `nothing`), `combine` (how the results of slices are put
together: `"none"`, `"concatenate"` or `"tree"`), `block_tree` (a [`BlockTree`](@ref) with `"tree"`, or `nothing`), `streaming`,
`in_place`. Two plugins may have kernels of one name: then call `"plugin/name"`.
"""
struct Kernel
    name::String
    plugin::String
    version::String
    doc::String
    inputs::Vector{Port}
    outputs::Vector{Port}
    parameters::Vector{Parameter}
    signature::Union{Nothing,String}
    split_axis::Union{Nothing,Int}
    combine::String
    block_tree::Union{Nothing,BlockTree}
    streaming::Bool
    in_place::Bool
end

objects(body, key) = Dict{String,Any}[entry isa Dict{String,Any} ? entry : throw(ProtocolError("$(repr(key)) holds $(brief(entry)), no object"))
                                      for entry in field(body, key, Vector{Any})]

texts(body, key) = String[entry isa String ? entry : throw(ProtocolError("$(repr(key)) holds $(brief(entry)), no text"))
                          for entry in field(body, key, Vector{Any}, Any[])]

function Port(body::Dict{String,Any})
    # A dtype of a newer host is left out: this client has no arrays of it.
    types = DataType[TYPE_OF[dtype] for dtype in texts(body, "dtypes") if haskey(TYPE_OF, dtype)]
    return Port(field(body, "name", String), types, size_field(body, "rank_min"), size_field(body, "rank_max"),
        field(body, "role", String, "data"), field(body, "whole", Bool, false), field(body, "doc", String, ""))
end

function Parameter(body::Dict{String,Any})
    bound(key) = field(body, key, Union{JSON.Whole,Float64}, nothing)
    return Parameter(field(body, "name", String), field(body, "kind", String), get(body, "default", nothing),
        bound("minimum"), bound("maximum"), texts(body, "choices"),
        field(body, "doc", String, ""))
end

block_tree(::Nothing) = nothing
block_tree(body::Dict{String,Any}) = BlockTree(size_field(body, "block_rows"), field(body, "partials", String), field(body, "merge", String))

function Kernel(body::Dict{String,Any})
    split = size_field(body, "split_axis", nothing)
    tree = block_tree(field(body, "block_tree", Dict{String,Any}, nothing))
    return Kernel(field(body, "name", String), field(body, "plugin", String), field(body, "version", String),
        field(body, "doc", String, ""), map(Port, objects(body, "inputs")), map(Port, objects(body, "outputs")),
        map(Parameter, objects(body, "parameters")), field(body, "signature", String, nothing), split,
        field(body, "combine", String, "none"), tree,
        field(body, "streaming", Bool, false), field(body, "in_place", Bool, false))
end

function Base.show(io::IO, port::Port)
    ranks = port.rank_min == port.rank_max ? "$(port.rank_min)" : "$(port.rank_min) to $(port.rank_max)"
    print(io, port.name, ": Array of ", join(port.types, ", "), "; ndims ", ranks)
    port.role == "data" || print(io, "; ", port.role)
    isempty(port.doc) || print(io, "\n        ", replace(port.doc, '\n' => "\n        "))
end

# `repr` of an unsigned integer is hexadecimal.
shown(value) = repr(value)
shown(value::JSON.Whole) = string(value)

function Base.show(io::IO, parameter::Parameter)
    print(io, parameter.name, ": ", parameter.kind)
    if parameter.default === nothing
        print(io, ", required")
    elseif parameter.kind == "axis"
        print(io, ", default ndims(x)", parameter.default == 0 ? "" : " - $(parameter.default)")
    else
        print(io, ", default ", shown(parameter.default))
    end
    parameter.minimum === nothing || print(io, ", at least ", parameter.minimum)
    parameter.maximum === nothing || print(io, ", at most ", parameter.maximum)
    isempty(parameter.choices) || print(io, ", one of ", join(map(repr, parameter.choices), " "))
    isempty(parameter.doc) || print(io, "\n        ", replace(parameter.doc, '\n' => "\n        "))
end

Base.show(io::IO, kernel::Kernel) = print(io, kernel.plugin, '/', kernel.name, ' ', kernel.version, ": ",
    first(split(kernel.doc, '\n')))

function Base.show(io::IO, ::MIME"text/plain", kernel::Kernel)
    println(io, kernel.plugin, '/', kernel.name, ' ', kernel.version)
    isempty(kernel.doc) || println(io, kernel.doc)
    for (title, entries) in (("inputs", kernel.inputs), ("parameters", kernel.parameters), ("outputs", kernel.outputs))
        isempty(entries) && continue
        println(io, title)
        foreach(entry -> println(io, "    ", entry), entries)
    end
end
