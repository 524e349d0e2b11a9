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
