package main

import (
	"math"
	"time"
)

const (
	rate      = 48000
	channels  = 2
	chunkRows = rate / 100
	chunkTime = 10 * time.Millisecond

	whistle      = 9000
	whistleLevel = 0.25
)

// tones of the left and the right channel. All are whole periods in a chunk.
var tones = [channels]float64{400, 600}

var base = func() (base [2][chunkRows * channels]float32) {
	for i := range chunkRows * channels {
		row, channel := i/channels, i%channels
		base[0][i] = float32(sine(tones[channel], row))
		base[1][i] = float32(whistleLevel * sine(whistle, row))
	}
	return base
}()

func sine(frequency float64, row int) float64 {
	return math.Sin(2 * math.Pi * frequency * float64(row) / rate)
}

// fill makes the chunk of that number: in each channel a tone that swells and fades, right when left fades, and a whistle over it
// that stays.
func fill(x []float32, number int) {
	swell := math.Sin(2 * math.Pi * float64(number) * chunkTime.Seconds() / 4)
	amplitude := [channels]float32{float32(0.4 + 0.3*swell), float32(0.4 - 0.3*swell)}
	for i := range x {
		x[i] = amplitude[i%channels]*base[0][i] + base[1][i]
	}
}

// lowPass is a sinc at 3 kHz in a Hamming window: what is below 1.5 kHz passes, what is above 4.5 kHz does not.
func lowPass() []float64 {
	const taps, edge = 63, 3000.0 / rate
	all, sum := make([]float64, taps), 0.0
	for i := range all {
		at := float64(i - taps/2)
		all[i] = 2 * edge
		if at != 0 {
			all[i] = math.Sin(2*math.Pi*edge*at) / (math.Pi * at)
		}
		all[i] *= 0.54 - 0.46*math.Cos(2*math.Pi*float64(i)/(taps-1))
		sum += all[i]
	}
	for i := range all {
		all[i] /= sum
	}
	return all
}
