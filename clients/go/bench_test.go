package strait

import (
	"context"
	"slices"
	"testing"
	"time"

	"strait/internal/hosttest"
)

// benchmarkCall reports the median and the 99th percentile of a call's wall time, and what of it
// the host and the kernel's own run took.
func benchmarkCall(b *testing.B, elements int) {
	address, _ := hosttest.Start(b)
	ctx := context.Background()
	c, err := Dial(ctx, address)
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	x, err := NewTensor[float64](ctx, c, elements)
	if err != nil {
		b.Fatal(err)
	}
	defer x.Release()
	for i, data := 0, x.Data(); i < len(data); i++ {
		data[i] = float64(i)
	}
	var times, runs, hosts []time.Duration
	b.SetBytes(int64(8 * elements))
	for b.Loop() {
		start := time.Now()
		res, err := c.Call(ctx, "scale-shift", Inputs{"x": x}, Param("a", 2), Param("b", 1))
		if err != nil {
			b.Fatal(err)
		}
		runs, hosts = append(runs, res.Timing.Run), append(hosts, res.Timing.Total)
		res.Release()
		times = append(times, time.Since(start))
	}
	slices.Sort(times)
	slices.Sort(runs)
	slices.Sort(hosts)
	b.ReportMetric(float64(times[len(times)/2].Nanoseconds()), "p50-ns")
	b.ReportMetric(float64(times[len(times)*99/100].Nanoseconds()), "p99-ns")
	b.ReportMetric(float64(hosts[len(hosts)/2].Nanoseconds()), "p50-host-ns")
	b.ReportMetric(float64(runs[len(runs)/2].Nanoseconds()), "p50-run-ns")
}

func BenchmarkCall1KiB(b *testing.B) { benchmarkCall(b, 128) }

func BenchmarkCall100MiB(b *testing.B) { benchmarkCall(b, 100<<20/8) }
