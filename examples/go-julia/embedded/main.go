//go:build cgo

// Command embedded is the cgo path of the comparison: a Go program that has libjulia in its own
// process and hands it the data by one memcpy into a Julia Array. No sandbox, no second process.
//
// It runs one round for each line "SEED" on standard input, and answers one line of JSON.
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"os"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"strait/examples/go-julia/series"
)

// Round is what one round took, in seconds, by way of handing the data over.
type Round struct {
	// Reused: a memcpy into an Array that every round uses.
	Reused Way `json:"reused"`
	// Fresh: a memcpy into a new Array, as jl_alloc_array_1d makes it.
	Fresh Way `json:"fresh"`
	// Lent: no copy, Julia reads Go's memory through an Array over it.
	Lent Way `json:"lent"`
}

// Way is one hand-over.
type Way struct {
	Transform   float64 `json:"transform_seconds"`
	HandOver    float64 `json:"hand_over_seconds"`
	Reduce      float64 `json:"reduce_seconds"`
	Total       float64 `json:"seconds"`
	CopiedBytes int64   `json:"copied_bytes"`
	Sum         float64 `json:"sum"`
}

func main() {
	log.SetFlags(0)
	log.SetPrefix("embedded: ")
	elements := flag.Int("elements", 12_500_000, "length of the series")
	window := flag.Int("window", 64, "elements in each mean")
	binaries := flag.String("julia-bin", "", "the directory of the julia program")
	image := flag.String("julia-image", "", "sys.so, an absolute path")
	reduce := flag.String("reduce", "reduce.jl", "the consumer's code")
	flag.Parse()
	// Julia belongs to the thread that started it.
	runtime.LockOSThread()
	if err := run(*elements, *window, *binaries, *image, *reduce); err != nil {
		log.Fatal(err)
	}
}

func run(elements, window int, binaries, image, reduce string) error {
	y := make([]float64, series.Means(elements, window))
	x := make([]float64, elements)
	julia, err := start(binaries, image, reduce, len(y))
	if err != nil {
		return err
	}
	defer julia.stop()
	// Julia has made them non-blocking for its own event loop, which nobody runs here.
	for _, stream := range []*os.File{os.Stdin, os.Stdout} {
		if err := syscall.SetNonblock(int(stream.Fd()), false); err != nil {
			return err
		}
	}
	answers := json.NewEncoder(os.Stdout)
	if err := answers.Encode(struct{}{}); err != nil {
		return err
	}
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		seed, err := strconv.ParseUint(lines.Text(), 10, 64)
		if err != nil {
			return fmt.Errorf("a line that is no seed: %w", err)
		}
		series.Fill(x, seed)
		bytes := int64(len(y)) * 8
		round := Round{
			Reused: way(y, x, window, bytes, julia.copyTo(julia.kept)),
			Fresh:  way(y, x, window, bytes, julia.copyToNew),
			Lent:   way(y, x, window, 0, julia.lend),
		}
		if err := answers.Encode(round); err != nil {
			return err
		}
	}
	return lines.Err()
}

// way times the transformation, the hand-over, and Julia's reduction.
func way(y, x []float64, window int, copied int64, handOver func([]float64) reduction) Way {
	begun := time.Now()
	series.Average(y, x, window)
	transformed := time.Now()
	reduce := handOver(y)
	handed := time.Now()
	sum := reduce()
	over := time.Now()
	return Way{
		Transform:   transformed.Sub(begun).Seconds(),
		HandOver:    handed.Sub(transformed).Seconds(),
		Reduce:      over.Sub(handed).Seconds(),
		Total:       over.Sub(begun).Seconds(),
		CopiedBytes: copied,
		Sum:         sum,
	}
}
