using Strait: encode_frame, decode_frame, Mapping, Place, TensorSpec, parse_address, find_directory, owned

# Byte for byte.
frame = encode_frame(PING, UInt32(0x01020304), NamedTuple())
@test frame == vcat(UInt8['S', 'T', 2, 22, 4, 3, 2, 1, 2], zeros(UInt8, 39), UInt8['{', '}'])
@test decode_frame(frame) == (PING, 0x01020304, Dict{String,Any}(), UInt8[])
@test decode_frame(frame[1:8] |> head -> vcat(head, zeros(UInt8, 40))) == (PING, 0x01020304, Dict{String,Any}(), UInt8[])
@test sizeof(Strait.Header) == Strait.HEADER_BYTES
# The frames that every client's tests read.
frames = joinpath(@__DIR__, "../../../tests/conformance/frames.json")
if isfile(frames)
    table = Strait.JSON.decode(read(frames))
    @test table["version"] == Strait.PROTOCOL_VERSION && length(table["frames"]) > 2 && length(table["refused"]) > 9
    for good in table["frames"]
        op, sequence, text = Op(good["op"]), UInt32(good["sequence"]), good["body"]
        trace = Strait.TraceContext(Tuple(hex2bytes(good["trace_id"])), Tuple(hex2bytes(good["parent_id"])), UInt8(good["trace_flags"]))
        body, payload = Strait.JSON.decode(Vector{UInt8}(text)), hex2bytes(get(good, "payload", ""))
        # A Dict has no order: its fields are compared, and the header byte for byte.
        made, right = encode_frame(op, sequence, body; payload = payload, trace = trace), hex2bytes(good["hex"])
        @test made[1:Strait.HEADER_BYTES] == right[1:Strait.HEADER_BYTES] && right[Strait.HEADER_BYTES+1:end] == vcat(codeunits(text), payload)
        @test decode_frame(right) == (op, sequence, body, payload) == decode_frame(made)
    end
    for bad in table["refused"]
        says(thrown(() -> decode_frame(hex2bytes(bad["hex"])), ProtocolError), bad["says"]...)
    end
end

changed(at, byte) = (copy = Base.copy(frame); copy[at] = byte; copy)
for (packet, word) in (frame[1:47] => "47 bytes", changed(1, 0x00) => "magic", changed(3, 0x01) => "version 1", changed(4, 0x3f) => "op 63",
    changed(9, 0x03) => "3 bytes", changed(45, 0x01) => "flags", changed(49, UInt8('[')) => "no JSON")
    says(thrown(() -> decode_frame(packet), ProtocolError), word)
end
says(thrown(() -> decode_frame(encode_frame(OK, UInt32(1), [1])), ProtocolError), "no object")
says(thrown(() -> encode_frame(PING, UInt32(1), (x = "a"^61440,)), ArgumentError), "at most 61440")
# The longest frame, and one byte more of each part.
longest(body, payload) = encode_frame(OK, UInt32(1), (x = "a"^(body - 8),); payload = zeros(UInt8, payload))
@test length(decode_frame(longest(61440, 131072))[4]) == 131072 && length(longest(61440, 131072)) == 192560 == 48 + 61440 + 131072
says(thrown(() -> decode_frame(longest(61440, 131073)), ProtocolError), "131073 of payload", "at most")
says(thrown(() -> decode_frame(vcat(encode_frame(OK, UInt32(1), NamedTuple())[1:8], reinterpret(UInt8, [UInt32(61441)]), zeros(UInt8, 36), codeunits("{}" * " "^61439))), ProtocolError), "61441 bytes of body", "at most")
# What fits beside the longest body into the send buffer that Linux gives by itself, and into smaller ones.
@test [Strait.payload_room(bytes) for bytes in (212992, 192592, 192591, 61521, 61520, 4608, 0)] == [131072, 131072, 131071, 1, 0, 0, 0]

# Mappings: the host's word is held against itself.
body(tensors...; bytes = 1 << 17, version = 1) = Strait.JSON.decode(Strait.JSON.encode(
    Dict("strait-mmap" => version, "segment" => "0123", "bytes" => bytes, "writers" => "none", "tensors" => collect(tensors))))
mapping = Mapping(body(tensor("x", "float64", [2, 3], 65536, 48)))
@test mapping.places == [Place(TensorSpec("x", Float64, [3, 2]), 65536, 48)] || mapping.places[1].spec.dims == [3, 2]
@test repr(mapping.places[1].spec) == "x: Float64[3, 2]"
@test Mapping(body(tensor("x", "bfloat16", [], 65536, 2))).places[1].spec.dims == []
@test Mapping(body(tensor("x", "complex64", [0, 5], 131071, 0))).places[1].bytes == 0
for (given, E, word) in (
    (body(tensor("x", "float64", [8193], 65536, 65544)), ProtocolError, "65544 bytes at 65536, the segment 131072"),
    (body(tensor("x", "float64", [8192], 65536, 1 << 17)), ProtocolError, "65536 bytes, not 131072"),
    (body(tensor("x", "float64", [1], 65544, 8)), ProtocolError, "no multiple of 64"),
    (body(tensor("x", "float64", [1], -8, 8)), ProtocolError, "no size"),
    (body(tensor("x", "float64", [1.5], 0, 8)), ProtocolError, "no size"),
    (body(tensor("x", "float64", [typemax(Int), typemax(Int)], 0, 8)), ProtocolError, "not 8"),
    (body(tensor("x", "float64", [1 << 32, 1 << 32, 1 << 32], 0, 0)), ProtocolError, "not 0"),
    (body(tensor("x", "int8", [0, 4, 1 << 62], 0, 0)), ProtocolError, "overflow"),
    (body(tensor("x", "decimal", [1], 0, 8)), MappingError, "decimal"),
    (body(; version = 2), ProtocolError, "version 2"),
    (body(; bytes = "many"), ProtocolError, "bytes"),
)
    says(thrown(() -> Mapping(given), E), word)
end

# Where the host is.
@test parse_address("unix:///run/strait") == "/run/strait"
for wrong in ("", "/run/strait", "unix:/run", "unix://run/strait", "grpc://host:1")
    says(thrown(() -> parse_address(wrong), ArgumentError), repr(wrong))
end
mktempdir() do directory
    at(name) = (path = joinpath(directory, name); mkpath(path); touch(joinpath(path, "data.sock")); path)
    runtime, session = at("runtime"), at("session/strait")
    all = Dict("STRAIT_ADDRESS" => "unix:///named", "RUNTIME_DIRECTORY" => runtime, "XDG_RUNTIME_DIR" => joinpath(directory, "session"))
    without(names...) = find_directory(filter(entry -> !(entry.first in names), all), 4_000_000_000)
    @test without() == "/named"
    @test without("STRAIT_ADDRESS") == runtime
    @test without("STRAIT_ADDRESS", "RUNTIME_DIRECTORY") == session
    # A service's own runtime directory without a host in it does not hide the host.
    rm(joinpath(runtime, "data.sock"))
    @test without("STRAIT_ADDRESS") == session
    says(thrown(() -> find_directory(Dict{String,String}(), 4_000_000_000), NoHost), "/tmp/strait-4000000000/data.sock", "strait serve")

    chmod(directory, 0o700)
    @test owned(directory, Strait.effective_uid()) == directory
    chmod(directory, 0o777)
    says(thrown(() -> owned(directory, Strait.effective_uid()), NoHost), "mode 777")
    chmod(directory, 0o700)
    says(thrown(() -> owned(directory, Strait.effective_uid() + 1), NoHost), "belongs to uid")
    symlink(directory, joinpath(directory, "link"))
    @test_throws NoHost owned(joinpath(directory, "link"), Strait.effective_uid())
    says(thrown(() -> connect("unix://" * directory), NoHost), "data.sock", "strait serve")
    says(thrown(() -> connect("unix://" * directory * "/" * "x"^100), ArgumentError), "107")
end
