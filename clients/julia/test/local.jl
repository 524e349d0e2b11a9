# Hosts that a program starts for itself; with STRAIT_BIN real ones, and programs that are none.

"Calls `f` with an empty directory, where hosts put theirs, and sees that nothing is left that was not there before."
function in_place(f)
    mktempdir("/tmp"; prefix = "strait-julia-") do place
        children() = length(split(read("/proc/self/task/$(getpid())/children", String)))
        before = children()
        withenv(() -> f(place), "TMPDIR" => place)
        for host in Base.values(Strait.LOCAL_HOSTS)
            host.running === nothing && continue
            Strait.end_stdin!(host.running)
            @test Strait.ends_within(host.running, 10.0)
        end
        empty!(Strait.LOCAL_HOSTS)
        @test children() == before
        @test filter(startswith("strait-host-"), readdir(place)) == []
    end
end

function script(place, text)
    path = joinpath(place, "strait")
    write(path, "#!/bin/sh\n$text\n")
    chmod(path, 0o755)
    return path
end

failing(program; options...) =
    withenv(() -> thrown(() -> connect_local(; options...), NoHost), "STRAIT_BIN" => program)

"Whether a process is there, and not a zombie that only waits for whoever reaps orphans here."
function runs(pid)
    stat = try
        read("/proc/$pid/stat", String)
    catch e
        e isa SystemError || rethrow()
        return false
    end
    return split(stat[findlast(')', stat)+1:end])[1] != "Z"
end

@testset "programs that are no host" begin
    ready(protocol) = """echo '{"version": "9.9.9", "protocol": $protocol, "address": "unix:///no/such"}'; exec cat"""
    for (text, parts) in (
        "exit 3" => ["ended with exit code 3", "wrote nothing to stderr"],
        "echo out of order >&2; exit 1" => ["ended with exit code 1", "stderr ends with:\nout of order"],
        "kill -9 \$\$" => ["was ended by signal 9"],
        "echo hello; exec cat" => ["does not say that it is ready", "said \"hello\"", "STRAIT_BIN"],
        "printf half; exec >&-; exec cat" => ["said \"half\""],
        "exec cat /dev/zero" => ["said \"\\0"],
        "echo '[1]'; exec cat" => ["said \"[1]\""],
        "echo '{\"address\": 3}'; exec cat" => ["does not say that it is ready"],
        ready(1) => ["strait 9.9.9", "protocol 1", "protocol $(Strait.PROTOCOL_VERSION)", "STRAIT_BIN"],
        ready(Int(Strait.PROTOCOL_VERSION)) => ["no strait host at /no/such/data.sock"],
    )
        in_place(place -> says(failing(script(place, text)), parts...))
    end
    in_place() do place
        says(failing(script(place, "echo waits >&2; sleep 60"); timeout = 0.3), "not ready within 0.3 s", "timeout", "waits")
        says(failing(joinpath(place, "missing")), "STRAIT_BIN names")
        withenv("PATH" => place, "STRAIT_BIN" => nothing) do
            rm(joinpath(place, "strait"))
            says(thrown(connect_local, NoHost), "on the PATH", "STRAIT_BIN", "cargo install")
        end
    end
    # Of a program that cannot be run Julia 1.5 itself leaves a zombie.
    mktempdir() do place
        program = joinpath(place, "no-shell")
        write(program, "#!/no/such/shell\n")
        chmod(program, 0o755)
        says(failing(program), "$program (from STRAIT_BIN) cannot be started")
    end
    says(thrown(() -> connect_local(plugins = "my.wasm"), ArgumentError), "plugins = [\"my.wasm\"]")
    says(thrown(() -> connect_local(plugins = ["missing.wasm"]), ArgumentError), "missing.wasm")
    for (settings, part) in (
        Dict("deadline" => 1) => "section.key", Dict("limits.deadline ms" => 1) => "section.key",
        Dict("server.tcp" => "127.0.0.1:1") => "server.tcp", Dict("limits.log_bytes" => nothing) => "limits.log_bytes",
    )
        says(thrown(() -> connect_local(settings = settings), ArgumentError), part)
    end
end

haskey(ENV, "STRAIT_BIN") && @testset "a host is shared" begin
    in_place() do place
        id(s) = s.welcome["host_id"]
        s = connect_local()
        tasks = [@async(id(connect_local())) for _ in 1:8]
        @test all(==(id(s)), map(fetch, tasks))
        x = zeros(s, Float64, 1000, 100)
        x .= 1:1000
        @test call(s, "scale-shift", x; a = 2, b = 1) == 2 .* x .+ 1
        publish!(s, "x", x)
        @test connect_local(t -> sum(fetch(t, "x"))) == sum(x)
        limited = connect_local(settings = Dict("limits.deadline_ms_default" => 4321))
        @test limited.welcome["deadline_ms_default"] == 4321 && id(limited) != id(s)
        if haskey(ENV, "STRAIT_TEST_PLUGINS")
            plugin = joinpath(place, "plugin.wasm")
            guest(name) = cp(joinpath(ENV["STRAIT_TEST_PLUGINS"], name), plugin; force = true)
            guest("counts_runs.wasm")
            one, same = connect_local(plugins = [plugin]), connect_local(plugins = [plugin])
            guest("copies.wasm")
            other = connect_local(plugins = [plugin])
            @test id(one) == id(same) != id(other) && length(kernels(other)) == length(kernels(s)) + 1
        end
        write(joinpath(place, "not.wasm"), "not a component")
        says(failing(ENV["STRAIT_BIN"]; plugins = [joinpath(place, "not.wasm")]), "exit code 1", "not.wasm")

        host = only(host.running for host in Base.values(Strait.LOCAL_HOSTS) if host.running !== nothing && host.running.directory == s.directory)
        pid = getpid(host.process)
        run(`kill -9 $pid`)
        says(thrown(() -> call(s, "scale-shift", "x"; a = 2), Disconnected), "was ended by signal 9", ENV["STRAIT_BIN"])
        @test !ispath("/proc/$pid")
        successor = connect_local()
        @test id(successor) != id(s) && isempty(flights(successor))
        # What a host that is killed leaves behind.
        rm(s.directory; recursive = true)
    end
end

haskey(ENV, "STRAIT_BIN") && @testset "a host ends with its program" begin
    for number in (0, 9)
        in_place() do place
            file = joinpath(@__DIR__, "local_program.jl")
            program = open(pipeline(`$(Base.julia_cmd()) --startup-file=no $file`; stderr = stderr), "r+")
            pid, directory = split(readline(program))
            @test runs(pid) && dirname(directory) == place
            number == 0 ? close(program.in) : kill(program, number)
            wait(program)
            @test success(program) == (number == 0)
            @test soon(() -> !runs(pid) && !ispath(directory))
        end
    end
end
