# What the consumer does with each tensor. Every path of the comparison runs this very code.

"The sum of all elements, added in whatever order SIMD likes best. It allocates nothing."
function total(y::Array{Float64})
    sum = 0.0
    @inbounds @simd for i in eachindex(y)
        sum += y[i]
    end
    return sum
end

"""
Sums `y` and answers `(sum, bytes that Julia allocated meanwhile, seconds)`.
"""
function measured_total(y::Array{Float64})
    sum = Ref(0.0)
    begun = time_ns()
    allocated = @allocated sum[] = total(y)
    return sum[], allocated, (time_ns() - begun) / 1e9
end
