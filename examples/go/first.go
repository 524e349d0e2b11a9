// The first program: fill a tensor in shared memory, run a kernel over it, read the result.
// It needs a host: `strait serve`.
package main

import (
	"context"
	"fmt"
	"log"

	"strait"
)

func main() {
	if err := run(context.Background()); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context) error {
	c, err := strait.Dial(ctx, "")
	if err != nil {
		return err
	}
	defer c.Close()
	x, err := strait.NewTensor[float64](ctx, c, 1000, 1000)
	if err != nil {
		return err
	}
	defer x.Release()
	for i, data := 0, x.Data(); i < len(data); i++ {
		data[i] = float64(i)
	}
	res, err := c.Call(ctx, "zscore", strait.Inputs{"x": x}, strait.Param("axis", 0))
	if err != nil {
		return err
	}
	defer res.Release()
	y, err := strait.As[float64](res.Tensor("y"))
	if err != nil {
		return err
	}
	fmt.Printf("first column, scaled: %v\nbytes that the host copied: %d\n", y[0], res.CopiedBytes)
	return nil
}
