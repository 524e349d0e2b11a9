# When leases are renewed, by a clock that each test sets.

using Strait: Leases, hold!, renewed!, gone!, end!, due!, take_ended!, why_gone, renew_interval

ids(numbers...) = UInt64[numbers...]

# At half of the life, but not more often than each 5 ms.
for (life, interval) in (60.0 => 30.0, 0.02 => 0.01, 0.001 => 0.005, 0.0 => 0.005)
    @test renew_interval(life) == interval
    leases = Leases(true)
    @test hold!(leases, UInt64(1), life, 100.0) == 100.0 + interval
    @test due!(leases, 100.0 + interval / 2 - 1e-6) == ([], 100.0 + interval)
    # Half of the waiting time early: with a neighbour.
    @test due!(leases, 100.0 + interval / 2 + 1e-6) == ([(life, ids(1))], Inf)
end

# Neighbours in time together, each life by itself, and nothing twice before it was renewed.
leases = Leases(true)
@test [hold!(leases, UInt64(id), life, at) for (id, life, at) in ((1, 60.0, 0.0), (2, 60.0, 6.0), (3, 30.0, 0.0))] == [30, 36, 15]
due, next = due!(leases, 15.0)
@test sort(due) == [(30.0, ids(3)), (60.0, ids(1))] && next == 36
@test due!(leases, 36.0) == ([(60.0, ids(2))], Inf)
@test due!(leases, 100.0) == ([], Inf)
@test renewed!(leases, ids(1, 2, 3), 60.0, 36.0) == 66
@test due!(leases, 66.0) == ([(60.0, ids(1, 2, 3))], Inf)

# What is over is neither renewed nor released, and a reply that was under way does not bring it back.
leases = Leases(true)
hold!(leases, UInt64(1), 60.0, 0.0)
hold!(leases, UInt64(2), 60.0, 0.0)
@test why_gone(leases, UInt64(1)) === nothing
gone!(leases, UInt64(1), "expired")
@test why_gone(leases, UInt64(1)) == "expired" && why_gone(leases, UInt64(3)) == "lease 3 is over"
@test renewed!(leases, ids(1, 3), 60.0, 10.0) == Inf && due!(leases, 30.0) == ([(60.0, ids(2))], Inf)
foreach(id -> end!(leases, id), ids(1, 2, 3))
@test take_ended!(leases) == [ids(2)] && isempty(take_ended!(leases)) && isempty(leases.held)

# Many, in frames that fit.
leases = Leases(true)
many = [typemax(UInt64) - UInt64(n) for n in 0:2Strait.LEASES_MAX]
foreach(id -> hold!(leases, id, 60.0, 0.0), many)
due, _ = due!(leases, 30.0)
@test [length(part) for (_, part) in due] == [Strait.LEASES_MAX, Strait.LEASES_MAX, 1]
@test vcat((part for (_, part) in due)...) == sort(many)
for (_, part) in due
    @test Strait.encode_frame(RENEW, UInt32(1), (leases = part, lease_ms = Strait.LIFE_MS_MAX)) isa Vector{UInt8}
end

# Without renewal nothing is due.
leases = Leases(false)
@test hold!(leases, UInt64(1), 60.0, 0.0) == Inf && due!(leases, 100.0) == ([], Inf)
