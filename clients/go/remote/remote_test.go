package remote_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"strait"
	"strait/internal/hosttest"
	_ "strait/remote"
)

func connect(t *testing.T, address string, options ...strait.DialOption) *strait.Client {
	t.Helper()
	c, err := strait.Connect(t.Context(), address, options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// both are clients of one host: on its machine, and over Flight.
func both(t *testing.T, plugins ...string) (near, far *strait.Client) {
	t.Helper()
	address, _ := hosttest.Start(t, plugins...)
	return connect(t, address), connect(t, flightOf(address))
}

func flightOf(address string) string {
	return "grpc+" + address + "/flight.sock"
}

func must[T any](value T, err error) func(t *testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return value
	}
}

func read[T strait.Element](t *testing.T, x *strait.Tensor) []T {
	t.Helper()
	return slices.Clone(must(strait.As[T](x))(t))
}

func numbers(count int) []float64 {
	random := rand.New(rand.NewPCG(1, 2))
	x := make([]float64, count)
	for i := range x {
		x[i] = random.NormFloat64()
	}
	return x
}

func TestEveryTypeAndShapeThereAndBack(t *testing.T) {
	near, far := both(t)
	ctx := t.Context()
	shapes := [][]int{{}, {0}, {5}, {3, 4}, {2, 3, 4}, {0, 4}, {7, 1, 2}}
	for _, dtype := range []strait.DType{strait.Bool8, strait.Int8, strait.Int16, strait.Int32, strait.Int64, strait.Uint8, strait.Uint16, strait.Uint32,
		strait.Uint64, strait.Float16, strait.BFloat16, strait.Float8E4M3FN, strait.Float8E5M2, strait.Float32, strait.Float64, strait.Complex64,
		strait.Complex128} {
		for _, shape := range shapes {
			size := dtype.Size()
			for _, n := range shape {
				size *= n
			}
			elements := make([]byte, size)
			for i := range elements {
				elements[i] = byte(i * 37)
				if dtype == strait.Bool8 {
					elements[i] = byte(i % 2)
				}
			}
			before := far.ClientStats().CopiedBytes
			must(far.Publish(ctx, "far/x", strait.Raw(dtype, elements, shape...), strait.Replace()))(t)
			for _, c := range []*strait.Client{far, near} {
				x := must(c.Fetch(ctx, "far/x"))(t)
				if x.DType() != dtype || !slices.Equal(x.Shape(), shape) || !bytes.Equal(must(x.Bytes())(t), elements) {
					t.Fatalf("%s %v came back as %s %v", dtype, shape, x.DType(), x.Shape())
				}
				x.Release()
			}
			// Into a segment of this process, from there to the host, and back.
			if copied := far.ClientStats().CopiedBytes - before; copied != int64(3*size) {
				t.Fatalf("%s %v: %d bytes copied, not 3 times %d", dtype, shape, copied, size)
			}
			flight := must(far.Lookup(ctx, "far/x"))(t)
			if place := flight.Mapping.Tensors[0]; place.DType != dtype || !slices.Equal(place.Shape, shape) {
				t.Fatalf("%v", place)
			}
		}
	}
	if flights := must(far.List(ctx))(t); len(flights) != 1 || flights[0].Name != "far/x" {
		t.Fatal(flights)
	}
	// arrow-go has no type for rows without elements.
	if _, err := far.Publish(ctx, "far/none", strait.Slice([]float64{}, 3, 0)); !errors.Is(err, strait.ErrLocalOnly) {
		t.Fatal(err)
	}
	must(near.Publish(ctx, "far/none", strait.Slice([]float64{}, 3, 0)))(t)
	if _, err := far.Fetch(ctx, "far/none"); !errors.Is(err, strait.ErrLocalOnly) {
		t.Fatal(err)
	}
	if flights := must(far.List(ctx))(t); len(flights) != 2 {
		t.Fatal(flights)
	}
	if err := far.Delete(ctx, "far/x"); err != nil {
		t.Fatal(err)
	}
}

func TestCallsOfAnySizeLeaveNothing(t *testing.T) {
	near, far := both(t)
	for _, count := range []int{100, 5000, 300_000, 10_000_000} {
		x := numbers(count)
		result, err := far.Call(t.Context(), "scale-shift", strait.Inputs{"x": strait.Slice(x)}, strait.Param("a", 2.0), strait.Param("b", 1.0))
		if err != nil {
			t.Fatal(err)
		}
		y := read[float64](t, result.Tensor("y"))
		for i := range x {
			if y[i] != 2*x[i]+1 {
				t.Fatalf("%d: %v", i, y[i])
			}
		}
		result.Release()
	}
	filled := must(strait.NewTensor[float64](t.Context(), far, 1000, 100))(t)
	for i, data := 0, filled.Data(); i < len(data); i++ {
		data[i] = float64(i)
	}
	result := must(far.Call(t.Context(), "scale-shift", strait.Inputs{"x": filled}, strait.Param("a", 3.0), strait.PublishAs("y", "far/y")))(t)
	if y := read[float64](t, result.Tensor("y")); y[99_999] != 3*99_999 {
		t.Fatal(y[99_999])
	}
	result.Release()
	must(far.Publish(t.Context(), "far/filled", filled))(t)
	filled.Release()
	for _, name := range []string{"far/y", "far/filled"} {
		if err := errors.Join(must(near.Fetch(t.Context(), name))(t).Err(), near.Delete(t.Context(), name)); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "nothing is left", func() bool {
		stats := must(near.Stats(t.Context()))(t)
		return stats.Account.Segments <= stats.Pool.IdleSegments+2
	})
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for until := time.Now().Add(30 * time.Second); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(until) {
			t.Fatal(what)
		}
	}
}

func TestErrorsAreTheHosts(t *testing.T) {
	_, far := both(t, "traps.wasm")
	ctx := strait.WithRequestID(t.Context(), "mine-1")
	var remote *strait.RemoteError
	_, err := far.Fetch(ctx, "far/nope")
	if !errors.As(err, &remote) || remote.Reason != "FLIGHT_NOT_FOUND" || remote.RequestID == "" || !errors.Is(err, fs.ErrNotExist) || remote.Details["name"] != "far/nope" {
		t.Fatal(err)
	}
	_, err = far.Call(ctx, "scale-shift", strait.Inputs{"x": strait.Slice([]float64{1})}, strait.Param("c", 1))
	if !errors.As(err, &remote) || remote.Code != "INVALID_ARGUMENT" || remote.Reason != "UNKNOWN_PARAMETER" || remote.RequestID != "mine-1" {
		t.Fatal(err)
	}
	_, err = far.Call(ctx, "k", strait.Inputs{"x": strait.Slice([]float64{1})})
	if !errors.As(err, &remote) || remote.Reason != "GUEST_TRAP" || remote.Backtrace == "" {
		t.Fatal(err)
	}
	must(far.Publish(ctx, "far/x", strait.Slice([]float64{1})))(t)
	if _, err = far.Publish(ctx, "far/x", strait.Slice([]float64{1})); !errors.Is(err, fs.ErrExist) {
		t.Fatal(err)
	}
	if _, err = far.Prepare(ctx, "scale-shift", strait.Inputs{"x": strait.Each[float64](4)}, strait.Ring()); !errors.Is(err, strait.ErrLocalOnly) {
		t.Fatal(err)
	}
}

func TestAContextEndsACall(t *testing.T) {
	near, far := both(t, "spins.wasm")
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() {
		_, err := far.Call(ctx, "k", strait.Inputs{"x": strait.Slice([]float64{1})})
		ended <- err
	}()
	eventually(t, "it runs", func() bool { return must(near.Stats(t.Context()))(t).Running == 1 })
	stop()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	eventually(t, "it does not run any more", func() bool { return must(near.Stats(t.Context()))(t).Running == 0 })
	_, err := far.Call(t.Context(), "k", strait.Inputs{"x": strait.Slice([]float64{1})}, strait.Deadline(50*time.Millisecond))
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
}

func TestPreparedCallsStreamsAndChannels(t *testing.T) {
	near, far := both(t)
	ctx := t.Context()
	x := numbers(128)
	scale := must(far.Prepare(ctx, "scale-shift", strait.Inputs{"x": strait.Each[float64](128)}, strait.Param("a", 2.0)))(t)
	for _, count := range []int{128, 50, 0} {
		result := must(scale.Call(ctx, strait.Inputs{"x": strait.Slice(x[:count])}))(t)
		if y := read[float64](t, result.Tensor("y")); len(y) != count || count > 0 && y[count-1] != 2*x[count-1] {
			t.Fatal(y)
		}
	}
	taps := must(far.Prepare(ctx, "fir", strait.Inputs{"x": strait.Each[float64](4), "taps": strait.Slice([]float64{1, 1})}))(t)
	if y := read[float64](t, must(taps.Call(ctx, strait.Inputs{"x": strait.Slice([]float64{1, 2, 3, 4})}))(t).Tensor("y")); !slices.Equal(y, []float64{1, 3, 5, 7}) {
		t.Fatal(y)
	}
	rows := strait.Inputs{"x": strait.Each[float64](4)}
	for _, clients := range [][2]*strait.Client{{far, far}, {far, near}, {near, far}} {
		stream := must(clients[0].PrepareStream(ctx, "cumsum", rows, strait.ChannelOptions{Name: "far/levels"}))(t)
		channel := must(clients[1].ReadChannel(ctx, "far/levels"))(t)
		var producing sync.WaitGroup
		producing.Go(func() {
			for range 3 {
				if _, err := stream.Chunk(ctx, strait.Inputs{"x": strait.Slice([]float64{1, 1})}); err != nil {
					t.Error(err)
				}
			}
			if _, err := stream.Last(ctx, nil); err != nil {
				t.Error(err)
			}
		})
		var got []float64
		for batch, err := range channel.Batches(ctx) {
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, read[float64](t, batch.Tensor("y"))...)
		}
		producing.Wait()
		if !slices.Equal(got, []float64{1, 2, 3, 4, 5, 6}) {
			t.Fatal(got)
		}
	}
	if err := errors.Join(scale.Close(), far.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := taps.Call(ctx, strait.Inputs{"x": strait.Slice([]float64{1})}); !errors.Is(err, strait.ErrDisconnected) {
		t.Fatal(err)
	}
	eventually(t, "the host has no streams", func() bool { return must(near.Stats(ctx))(t).Account.Streams == 0 })
}

// proxy stands between a client and a host: it can keep what the host says to itself, and hang up.
type proxy struct {
	listener net.Listener
	swallows atomic.Bool
	// It hangs up once so many more bytes have come from a client; 0: never.
	cutAfter atomic.Int64
	mu       sync.Mutex
	open     []net.Conn
}

func newProxy(t *testing.T, target string) (*proxy, string) {
	path := filepath.Join(t.TempDir(), "p.sock")
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{listener: listener}
	t.Cleanup(func() { _ = listener.Close(); p.hangUp() })
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			host, err := net.Dial("unix", target)
			if err != nil {
				return
			}
			p.mu.Lock()
			p.open = append(p.open, client, host)
			p.mu.Unlock()
			go p.pass(client, host, true)
			go p.pass(host, client, false)
		}
	}()
	return p, "grpc+unix://" + path
}

func (p *proxy) pass(from, to net.Conn, isClient bool) {
	defer func() { _, _ = from.Close(), to.Close() }()
	buffer := make([]byte, 64<<10)
	for {
		n, err := from.Read(buffer)
		if err != nil {
			return
		}
		if isClient && p.cutAfter.Load() > 0 && p.cutAfter.Add(-int64(n)) <= 0 {
			p.cutAfter.Store(0)
			p.hangUp()
			return
		}
		if !isClient && p.swallows.Load() {
			continue
		}
		if _, err := to.Write(buffer[:n]); err != nil {
			return
		}
	}
}

func (p *proxy) hangUp() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, end := range p.open {
		_ = end.Close()
	}
	p.open = nil
}

func TestACallRunsOnceAlthoughTheConnectionIsLost(t *testing.T) {
	address, _ := hosttest.Start(t)
	near := connect(t, address)
	p, through := newProxy(t, strings.TrimPrefix(address, "unix://")+"/flight.sock")
	far := connect(t, through, strait.WithRetry(30*time.Second))
	runs := must(near.Stats(t.Context()))(t).Invocations
	p.swallows.Store(true)
	ended := make(chan error)
	go func() {
		result, err := far.Call(t.Context(), "scale-shift", strait.Inputs{"x": strait.Slice([]float64{1, 2})}, strait.Param("a", 5.0))
		if err == nil {
			if y, _ := strait.As[float64](result.Tensor("y")); !slices.Equal(y, []float64{5, 10}) {
				err = errors.New("wrong elements")
			}
		}
		ended <- err
	}()
	eventually(t, "it has run", func() bool {
		stats := must(near.Stats(t.Context()))(t)
		return stats.Invocations == runs+1 && stats.Running == 0
	})
	p.swallows.Store(false)
	p.hangUp()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	x := numbers(2_000_000)
	p.cutAfter.Store(5 << 20)
	result := must(far.Call(t.Context(), "scale-shift", strait.Inputs{"x": strait.Slice(x)}, strait.Param("a", 2.0)))(t)
	if y := read[float64](t, result.Tensor("y")); y[len(y)-1] != 2*x[len(x)-1] {
		t.Fatal("wrong elements")
	}
	result.Release()
	if again := must(near.Stats(t.Context()))(t).Invocations; again != runs+2 {
		t.Fatalf("%d runs instead of 2", again-runs)
	}
	p.cutAfter.Store(1 << 20)
	if _, err := far.Publish(t.Context(), "far/lost", strait.Slice(x)); !errors.Is(err, strait.ErrDisconnected) {
		t.Fatal(err)
	}
	must(far.Publish(t.Context(), "far/lost", strait.Slice(x[:10]), strait.Replace()))(t)
}

func TestAddressesAndOptions(t *testing.T) {
	for address, want := range map[string]error{
		"grpc+tcp://127.0.0.1:1":           strait.ErrNoHost,
		"grpc+unix:///nowhere/flight.sock": strait.ErrNoHost,
		"grpc+unix://flight.sock":          strait.ErrArgument,
		"grpc+tls://":                      strait.ErrArgument,
	} {
		if _, err := strait.Connect(t.Context(), address); !errors.Is(err, want) {
			t.Errorf("%s: %v", address, err)
		}
	}
	for _, option := range []strait.DialOption{strait.WithCA([]byte("x")), strait.WithClientCertificate([]byte("x"), []byte("y")), strait.WithServerName("x")} {
		for _, address := range []string{"grpc+tcp://127.0.0.1:1", "unix:///tmp"} {
			if _, err := strait.Connect(t.Context(), address, option); !errors.Is(err, strait.ErrArgument) {
				t.Errorf("%s: %v", address, err)
			}
		}
	}
	if _, err := strait.Connect(t.Context(), "grpc+tcp://example.test:1", strait.WithToken("t")); !errors.Is(err, strait.ErrArgument) || !strings.Contains(err.Error(), "in the clear") {
		t.Error(err)
	}
	if _, err := strait.Connect(t.Context(), "grpc+tls://127.0.0.1:1", strait.WithToken("a\nb")); !errors.Is(err, strait.ErrArgument) {
		t.Error(err)
	}
}

var _ io.Closer = (*strait.Client)(nil)
