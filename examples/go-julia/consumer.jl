# The consumer: maps tensors that a strait host publishes and reduces them in place. The producer tells it what to
# do, a line for each command on standard input, and gets a line of JSON back on standard output:
#
#   map NAME                  map a flight, reduce it, give it back
#   inspect NAME              the same, and say which memory file it was and what every element was
#   get PORT PATH             the same data as JSON from an HTTP server on this machine
#
#   julia --project=clients/julia examples/go-julia/consumer.jl ADDRESS

import Sockets
using Strait: Strait, release!

include("reduce.jl")
include("json_numbers.jl")

seconds_since(begun) = (time_ns() - begun) / 1e9

"`fetch` answers whatever type the flight has; this program knows one."
fetched(session, name) = fetch(session, name)::Vector{Float64}

function map_and_reduce(session, name)
    begun = time_ns()
    y = fetched(session, name)
    mapped = seconds_since(begun)
    sum, allocated, pass = measured_total(y)
    # The sum is what the producer waits for; nobody waits for the pages.
    reply((sum = sum, elements = length(y), allocated = allocated, map = mapped, reduce = pass))
    release!(session, y)
end

function inspect(session, name)
    y = fetched(session, name)
    device, inode = memory_file(pointer(y))
    found = digest(y)
    # Every page was touched by now: this is the pass over the elements and nothing else.
    sum, allocated, pass = measured_total(y)
    elements = length(y)
    begun = time_ns()
    release!(session, y)
    reply((sum = sum, elements = elements, allocated = allocated, pass = pass, release = seconds_since(begun),
        digest = found, device = device, inode = inode))
end

"Depends on every bit and on the place of every element; the producer has the same."
function digest(y::Vector{Float64})
    found = UInt64(0)
    for i in eachindex(y)
        found += reinterpret(UInt64, y[i]) * UInt64(2i - 1)
    end
    return found
end

"Device and inode of the file that is mapped at an address."
function memory_file(address::Ptr)
    for line in eachline("/proc/self/maps")
        range, _, _, device, inode = split(line)
        from, to = (parse(UInt64, bound; base = 16) for bound in split(range, '-'))
        if from <= UInt64(address) < to
            major, minor = (parse(UInt64, part; base = 16) for part in split(device, ':'))
            # As the C library's makedev.
            number = (major & 0xfffff000) << 32 | (major & 0xfff) << 8 | (minor & 0xffffff00) << 12 | (minor & 0xff)
            return number, parse(UInt64, inode)
        end
    end
    error("nothing is mapped at $address")
end

"A connection to the HTTP server, and the memory that its answers are read to; all are kept."
mutable struct HttpClient
    socket::Union{Nothing,Sockets.TCPSocket}
    text::Vector{UInt8}
    numbers::Vector{Float64}
end

function get_and_reduce(client::HttpClient, port, path)
    client.socket === nothing && (client.socket = Sockets.connect(Sockets.localhost, port))
    begun = time_ns()
    receive!(client, path)
    received = seconds_since(begun)
    begun = time_ns()
    parse_numbers!(client.numbers, client.text)
    parsed = seconds_since(begun)
    sum, _, pass = measured_total(client.numbers)
    reply((sum = sum, elements = length(client.numbers), receive = received, text = length(client.text) - 1,
        parse = parsed, reduce = pass))
end

"One GET. The body gets a NUL behind it, for the C library's sake."
function receive!(client::HttpClient, path)
    socket = client.socket::Sockets.TCPSocket
    write(socket, "GET $path HTTP/1.1\r\nHost: localhost\r\n\r\n")
    status = readline(socket)
    startswith(status, "HTTP/1.1 200 ") || error("the producer answered $(repr(status)) to GET $path")
    bytes = -1
    while true
        line = readline(socket)
        isempty(line) && break
        name, value = split(line, ':'; limit = 2)
        lowercase(name) == "content-length" && (bytes = parse(Int, value))
    end
    bytes >= 0 || error("the producer's answer to GET $path has no Content-Length")
    resize!(client.text, bytes + 1)
    GC.@preserve client unsafe_read(socket, pointer(client.text), bytes)
    client.text[end] = 0x00
    return nothing
end

function obey(session, client, command, arguments)
    command == "map" && return map_and_reduce(session, arguments...)
    command == "inspect" && return inspect(session, arguments...)
    command == "get" && return get_and_reduce(client, parse(Int, arguments[1]), arguments[2])
    error("unknown command $(repr(command))")
end

"A line of JSON; all values are numbers."
function reply(fields)
    println("{", join(("\"$key\":$value" for (key, value) in pairs(fields)), ','), "}")
    flush(stdout)
end

function main(address)
    Strait.connect(address) do session
        client = HttpClient(nothing, UInt8[], Float64[])
        reply((ready = true,))
        for line in eachline(stdin)
            words = split(line)
            obey(session, client, words[1], words[2:end])
        end
    end
end

length(ARGS) == 1 || (println(stderr, "usage: julia --project=clients/julia consumer.jl ADDRESS"); exit(2))
main(ARGS[1])
