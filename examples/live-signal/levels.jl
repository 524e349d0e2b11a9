# Reads both channels of live-signal and prints levels: ADDRESS EVERY [PICTURE]. See README.md.

using Printf, Strait

const WHISTLE_POWER = 0.25^2 / 2
# The filter has seen nothing before the first row.
const WARM_BATCHES = 1
# A tenth of a second: a point of the spectrum for each 10 Hz.
const PICTURE_BATCHES = 10

decibel(power) = 10 * log10(max(power, 1e-12))

"Begins to read a channel as soon as its producer has opened it."
function reader(session, name)
    for _ in 1:600
        try
            return read_channel(session, name)
        catch e
            e isa RemoteError && e.reason == "CHANNEL_NOT_FOUND" || rethrow()
        end
        sleep(0.1)
    end
    error("nobody has opened the channel $name for a minute")
end

"Mean power and peak of each row of `y`: of each of the signal's channels."
function levels(y)
    rms, peak = zeros(size(y, 1)), zeros(size(y, 1))
    for column in eachcol(y), (i, sample) in enumerate(column)
        rms[i] += Float64(sample)^2
        peak[i] = max(peak[i], abs(sample))
    end
    return rms ./ size(y, 2), peak
end

function tell(number, before, after, peak)
    for (i, side) in enumerate(("left ", "right"))
        i == 1 ? @printf("%8.2f s  ", number / 100) : print("            ")
        @printf("%s  %6.1f dB  filtered %6.1f dB, peak %6.1f dB\n", side, decibel(before[i]), decibel(after[i]), decibel(peak[i]^2))
    end
end

"What was filtered away is the whistle, and nothing else."
function check(number, before, after)
    number <= WARM_BATCHES && return
    for i in eachindex(before)
        gone = before[i] - after[i]
        abs(gone - WHISTLE_POWER) < 0.02 * before[i] ||
            error("batch $number: the filter took a power of $gone away; the whistle has $WHISTLE_POWER")
    end
end

function main(address, every, picture)
    session = connect(address)
    filtered, power = reader(session, "filtered"), reader(session, "power")
    recent = Matrix{Float32}[]
    for y in filtered
        # Its last row is the mean of all rows of this chunk.
        before = Float64.(iterate(power)[1][:, end])
        after, peak = levels(y)
        filtered.number == power.number || error("batch $(filtered.number) beside batch $(power.number)")
        check(filtered.number, before, after)
        filtered.number % every == 0 && tell(filtered.number, before, after, peak)
        push!(recent, y)
        length(recent) > PICTURE_BATCHES && popfirst!(recent)
    end
    isnothing(iterate(power)) || error("there is more power than signal")
    println("$(filtered.number) batches, in order, and the whistle is gone from each")
    picture === nothing || draw(picture, reduce(hcat, recent))
    close(session)
end

"Power at each multiple of 10 Hz, in dB: a plain Fourier sum with a Hann window."
function spectrum(x)
    n = length(x)
    windowed = [x[i] * (1 - cos(2π * (i - 0.5) / n)) for i in 1:n]
    return [decibel(2 * abs2(sum(windowed[i] * cis(-2π * k * (i - 1) / n) for i in 1:n) / n)) for k in 1:n÷2-1]
end

"Writes the spectra of both rows of `x` as a picture."
function draw(path, x)
    width, height, margin = 900, 360, 50
    across(k, n) = round(margin + (width - 2margin) * k / n; digits = 1)
    down(dB) = round(margin + (height - 2margin) * clamp(-dB / 120, 0, 1); digits = 1)
    open(path, "w") do file
        println(file, """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 $width $height" font-family="sans-serif" font-size="12">
            <rect width="$width" height="$height" fill="white"/>""")
        for kHz in 0:4:24
            at = across(kHz, 24)
            println(file, """<path d="M$at $margin V$(height - margin)" stroke="#ddd"/><text x="$at" y="$(height - margin + 18)" text-anchor="middle">$kHz kHz</text>""")
        end
        for dB in 0:-20:-120
            println(file, """<path d="M$margin $(down(dB)) H$(width - margin)" stroke="#ddd"/><text x="$(margin - 6)" y="$(down(dB) + 4)" text-anchor="end">$dB</text>""")
        end
        for (i, (side, colour)) in enumerate((("left", "#1f77b4"), ("right", "#d62728")))
            points = spectrum(x[i, :])
            line = join(("$(across(k, length(points))),$(down(dB))" for (k, dB) in enumerate(points)), " ")
            println(file, """<polyline points="$line" fill="none" stroke="$colour"/><text x="$(width - margin)" y="$(margin + 16i)" text-anchor="end" fill="$colour">$side, filtered</text>""")
        end
        println(file, "</svg>")
    end
    println("the spectrum of the last $(size(x, 2)) rows: $path")
end

main(ARGS[1], parse(Int, ARGS[2]), length(ARGS) > 2 ? ARGS[3] : nothing)
