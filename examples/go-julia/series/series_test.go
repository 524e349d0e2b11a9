package series

import (
	"math"
	"testing"
)

func TestAverageIsThatOfThePlainSums(t *testing.T) {
	// Small integers: every order of summation is exact.
	x := make([]float64, 50)
	for i := range x {
		x[i] = float64(i * i % 17)
	}
	for window := 1; window <= len(x); window++ {
		y := make([]float64, Means(len(x), window))
		Average(y, x, window)
		for i, got := range y {
			if want := Sum(x[i:i+window]) / float64(window); got != want {
				t.Fatalf("window %d, mean %d: got %v, want %v", window, i, got, want)
			}
		}
	}
}

func TestFillIsRepeatableAndUniform(t *testing.T) {
	x, again := make([]float64, 10_000), make([]float64, 10_000)
	Fill(x, 7)
	Fill(again, 7)
	for i := range x {
		if x[i] != again[i] || x[i] < 0 || x[i] >= 1 {
			t.Fatalf("element %d: %v and %v", i, x[i], again[i])
		}
	}
	if mean := Sum(x) / float64(len(x)); math.Abs(mean-0.5) > 0.02 {
		t.Fatalf("the mean is %v", mean)
	}
}

func TestDigestSeesOrderAndBits(t *testing.T) {
	if Digest([]float64{1, 2}) == Digest([]float64{2, 1}) || Digest([]float64{0}) == Digest([]float64{math.Copysign(0, -1)}) {
		t.Fatal("two different series have one digest")
	}
}
