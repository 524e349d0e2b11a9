// Command small-calls times calls of a kernel over 1 KiB: ADDRESS CALLS. See ../README.md.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log"
	"os"
	"slices"
	"strconv"
	"time"

	"strait"
)

const (
	elements  = 128
	warmCalls = 200
)

func main() {
	log.SetFlags(0)
	if len(os.Args) != 3 {
		log.Fatal("usage: small-calls ADDRESS CALLS")
	}
	calls, err := strconv.Atoi(os.Args[2])
	if err != nil || calls < 1 {
		log.Fatalf("CALLS is %q; it is a number from 1 on", os.Args[2])
	}
	if err := run(context.Background(), os.Args[1], calls); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context, address string, calls int) error {
	c, err := strait.Dial(ctx, address)
	if err != nil {
		return err
	}
	defer c.Close()
	x, err := strait.NewTensor[float64](ctx, c, elements)
	if err != nil {
		return err
	}
	defer x.Release()
	err = tell("Go", calls, func(i int) error {
		x.Data()[0] = float64(i)
		return call(ctx, c, x)
	})
	if err != nil {
		return err
	}
	if err := tellPrepared(ctx, c, "Go, prepared", calls); err != nil {
		return err
	}
	return tellPrepared(ctx, c, "Go, ring", calls, strait.Ring())
}

// tellPrepared times calls of what was prepared once.
func tellPrepared(ctx context.Context, c *strait.Client, client string, calls int, options ...strait.PrepareOption) error {
	inputs := strait.Inputs{"x": strait.Each[float64](elements)}
	options = append(options, strait.Param("a", 2), strait.Param("b", 1))
	prepared, err := c.Prepare(ctx, "scale-shift", inputs, options...)
	if err != nil {
		return err
	}
	defer prepared.Close()
	own := make([]float64, elements)
	return tell(client, calls, func(i int) error {
		own[0] = float64(i)
		return callPrepared(ctx, prepared, own)
	})
}

// tell times cycle and writes one line of JSON.
func tell(client string, calls int, cycle func(i int) error) error {
	times := make([]time.Duration, 0, calls)
	for i := range warmCalls + calls {
		begun := time.Now()
		if err := cycle(i); err != nil {
			return err
		}
		if i >= warmCalls {
			times = append(times, time.Since(begun))
		}
	}
	slices.Sort(times)
	return json.NewEncoder(os.Stdout).Encode(figures{client, calls, percentile(times, 50), percentile(times, 99)})
}

// callPrepared is a call of what was prepared: elements of this process, and back into it.
func callPrepared(ctx context.Context, prepared *strait.Prepared, x []float64) error {
	result, err := prepared.Call(ctx, strait.Inputs{"x": strait.Slice(x)})
	if err != nil {
		return err
	}
	y, err := strait.As[float64](result.Tensor("y"))
	if err != nil {
		return err
	}
	if want := 2*x[0] + 1; y[0] != want {
		return fmt.Errorf("the first element is %v, expected %v", y[0], want)
	}
	return nil
}

type figures struct {
	Client string  `json:"client"`
	Calls  int     `json:"calls"`
	P50    float64 `json:"p50_us"`
	P99    float64 `json:"p99_us"`
}

// call is one whole cycle: the kernel, its result read and given back.
func call(ctx context.Context, c *strait.Client, x strait.TensorOf[float64]) error {
	result, err := c.Call(ctx, "scale-shift", strait.Inputs{"x": x}, strait.Param("a", 2), strait.Param("b", 1))
	if err != nil {
		return err
	}
	defer result.Release()
	y, err := strait.As[float64](result.Tensor("y"))
	if err != nil {
		return err
	}
	if want := 2*x.Data()[0] + 1; y[0] != want {
		return fmt.Errorf("the first element is %v, expected %v", y[0], want)
	}
	return nil
}

// percentile of sorted times, in microseconds.
func percentile(times []time.Duration, of int) float64 {
	return float64(times[(len(times)*of+99)/100-1].Nanoseconds()) / 1e3
}
