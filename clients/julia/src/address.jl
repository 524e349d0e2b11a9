# Finding the host: from an address or the environment to the directory of `data.sock`.

const DATA_SOCKET = "data.sock"

effective_uid() = Int(ccall(:geteuid, Cuint, ()))

"The directory that an address names; throws `ArgumentError`."
function parse_address(address::AbstractString)
    startswith(address, "unix:///") || throw(ArgumentError(
        "address $(repr(address)) is not of the form unix:///DIRECTORY (an absolute path); this client reaches hosts on the same machine only"))
    return String(address[length("unix://")+1:end])
end

"""
The runtime directory of the host that the environment leads to: `STRAIT_ADDRESS` alone if it is set; else the first
of `RUNTIME_DIRECTORY`, `XDG_RUNTIME_DIR/strait`, `/run/strait` (as root) and `/tmp/strait-UID` that has a `data.sock`.
"""
function find_directory(environment = ENV, uid::Int = effective_uid())
    given(name) = get(environment, name, "")
    isempty(given("STRAIT_ADDRESS")) || return parse_address(given("STRAIT_ADDRESS"))
    places = String[]
    isempty(given("RUNTIME_DIRECTORY")) || push!(places, given("RUNTIME_DIRECTORY"))
    isempty(given("XDG_RUNTIME_DIR")) || push!(places, joinpath(given("XDG_RUNTIME_DIR"), "strait"))
    uid == 0 && push!(places, "/run/strait")
    for place in places
        ispath(joinpath(place, DATA_SOCKET)) && return place
    end
    # The one place that anybody can create, hence the check of its owner.
    shared = "/tmp/strait-$uid"
    ispath(joinpath(shared, DATA_SOCKET)) && return owned(shared, uid)
    sockets = join((joinpath(place, DATA_SOCKET) for place in push!(places, shared)), ", ")
    throw(NoHost("none of $sockets exists; start a host with `strait serve`, or name its directory by an address (unix:///DIRECTORY) or in STRAIT_ADDRESS"))
end

function owned(directory::String, uid::Int)
    # Not `stat`: a link would answer with the owner of its target.
    found = lstat(directory)
    isdir(found) && Int(found.uid) == uid && filemode(found) & 0o022 == 0 && return directory
    mode = string(filemode(found) & 0o7777; base = 8)
    throw(NoHost("$directory belongs to uid $(Int(found.uid)) with mode $mode; a host's directory there belongs to uid $uid and only it can write to it: remove it, or name the host's directory by an address"))
end
