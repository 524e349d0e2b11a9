// Command remote calls a kernel of a host that may be anywhere: remote ADDRESS, with STRAIT_TOKEN and STRAIT_CA for TLS.
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"slices"

	"strait"
	_ "strait/remote"
)

func main() {
	log.SetFlags(0)
	if err := run(context.Background(), os.Args[1]); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context, address string) error {
	var options []strait.DialOption
	if token := os.Getenv("STRAIT_TOKEN"); token != "" {
		options = append(options, strait.WithToken(token))
	}
	if file := os.Getenv("STRAIT_CA"); file != "" {
		pem, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		options = append(options, strait.WithCA(pem))
	}
	c, err := strait.Connect(ctx, address, options...)
	if err != nil {
		return err
	}
	defer c.Close()
	x := make([]float64, 1_000_000)
	for i := range x {
		x[i] = float64(i)
	}
	inputs := strait.Inputs{"x": strait.Slice(x, 1000, 1000)}
	res, err := c.Call(ctx, "zscore", inputs, strait.Param("axis", 0), strait.PublishAs("y", "from-go"), strait.Replace())
	if err != nil {
		return err
	}
	defer res.Release()
	y, err := strait.As[float64](res.Tensor("y"))
	if err != nil {
		return err
	}
	fmt.Printf("Go: zscore begins with %.2f and %d bytes were copied\n", y[:2], c.ClientStats().CopiedBytes)
	other, err := c.Fetch(ctx, "from-python")
	if err != nil {
		return err
	}
	defer other.Release()
	theirs, err := strait.As[float64](other)
	if err != nil {
		return err
	}
	if !slices.Equal(y, theirs) {
		return errors.New("Python published something else")
	}
	fmt.Println("Go: Python published the same")
	return nil
}
