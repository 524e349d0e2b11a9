# The first program: fill an Array in shared memory, run a kernel over it, read the result.
# It needs a host (`strait serve`):  JULIA_LOAD_PATH="clients/julia:@stdlib" julia examples/julia/first.jl
using Strait

s = connect()
x = zeros(s, Float64, 1000, 1000)      # an Array inside a segment
x .= 1:1000                            # filled in place
y = call(s, "zscore", x; axis = 1)     # an Array over the result's pages
println("first elements, scaled: ", y[1:3, 1])
println("bytes copied by this program: ", stats(s).copied_bytes)
