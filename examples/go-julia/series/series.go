// Package series is the data of the example and what the plugin does to it, in Go.
package series

import "math"

// Fill writes uniform numbers of full precision in [0, 1): the same for the same seed.
func Fill(x []float64, seed uint64) {
	state := seed * 0x9e3779b97f4a7c15
	for i := range x {
		// splitmix64: its jumps are independent of each other, so the loop is as fast as memory.
		state += 0x9e3779b97f4a7c15
		z := state
		z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
		z = (z ^ z>>27) * 0x94d049bb133111eb
		x[i] = float64((z^z>>31)>>11) * 0x1p-53
	}
}

// Average writes the means of each window neighbouring elements of x to y, which is as long as
// Means says. It adds in the order of the plugin moving-average, so that the bits are the same.
func Average(y, x []float64, window int) {
	count := float64(window)
	toEnd := make([]float64, window)
	for start := 0; start < len(y); start += window {
		end := min(start+window, len(y))
		block := x[start : start+window]
		sum := 0.0
		for i := len(block) - 1; i >= 0; i-- {
			sum += block[i]
			toEnd[i] = sum
		}
		y[start] = sum / count
		means := y[start+1 : end]
		next := x[start+window:][:len(means)]
		rest := toEnd[1:][:len(means)]
		fromStart := 0.0
		for i := range means {
			fromStart += next[i]
			means[i] = (rest[i] + fromStart) / count
		}
	}
}

// Means is how many there are of a series of n elements.
func Means(n, window int) int { return n - window + 1 }

// Sum adds in the order of the elements.
func Sum(y []float64) float64 {
	sum := 0.0
	for _, value := range y {
		sum += value
	}
	return sum
}

// Digest depends on every bit and on the place of every element; consumer.jl has the same.
func Digest(y []float64) uint64 {
	digest := uint64(0)
	for i, value := range y {
		digest += math.Float64bits(value) * uint64(2*i+1)
	}
	return digest
}
