package strait

import (
	"context"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"strait/internal/hosttest"
	"strait/internal/shm"
)

const hundredMiB = 100 << 20

// benchmark is a client of a host of its own.
func benchmark(b *testing.B) *Client {
	b.Helper()
	address, _ := hosttest.Start(b)
	c, err := Dial(context.Background(), address)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { c.Close() })
	return c
}

func check(b *testing.B, err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

// times are what one kind of thing took, each time.
type times []time.Duration

func (t *times) measure(do func()) {
	start := time.Now()
	do()
	*t = append(*t, time.Since(start))
}

func (t times) quantile(part float64) float64 {
	sorted := slices.Sorted(slices.Values(t))
	return float64(sorted[int(float64(len(sorted))*part)].Nanoseconds())
}

func (t times) median() float64 { return t.quantile(0.5) }

// benchmarkCall reports the median and the 99th percentile of a call's wall time, what of it the host
// and the kernel's own run took, and how many empty round trips it is.
func benchmarkCall(b *testing.B, elements int) {
	c, ctx := benchmark(b), context.Background()
	x, err := NewTensor[float64](ctx, c, elements)
	check(b, err)
	defer x.Release()
	for i, data := 0, x.Data(); i < len(data); i++ {
		data[i] = float64(i)
	}
	var calls, runs, hosts, pings times
	b.SetBytes(int64(8 * elements))
	for b.Loop() {
		calls.measure(func() {
			res, err := c.Call(ctx, "scale-shift", Inputs{"x": x}, Param("a", 2), Param("b", 1))
			check(b, err)
			runs, hosts = append(runs, res.Timing.Run), append(hosts, res.Timing.Total)
			res.Release()
		})
	}
	// By themselves: right behind a call they would wait for the host to take its result back.
	for range max(b.N, 100) {
		pings.measure(func() { check(b, c.Ping(ctx)) })
	}
	b.ReportMetric(calls.median(), "p50-ns")
	b.ReportMetric(calls.quantile(0.99), "p99-ns")
	b.ReportMetric(hosts.median(), "p50-host-ns")
	b.ReportMetric(runs.median(), "p50-run-ns")
	b.ReportMetric(pings.median(), "p50-ping-ns")
	b.ReportMetric(calls.median()/pings.median(), "pings/call")
}

func BenchmarkCall1KiB(b *testing.B) { benchmarkCall(b, 128) }

func BenchmarkCall100MiB(b *testing.B) { benchmarkCall(b, hundredMiB/8) }

// BenchmarkFirstFill100MiB is a tensor made and filled once, against a memory file made, mapped and filled
// the same way.
func BenchmarkFirstFill100MiB(b *testing.B) {
	c, ctx := benchmark(b), context.Background()
	data := make([]byte, hundredMiB)
	for i := range data {
		data[i] = byte(i)
	}
	var tensors, files times
	b.SetBytes(hundredMiB)
	for b.Loop() {
		var x TensorOf[uint8]
		tensors.measure(func() {
			var err error
			x, err = NewTensor[uint8](ctx, c, hundredMiB)
			check(b, err)
			copy(x.Data(), data)
		})
		x.Release()
		files.measure(func() { check(b, fillFile(data)) })
	}
	b.ReportMetric(tensors.median(), "p50-ns")
	b.ReportMetric(files.median(), "p50-memfd-ns")
	b.ReportMetric(tensors.median()/files.median(), "ratio")
	b.ReportMetric(float64(c.ClientStats().HugeBytes)/float64(hundredMiB*len(tensors)), "huge/byte")
}

func fillFile(data []byte) error {
	file, err := shm.NewFile("plain")
	if err != nil {
		return err
	}
	defer file.Close()
	if err := file.Truncate(int64(len(data))); err != nil {
		return err
	}
	pages, err := unix.Mmap(int(file.Fd()), 0, len(data), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	copy(pages, data)
	return unix.Munmap(pages)
}

// BenchmarkFirstPass100MiB is a consumer's first pass over a result whose pages nobody had before, against
// its second.
func BenchmarkFirstPass100MiB(b *testing.B) {
	c, ctx := benchmark(b), context.Background()
	x, err := NewTensor[float64](ctx, c, hundredMiB/8)
	check(b, err)
	defer x.Release()
	for i, data := 0, x.Data(); i < len(data); i++ {
		data[i] = float64(i)
	}
	var firsts, seconds times
	var sum float64
	b.SetBytes(hundredMiB)
	for b.Loop() {
		// A result that was sealed is not used again, so that each is fresh.
		res, err := c.Call(ctx, "scale-shift", Inputs{"x": x}, Param("a", 2), Param("b", 1), Seal())
		check(b, err)
		y, err := As[float64](res.Tensor("y"))
		check(b, err)
		// One element of each cache line, so that memory is what takes the time.
		pass := func() {
			for i := 0; i < len(y); i += 8 {
				sum += y[i]
			}
		}
		firsts.measure(pass)
		seconds.measure(pass)
		res.Release()
	}
	if sum == 0 {
		b.Error("nothing was read")
	}
	b.ReportMetric(firsts.median(), "p50-ns")
	b.ReportMetric(seconds.median(), "p50-second-ns")
	b.ReportMetric(firsts.median()/seconds.median(), "ratio")
}

// BenchmarkPrepared1KiB is a call of what is prepared, against the same as a Call of a Slice whose elements and results travel
// in the frames.
func BenchmarkPrepared1KiB(b *testing.B) {
	c, ctx := benchmark(b), context.Background()
	p, err := c.Prepare(ctx, "scale-shift", Inputs{"x": Each[float64](128)}, Param("a", 2), Param("b", 1))
	check(b, err)
	defer p.Close()
	x, y := make([]float64, 128), make([]float64, 128)
	for i := range x {
		x[i] = float64(i)
	}
	inputs := Inputs{"x": Slice(x)}
	var prepared, into, framed times
	b.SetBytes(1024)
	b.ReportAllocs()
	for b.Loop() {
		prepared.measure(func() {
			_, err := p.Call(ctx, inputs)
			check(b, err)
		})
	}
	for range max(b.N, 100) {
		into.measure(func() {
			_, err := p.Call(ctx, inputs, Into("y", y))
			check(b, err)
		})
	}
	for range max(b.N, 100) {
		framed.measure(func() {
			_, err := c.Call(ctx, "scale-shift", inputs, Param("a", 2), Param("b", 1))
			check(b, err)
		})
	}
	b.ReportMetric(prepared.median(), "p50-ns")
	b.ReportMetric(prepared.quantile(0.99), "p99-ns")
	b.ReportMetric(into.median(), "p50-into-ns")
	b.ReportMetric(framed.median(), "p50-call-ns")
	b.ReportMetric(framed.median()/prepared.median(), "ratio")
}
