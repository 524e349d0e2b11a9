# JULIA_LOAD_PATH="clients/julia:@stdlib" julia clients/julia/bench/calls.jl [ADDRESS]
# Ratios of this client, each against its baseline in the same run: small calls against an empty round trip, filling a
# new segment against filling a plain memfd, the first pass over a result against the second. Needs a host.

using Strait

const MIB = 1 << 20
const LARGE = 100MIB

seconds(f) = (began = time_ns(); f(); (time_ns() - began) / 1e9)
"A value of `sorted` below which `part` of them lie."
quantile(sorted, part) = sorted[clamp(ceil(Int, length(sorted) * part), 1, length(sorted))]
median(values) = quantile(sort(values), 0.5)

function report(name, unit, measured, baseline, of)
    println(rpad(name, 46), lpad(round(measured * unit; digits = 1), 9), lpad(round(baseline * unit; digits = 1), 9),
        unit == 1e6 ? " us" : " ms", lpad(round(measured / baseline; digits = 2), 8), "  times ", of)
end

"Small calls in turns with pings, so that whatever else the machine does meets both."
function small_calls(s, count)
    plain, x = zeros(128), zeros(s, Float64, 128)
    in_frames() = call(s, "scale-shift", plain; a = 2)
    in_segments() = release!(s, call(s, "scale-shift", x; a = 2, options = (inline_bytes = 0,)))
    scale = prepare(s, "scale-shift", plain; a = 2)
    prepared() = scale(plain)
    ping() = Strait.ping(s)
    foreach(_ -> (prepared(); in_frames(); in_segments(); ping()), 1:300)
    ready, framed, mapped, pings = Float64[], Float64[], Float64[], Float64[]
    for _ in 1:count
        foreach((times, ask) -> push!(times, seconds(ask)), (ready, framed, mapped, pings), (prepared, in_frames, in_segments, ping))
    end
    close(scale)
    for (what, times) in (("prepared", ready), ("in frames", framed), ("in segments, and release", mapped)), (name, part) in (("p50", 0.5), ("p99", 0.99))
        report("call of 1 KiB $what, $name", 1e6, quantile(sort(times), part), quantile(sort(pings), part), "a PING")
    end
end

"Filling a new memfd of the same size, mapped as anybody would."
function fill_plain(bytes)
    fd = ccall(:memfd_create, Cint, (Cstring, Cuint), "plain", 1)
    systemerror("memfd_create", fd < 0)
    systemerror("ftruncate", ccall(:ftruncate, Cint, (Cint, Int64), fd, bytes) != 0)
    address = ccall(:mmap, Ptr{Cvoid}, (Ptr{Cvoid}, Csize_t, Cint, Cint, Cint, Int64), C_NULL, bytes, 3, 1, fd, 0)
    systemerror("mmap", address == Ptr{Cvoid}(-1))
    fill!(unsafe_wrap(Array, Ptr{Float64}(address), bytes ÷ 8), 1.5)
    ccall(:munmap, Cint, (Ptr{Cvoid}, Csize_t), address, bytes)
    ccall(:close, Cint, (Cint,), fd)
end

function large_arrays(s, count)
    fills, plain, first_passes, second_passes = Float64[], Float64[], Float64[], Float64[]
    huge = Strait.client_stats(s).huge_bytes
    for round in 0:count
        x = Ref{Any}()
        filled = seconds(() -> x[] = fill!(zeros(s, Float64, LARGE ÷ 8), 1.5))
        baseline = seconds(() -> fill_plain(LARGE))
        y = call(s, "scale-shift", x[]; a = 2)
        first_pass, second_pass = seconds(() -> sum(y)), seconds(() -> sum(y))
        # The first round compiles.
        round == 0 && (huge = Strait.client_stats(s).huge_bytes)
        round == 0 || foreach(push!, (fills, plain, first_passes, second_passes), (filled, baseline, first_pass, second_pass))
        release!(s, (x[], y))
    end
    report("CREATE and first fill of 100 MiB", 1e3, median(fills), median(plain), "a plain memfd's")
    report("first pass over a result of 100 MiB", 1e3, median(first_passes), median(second_passes), "the second")
    share = (Strait.client_stats(s).huge_bytes - huge) / (count * LARGE)
    println("born in huge pages: ", round(Int, 100share), " % of the bytes to fill")
end

connect(ARGS...) do s
    println(rpad("", 46), lpad("measured", 9), lpad("baseline", 9))
    small_calls(s, 2000)
    large_arrays(s, 9)
end
