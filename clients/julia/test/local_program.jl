# A program of its own, run by local.jl: starts a host, tells of it, and ends when its stdin does.

using Strait

s = connect_local()
host = only(values(Strait.LOCAL_HOSTS)).running
# A child that is not waited for does not keep the host.
run(`sleep 60`; wait = false)
println(getpid(host.process), " ", host.directory)
flush(stdout)
read(stdin)
Strait.ping(s)
