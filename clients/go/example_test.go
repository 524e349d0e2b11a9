package strait_test

import (
	"context"
	"fmt"
	"log"

	"strait"
)

// A moving sum of what comes in, 128 values at a time.
func ExamplePrepared() {
	ctx := context.Background()
	c, err := strait.Dial(ctx, "")
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	f, err := c.Prepare(ctx, "fir", strait.Inputs{
		"x":    strait.Each[float64](128),
		"taps": strait.Slice([]float64{1, 1, 1}),
	})
	if err != nil {
		log.Fatal(err)
	}
	defer f.Close()
	x, y := make([]float64, 128), make([]float64, 128)
	inputs := strait.Inputs{"x": strait.Slice(x)}
	for second := range 1000 {
		for i := range x {
			x[i] = float64(second + i)
		}
		if _, err := f.Call(ctx, inputs, strait.Into("y", y)); err != nil {
			log.Fatal(err)
		}
	}
	fmt.Println(y[127])
}

// A running sum of rows that come in chunks of any length.
func ExampleClient_Stream() {
	ctx := context.Background()
	c, err := strait.Dial(ctx, "")
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	chunks := func(yield func(strait.Inputs) bool) {
		for _, x := range [][]float64{{1, 2, 3}, {}, {4}} {
			if !yield(strait.Inputs{"x": strait.Slice(x)}) {
				return
			}
		}
	}
	for rows, err := range c.Stream(ctx, "cumsum", strait.Inputs{"x": strait.Each[float64](4096)}, chunks) {
		if err != nil {
			log.Fatal(err)
		}
		y, err := strait.As[float64](rows.Tensor("y"))
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(y)
	}
}

// One goroutine feeds a running sum, and another reads what comes of it: as well two processes, each with a client.
func ExampleClient_ReadChannel() {
	ctx := context.Background()
	c, err := strait.Dial(ctx, "")
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	sums := strait.ChannelOptions{Name: "sums"}
	s, err := c.PrepareStream(ctx, "cumsum", strait.Inputs{"x": strait.Each[float64](4096)}, sums)
	if err != nil {
		log.Fatal(err)
	}
	defer s.Close()
	go func() {
		for _, x := range [][]float64{{1, 2, 3}, {4}} {
			if _, err := s.Chunk(ctx, strait.Inputs{"x": strait.Slice(x)}); err != nil {
				log.Fatal(err)
			}
		}
		if _, err := s.Last(ctx, nil); err != nil {
			log.Fatal(err)
		}
	}()
	channel, err := c.ReadChannel(ctx, "sums")
	if err != nil {
		log.Fatal(err)
	}
	defer channel.Close()
	for batch, err := range channel.Batches(ctx) {
		if err != nil {
			log.Fatal(err)
		}
		y, err := strait.As[float64](batch.Tensor("y"))
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(batch.Number, y)
	}
}
