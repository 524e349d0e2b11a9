# Hosts of this program's own, that end with it.
#
#   this program ── write end of a pipe ──▶ stdin of `strait serve --temporary --until-stdin-ends`
#
# Linux closes the pipe whatever the program dies of; no other process has that end, which is closed on exec.

"Longest ready line, and what is shown of one that is wrong and of the end of stderr."
const LINE_BYTES_MAX = 64 << 10
const SHOWN_CHARS = 200
const TAIL_BYTES = 2 << 10
"Seconds for which a host is waited for at the end of the program; before one that is not ready is killed; and after the end of its connection."
const END_SECONDS = 3.0
const KILL_SECONDS = 1.0
const DEATH_SECONDS = 1.0

"A host's process, from its start on."
mutable struct HostProcess
    name::String
    directory::String
    process::Base.Process
    stdin::Cint                        # -1 once closed
    stderr::IOStream                   # of a file without a name: it is gone with the last process that has it open
end

"A host that is started when it is asked for and not running."
mutable struct LocalHost
    lock::ReentrantLock                # held while it starts: whoever else wants it waits
    running::Union{Nothing,HostProcess}
end

"By what tells them apart: this process, plugins as they were at the start, settings."
const LOCAL_HOSTS = Dict{Any,LocalHost}()
const LOCAL_HOSTS_LOCK = ReentrantLock()

"""
    connect_local(; plugins = [], settings = Dict(), timeout = 60, options...)
    connect_local(f; ...)

Begins a session with a host of this program's own, which is started if it is not running yet. It is private to the program
and ends with it, however that ends. With a function first, it is called with the session, which is closed afterwards.

Calls with the same plugins and settings share one host: what one session publishes, the others see. Other plugins or
settings, or a plugin's file that has changed, are another host's. `close` ends the session, not the host. A host that has died is
succeeded by a new, empty one in the next call.

The host's program is `STRAIT_BIN`, else `strait` on the PATH.

- `plugins`: files to load beside the standard plugin
- `settings`: those of docs/operations.md, such as `Dict("limits.deadline_ms_default" => 5000)`; those of the environment hold, too
- `timeout`: seconds until the host must be ready
- `options`: those of [`connect`](@ref)

Throws [`NoHost`](@ref) if there is no such program or it does not become a host of this package's protocol, with the end of what it
wrote to stderr; `ArgumentError` for what is no plugin or setting.
"""
function connect_local(; plugins = String[], settings = Dict{String,Any}(), timeout::Real = 60, options...)
    plugins isa AbstractString && throw(ArgumentError("plugins is a list of files, also for one: plugins = [$(repr(plugins))]"))
    paths = [abspath(String(plugin)) for plugin in plugins]
    versions = map(paths) do path
        isfile(path) || throw(ArgumentError("plugin $path: there is no such file"))
        found = stat(path)
        (path, found.device, found.inode, found.size, found.mtime)
    end
    environment = settings_environment(settings)
    key = (getpid_now(), versions, sort!(collect(environment); by = first))
    host = lock(() -> get!(() -> LocalHost(ReentrantLock(), nothing), LOCAL_HOSTS, key), LOCAL_HOSTS_LOCK)
    running = lock(host.lock) do
        if host.running === nothing || process_exited(host.running.process)
            host.running === nothing || end_stdin!(host.running)
            host.running = start_host(["--plugin" => path for path in paths], environment, Float64(timeout))
        end
        return host.running
    end
    session = connect_to(running.directory; options...)
    session.connection.epitaph = () -> epitaph(running)
    return session
end

connect_local(f::Function; options...) = closing(f, connect_local(; options...))

"Settings as the host's environment has them."
function settings_environment(settings)
    environment = Dict{String,String}()
    for (given, value) in pairs(settings)
        key = String(given)
        occursin(r"\A[a-z]+\.[a-z_]+\z", key) || throw(ArgumentError(
            "setting $(repr(key)) is not of the form \"section.key\", such as \"limits.deadline_ms_default\""))
        key in ("server.directory", "server.tcp", "server.plugins") && throw(ArgumentError(
            "setting $(repr(key)) is not for a local host, which has a directory of its own and takes plugins = [...]"))
        value isa Union{Real,AbstractString} || throw(ArgumentError(
            "setting $(repr(key)) is $(repr(value)); it is a number, text or a truth value"))
        environment["STRAIT__" * uppercase(replace(key, "." => "__"))] = string(value)
    end
    return environment
end

"The host's program, and where it was found."
function host_program()
    named = get(ENV, "STRAIT_BIN", "")
    if !isempty(named)
        found = Sys.which(named)
        found === nothing && throw(NoHost(
            "STRAIT_BIN names $named, which is not a program that can be run; name the `strait` program, or unset it"))
        return (found, "from STRAIT_BIN")
    end
    found = Sys.which("strait")
    found === nothing && throw(NoHost(
        "there is no `strait` program on the PATH to start a host with; build it in strait's checkout (cargo install --path .), or name it in STRAIT_BIN"))
    return (found, "from the PATH")
end

function start_host(plugins, environment::Dict{String,String}, timeout::Float64)
    program, source = host_program()
    name = "$program ($source)"
    words = [program, "serve", "--temporary", "--until-stdin-ends", "--json", "--log-level", "warn"]
    foreach(((option, path),) -> push!(words, option, path), plugins)
    path, stderr = mktemp()
    rm(path)
    stdin, stdin_ours = pipe_ends()
    stdout_ours, stdout = pipe_ends()
    # Detached, that is in a process group of its own: a Ctrl-C is for this program, and the host must live to tell it
    # what became of its calls.
    command = detach(setenv(Cmd(words), merge(Dict{String,String}(ENV), environment)))
    process = try
        run(pipeline(command; stdin = RawFD(stdin), stdout = RawFD(stdout), stderr = RawFD(fd(stderr))); wait = false)
    catch e
        close_fd(stdin_ours)
        close_fd(stdout_ours)
        close(stderr)
        e isa Base.IOError || rethrow()
        throw(NoHost("$name cannot be started: $(e.msg)"))
    finally
        close_fd(stdin)
        close_fd(stdout)
    end
    host = HostProcess(name, "", process, stdin_ours, stderr)
    try
        host.directory = ready_directory(host, stdout_ours, timeout)
    catch
        kill_host(host)
        rethrow()
    finally
        close_fd(stdout_ours)
    end
    return host
end

"A pipe's end to read from and its end to write to."
function pipe_ends()
    ends = zeros(Cint, 2)
    systemerror("pipe2", ccall(:pipe2, Cint, (Ptr{Cint}, Cint), ends, O_CLOEXEC) != 0)
    return (ends[1], ends[2])
end

"Waits for the line that says that a host is ready: its directory."
function ready_directory(host::HostProcess, stdout::Cint, timeout::Float64)
    line = first_line(stdout, time() + timeout)
    line === nothing && throw(NoHost(
        "$(host.name) was not ready within $timeout s; connect_local(timeout = ...) waits longer$(tail(host))"))
    ready = try
        JSON.decode(line)
    catch e
        e isa JSON.ParseError || rethrow()
        nothing
    end
    ready isa Dict || (ready = Dict{String,Any}())
    address, protocol = get(ready, "address", nothing), get(ready, "protocol", nothing)
    if address isa String && startswith(address, "unix:///") && protocol isa Integer
        protocol == PROTOCOL_VERSION || throw(NoHost(
            "$(host.name) is strait $(get(ready, "version", "?")) and speaks protocol $protocol, this package, $CLIENT_VERSION, protocol $PROTOCOL_VERSION; " *
            "use versions that belong together: install the same one of both, or name its program in STRAIT_BIN"))
        return parse_address(address)
    end
    said = isempty(line) || haskey(ready, "error") ? "" : "; it said $(repr(first(line, SHOWN_CHARS)))"
    ends_within(host, DEATH_SECONDS) || throw(NoHost(
        "$(host.name) does not say that it is ready as strait $CLIENT_VERSION does$said; name the right program in STRAIT_BIN$(tail(host))"))
    throw(NoHost("$(host.name) started no host: it $(how(host))$said$(tail(host))"))
end

"The first line, or what there is of one at the end of the file; `nothing` if neither comes in time."
function first_line(from::Cint, until::Float64)
    line = UInt8[]
    buffer = Vector{UInt8}(undef, 4096)
    while !(UInt8('\n') in line) && length(line) < LINE_BYTES_MAX
        left = until - time()
        left > 0 || return nothing
        event = poll_fd(RawFD(from), left; readable = true)
        event.timedout && return nothing
        count = GC.@preserve buffer ccall(:read, Cssize_t, (Cint, Ptr{UInt8}, Csize_t), from, buffer, length(buffer))
        systemerror("read", count < 0)
        count == 0 && break
        append!(line, view(buffer, 1:count))
    end
    found = findfirst(isequal(UInt8('\n')), line)
    found === nothing || resize!(line, found - 1)
    return String(line)
end

ends_within(host::HostProcess, seconds::Float64) =
    process_exited(host.process) || timedwait(() -> process_exited(host.process), seconds; pollint = 0.01) === :ok

how(host::HostProcess) = host.process.termsignal != 0 ? "was ended by signal $(host.process.termsignal)" :
    "ended with exit code $(host.process.exitcode)"

"The end of what it wrote to stderr."
function tail(host::HostProcess)
    # Opened anew: a place in the file that is the host's, too, must not move.
    text = open("/proc/self/fd/$(fd(host.stderr))") do file
        length = filesize(file)
        seek(file, max(0, length - TAIL_BYTES))
        (length > TAIL_BYTES ? "..." : "") * strip(String(read(file)))
    end
    return isempty(text) ? "; it wrote nothing to stderr" : "; its stderr ends with:\n$text"
end

"How it died, if it did."
epitaph(host::HostProcess) = ends_within(host, DEATH_SECONDS) ? "; the host, $(host.name), $(how(host))$(tail(host))" : ""

function end_stdin!(host::HostProcess)
    host.stdin < 0 || close_fd(host.stdin)
    host.stdin = Cint(-1)
    return nothing
end

"Ends one that is not ready."
function kill_host(host::HostProcess)
    end_stdin!(host)
    # A real host removes its directory. Others are killed with whatever they started: they have a process group of their own.
    if !ends_within(host, KILL_SECONDS)
        ccall(:kill, Cint, (Cint, Cint), -getpid(host.process), Base.SIGKILL)
        wait(host.process)
    end
    close(host.stderr)
    return nothing
end

"At the end of the program its hosts are seen to end, so that not even a zombie is left of them."
function end_local_hosts()
    mine = [host.running for (key, host) in LOCAL_HOSTS if key[1] == getpid_now() && host.running !== nothing]
    foreach(end_stdin!, mine)
    foreach(host -> ends_within(host, END_SECONDS), mine)
    return nothing
end

__init__() = atexit(end_local_hosts)
