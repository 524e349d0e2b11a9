# A program of its own, run by live_channel.jl: one end of a channel, until it is killed or its input ends.

using Strait

address, what = ARGS
say(word) = (println(word); flush(stdout))
levels = Strait.TensorSpec(Float64, 4)
s = connect(address)
if what == "produces"
    st = prepare_stream(s, "cumsum", levels; options = (channel = (name = "levels", batches = 2),))
    chunk!(st, [1.0])
    chunk!(st, [1.0])
    say("came")
    readline()
elseif what == "reads"
    reader = read_channel(s, "levels")
    iterate(reader)
    say("came")
    readline()
    close(reader)
    readline()
elseif what == "both"
    # Writers and readers on all threads, while garbage is collected: none of them holds the others up.
    Threads.nthreads() == 2 || error("$(Threads.nthreads()) threads, not 2")
    x = randn(2, 500)
    function writes(name)
        st = prepare_stream(s, "cumsum", Strait.TensorSpec(Float64, 2, 16); options = (channel = (name = name, batches = 4),))
        foreach(n -> chunk!(st, x[:, n:n+9]), 1:10:481)
        last!(st, x[:, 491:500])
    end
    function reads(name)
        reader = nothing
        while reader === nothing
            reader = try
                read_channel(s, name)
            catch e
                e isa RemoteError && e.reason == "CHANNEL_NOT_FOUND" || rethrow()
                sleep(0.01)
            end
        end
        return reduce(hcat, collect(reader))
    end
    right = copy(call(s, "cumsum", x))
    for _ in 1:3
        writers = [Threads.@spawn(writes("channel $n")) for n in 1:3]
        readers = [Threads.@spawn(reads("channel $n")) for n in 1:3]
        while !all(istaskdone, readers)
            GC.gc(false)
            sleep(0.01)
        end
        foreach(wait, writers)
        all(reader -> fetch(reader) == right, readers) || error("other rows than of one call")
    end
    say("done")
end
close(s)
