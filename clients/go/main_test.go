package strait

import (
	"context"
	"fmt"
	"os"
	"testing"
)

// TestMain is also what the tests start as processes of their own: a producer, and programs with hosts of their own.
func TestMain(m *testing.M) {
	run := programs[os.Getenv(asProgram)]
	if address := os.Getenv(producesAt); address != "" {
		run = func(context.Context) error { return produceForEver(address) }
	}
	if run == nil {
		os.Exit(m.Run())
	}
	if err := run(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
