package strait

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"strait/internal/hosttest"
	"strait/internal/shm"
)

func TestPreparedCalls(t *testing.T) {
	c, ctx := dial(t), context.Background()
	nan, inf := math.NaN(), math.Inf(1)
	for _, example := range []struct {
		kernel  string
		options []PrepareOption
		each    Brought
		x       Copied
		port    string
		want    any
		shape   []int
		notes   []Note
	}{
		{"scale-shift", []PrepareOption{Param("a", 2), Param("b", 1)}, Each[float64](2, 3), Slice([]float64{1, 2, 3, 4, 5, 6}, 2, 3), "y", []float64{3, 5, 7, 9, 11, 13}, []int{2, 3}, nil},
		{"scale-shift", []PrepareOption{Param("a", 2)}, Each[float32](4, 3), Slice([]float32{1, 2, 3, 4}, 2, 2), "y", []float32{2, 4, 6, 8}, []int{2, 2}, nil},
		{"scale-shift", []PrepareOption{Param("b", 1)}, Each[float64](), Scalar(7.0), "y", []float64{8}, []int{}, nil},
		{"scale-shift", nil, Each[float64](3, 0), Slice([]float64{}, 3, 0), "y", []float64{}, []int{3, 0}, nil},
		{"scale-shift", nil, Each[float64](3), Slice([]float64{}), "y", []float64{}, []int{0}, nil},
		{"clip", []PrepareOption{Param("lo", -1), Param("hi", 2)}, Each[int8](5), Slice([]int8{-128, 0, 127}), "y", []int8{-1, 0, 2}, []int{3}, nil},
		{"clip", []PrepareOption{Param("hi", 2)}, EachOf(Uint64, 1), Slice([]uint64{math.MaxUint64}), "y", []uint64{2}, []int{1}, nil},
		{"filter-finite", nil, Each[float64](5), Slice([]float64{1, nan, 2, inf, 3}), "y", []float64{1, 2, 3}, []int{3}, []Note{{"dropped", "2"}}},
	} {
		counted, before := c.ClientStats(), framed(t, c)
		p := must[*Prepared](t)(c.Prepare(ctx, example.kernel, Inputs{"x": example.each}, example.options...))
		if inputs := p.Inputs(); len(inputs) != 1 || !inputs[0].is(Place{Spec: Spec{"x", example.each.dtype, example.each.shape}}) {
			t.Error(inputs)
		}
		want := rawOf(example.want)
		for range 3 {
			res := must[*Result](t)(p.Call(ctx, Inputs{"x": example.x}))
			y := res.Tensor(example.port)
			if got := must[[]byte](t)(y.Bytes()); !slices.Equal(got, want) || !slices.Equal(y.Shape(), example.shape) {
				t.Error(example.kernel, got, want, y.Shape())
			}
			if !slices.Equal(res.Notes, example.notes) && example.kernel != "filter-finite" || len(res.Notes) != len(example.notes) || res.RequestID == "" {
				t.Error(example.kernel, res.Notes, res.RequestID)
			}
		}
		in, out := int64(3*len(example.x.bytes)), int64(3*len(want))
		stats := c.ClientStats()
		if stats.CopiedBytes-counted.CopiedBytes != in+out || stats.Calls-counted.Calls != 3 {
			t.Error(stats, counted)
		}
		if went := framed(t, c); went != [2]int64{before[0] + in, before[1] + out} {
			t.Error(example.kernel, went, before, in, out)
		}
		if err := errors.Join(p.Close(), p.Close()); err != nil {
			t.Error(err)
		}
		if _, err := p.Call(ctx, Inputs{"x": example.x}); !errors.Is(err, ErrDisconnected) || !strings.Contains(err.Error(), "closed here") {
			t.Error(err)
		}
	}
	if stats, host := c.ClientStats(), must[Stats](t)(c.Stats(ctx)); stats.Mappings != 0 || host.Own.Leases != 0 || host.Segments != 0 {
		t.Error("a call made a segment:", stats, string(host.JSON))
	}
}

func TestPreparedInputsThatAreTheSame(t *testing.T) {
	c, ctx := dial(t), context.Background()
	taps := []float64{0.5, 0.25}
	named := must[TensorOf[float64]](t)(NewTensor[float64](ctx, c, 2))
	copy(named.Data(), taps)
	must[Flight](t)(c.Publish(ctx, "go taps", named))
	small := must[*Result](t)(c.Call(ctx, "scale-shift", Inputs{"x": Slice(taps)})).Tensor("y")
	for what, input := range map[string]Input{"slice": Slice(slices.Clone(taps)), "name": Name("go taps"), "segment": named, "small": small} {
		before := c.ClientStats().CopiedBytes
		p := must[*Prepared](t)(c.Prepare(ctx, "fir", Inputs{"x": Each[float64](4), "taps": input}))
		defer p.Close()
		copied := c.ClientStats().CopiedBytes - before
		if want := map[string]int64{"slice": 16, "small": 16}[what]; copied != want {
			t.Error(what, copied)
		}
		// Its memory is not another copy's, either.
		res := must[*Result](t)(c.Call(ctx, "scale-shift", Inputs{"x": Slice([]float64{9, 9})}, InlineBytes(0)))
		res.Release()
		if what == "name" {
			if err := c.Delete(ctx, "go taps"); err != nil {
				t.Error(err)
			}
		}
		for range 2 {
			res := must[*Result](t)(p.Call(ctx, Inputs{"x": Slice([]float64{8, 0, 4, 4})}))
			if y := must[[]float64](t)(As[float64](res.Tensor("y"))); !slices.Equal(y, []float64{4, 2, 2, 3}) {
				t.Error(what, y)
			}
		}
	}
	named.Release()
	if mappings := c.ClientStats().Mappings; mappings != 0 {
		t.Error(mappings)
	}
}

func TestWhatDoesNotFitIsNotSent(t *testing.T) {
	c, ctx := dial(t), context.Background()
	p := must[*Prepared](t)(c.Prepare(ctx, "scale-shift", Inputs{"x": Each[float64](2, 3)}))
	defer p.Close()
	x := Slice(make([]float64, 6), 2, 3)
	invocations := must[Stats](t)(c.Stats(ctx)).Invocations
	over, cancel := context.WithCancel(ctx)
	cancel()
	short, small := make([]float64, 5), make([]float32, 6)
	for says, try := range map[string]func() (*Result, error){
		`"x" is missing`:                         func() (*Result, error) { return p.Call(ctx, Inputs{}) },
		`a call brings ["x"]`:                    func() (*Result, error) { return p.Call(ctx, Inputs{"y": x}) },
		`input "z" is not one`:                   func() (*Result, error) { return p.Call(ctx, Inputs{"x": x, "z": x}) },
		"float32[2 3] does not fit":              func() (*Result, error) { return p.Call(ctx, Inputs{"x": Slice(small, 2, 3)}) },
		"float64[6] does not fit float64[2 3]":   func() (*Result, error) { return p.Call(ctx, Inputs{"x": Slice(make([]float64, 6))}) },
		"float64[1 4] does not fit":              func() (*Result, error) { return p.Call(ctx, Inputs{"x": Slice(make([]float64, 4), 1, 4)}) },
		"float64[3 1] does not fit":              func() (*Result, error) { return p.Call(ctx, Inputs{"x": Slice(make([]float64, 3), 3, 1)}) },
		"5 were given":                           func() (*Result, error) { return p.Call(ctx, Inputs{"x": Raw(Float64, make([]byte, 5), 2, 3)}) },
		`the flight "f" does not go`:             func() (*Result, error) { return p.Call(ctx, Inputs{"x": Name("f")}) },
		"an Each does not go":                    func() (*Result, error) { return p.Call(ctx, Inputs{"x": Each[float64](2, 3)}) },
		"a nil tensor":                           func() (*Result, error) { return p.Call(ctx, Inputs{"x": (*Tensor)(nil)}) },
		`no output "z"; there are ["y"]`:         func() (*Result, error) { return p.Call(ctx, Inputs{"x": x}, Into("z", short)) },
		"does not go into 5 elements":            func() (*Result, error) { return p.Call(ctx, Inputs{"x": x}, Into("y", short)) },
		"does not go into 6 elements of float32": func() (*Result, error) { return p.Call(ctx, Inputs{"x": x}, Into("y", small)) },
		"it goes into Prepare":                   func() (*Result, error) { return c.Call(ctx, "clip", Inputs{"x": Each[float64](2)}) },
	} {
		if res, err := try(); !errors.Is(err, ErrArgument) || !strings.Contains(err.Error(), says) {
			t.Errorf("%v does not say %q: %v", err, says, res)
		}
	}
	if _, err := p.Call(over, Inputs{"x": x}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if now := must[Stats](t)(c.Stats(ctx)).Invocations; now != invocations {
		t.Error("something was sent:", now, invocations)
	}
	must[*Result](t)(p.Call(ctx, Inputs{"x": x}))
	for says, try := range map[string]func() (*Prepared, error){
		"-1": func() (*Prepared, error) { return c.Prepare(ctx, "clip", Inputs{"x": Each[int8](-1)}) },
		"9 axes": func() (*Prepared, error) {
			return c.Prepare(ctx, "clip", Inputs{"x": Each[int8](1, 1, 1, 1, 1, 1, 1, 1, 1)})
		},
		`"f7"`:                func() (*Prepared, error) { return c.Prepare(ctx, "clip", Inputs{"x": EachOf("f7", 1)}) },
		`input "x" is nil`:    func() (*Prepared, error) { return c.Prepare(ctx, "clip", Inputs{"x": nil}) },
		"must be more than 0": func() (*Prepared, error) { return c.Prepare(ctx, "clip", Inputs{"x": Each[int8](1)}, Deadline(0)) },
	} {
		if _, err := try(); !errors.Is(err, ErrArgument) || !strings.Contains(err.Error(), says) {
			t.Errorf("%v does not say %q", err, says)
		}
	}
	for want, try := range map[string]func() (*Prepared, error){
		"KERNEL_NOT_FOUND": func() (*Prepared, error) { return c.Prepare(ctx, "nothing", Inputs{"x": Each[int8](1)}) },
		"BAD_INPUT":        func() (*Prepared, error) { return c.Prepare(ctx, "clip", Inputs{"x": Each[int8](1 << 20)}) },
		"UNKNOWN_PARAMETER": func() (*Prepared, error) {
			return c.Prepare(ctx, "clip", Inputs{"x": Each[int8](1)}, Param("zz", 1))
		},
	} {
		if _, err := try(); reason(err) != want {
			t.Error(err, "is not", want)
		}
	}
}

func TestPreparedResultsInto(t *testing.T) {
	c, ctx := dial(t), context.Background()
	p := must[*Prepared](t)(c.Prepare(ctx, "scale-shift", Inputs{"x": Each[float64](3)}, Param("a", 2)))
	defer p.Close()
	// In place, and longer than needed.
	x := []float64{1, 2, 3, 4}
	res := must[*Result](t)(p.Call(ctx, Inputs{"x": Slice(x[:3])}, Into("y", x)))
	y := must[[]float64](t)(As[float64](res.Tensor("y")))
	if !slices.Equal(x, []float64{2, 4, 6, 4}) || &y[0] != &x[0] || len(y) != 3 || cap(y) != 3 {
		t.Error(x, y)
	}
	res = must[*Result](t)(p.Call(ctx, Inputs{"x": Slice([]float64{5})}, Into("y", x)))
	if y := must[[]float64](t)(As[float64](res.Tensor("y"))); !slices.Equal(y, []float64{10}) || &y[0] != &x[0] {
		t.Error(x, y)
	}
	// Beside notes, which move what is received behind them.
	filter := must[*Prepared](t)(c.Prepare(ctx, "filter-finite", Inputs{"x": Each[float64](3)}))
	defer filter.Close()
	must[*Result](t)(filter.Call(ctx, Inputs{"x": Slice([]float64{math.NaN(), 7, 8})}, Into("y", x)))
	if !slices.Equal(x[:2], []float64{7, 8}) || x[3] != 4 {
		t.Error(x)
	}
	// Fresh memory is nobody else's.
	first := must[[]float64](t)(As[float64](must[*Result](t)(p.Call(ctx, Inputs{"x": Slice([]float64{1})})).Tensor("y")))
	must[*Result](t)(p.Call(ctx, Inputs{"x": Slice([]float64{2})}))
	if first[0] != 2 {
		t.Error(first)
	}
	// Several outputs.
	bins := must[*Prepared](t)(c.Prepare(ctx, "histogram", Inputs{"x": Each[float64](4)}, Param("bins", 2), Param("lo", 0.0), Param("hi", 2.0)))
	defer bins.Close()
	counts := make([]int64, 8)
	values := Inputs{"x": Slice([]float64{0.5, 1.5, 1.6, -3})}
	if _, err := bins.Call(ctx, values, Into("counts", counts), Into("outside", counts[1:])); !errors.Is(err, ErrArgument) {
		t.Error(err)
	}
	must[*Result](t)(bins.Call(ctx, values, Into("counts", counts), Into("outside", counts[2:])))
	if !slices.Equal(counts, []int64{1, 2, 1, 0, 0, 0, 0, 0}) {
		t.Error(counts)
	}
	// A Go bool is 0 or 1.
	cast := must[*Prepared](t)(c.Prepare(ctx, "filter-finite", Inputs{"x": EachOf(Bool8, 4)}))
	defer cast.Close()
	truths := make([]bool, 4)
	must[*Result](t)(cast.Call(ctx, Inputs{"x": Raw(Bool8, []byte{0, 7, 1, 255}, 4)}, Into("y", truths)))
	if !slices.Equal(shm.Raw(truths), []byte{0, 1, 1, 1}) {
		t.Error(shm.Raw(truths))
	}
}

func TestAFailedCallConcernsNoOther(t *testing.T) {
	address, _ := hosttest.Start(t, "traps.wasm", "spins.wasm")
	c, ctx := dialAt(t, address), context.Background()
	named := WithRequestID(ctx, "go-prepared")
	traps := must[*Prepared](t)(c.Prepare(named, "traps/k", Inputs{"x": Each[float64](4)}))
	defer traps.Close()
	x := Inputs{"x": Slice([]float64{1, 2, 3, 4})}
	for range 3 {
		_, err := traps.Call(ctx, x)
		var remote *RemoteError
		if !errors.As(err, &remote) || remote.Reason != "GUEST_TRAP" || remote.RequestID != "go-prepared" || remote.Backtrace == "" {
			t.Error(err)
		}
	}
	limited := must[*Prepared](t)(c.Prepare(ctx, "spins/k", Inputs{"x": Each[float64](4)}, Deadline(20*time.Millisecond)))
	defer limited.Close()
	for range 2 {
		if _, err := limited.Call(ctx, x); !errors.Is(err, context.DeadlineExceeded) || reason(err) != "DEADLINE" {
			t.Error(err)
		}
	}
	spins := must[*Prepared](t)(c.Prepare(ctx, "spins/k", Inputs{"x": Each[float64](4)}))
	defer spins.Close()
	for i := range 5 {
		// From before the host has the CALL to when its kernel runs.
		limited, stop := context.WithTimeout(ctx, time.Duration(i*i)*time.Millisecond+10*time.Microsecond)
		_, err := spins.Call(limited, x)
		stop()
		if !errors.Is(err, context.DeadlineExceeded) || reason(err) != "CANCELLED" && i > 0 {
			t.Error(i, err)
		}
	}
	if running := must[Stats](t)(c.Stats(ctx)).Running; running != 0 {
		t.Error(running)
	}
	done := make(chan error)
	go func() {
		_, err := spins.Call(ctx, x)
		done <- err
	}()
	time.Sleep(20 * time.Millisecond)
	// One that waits for the other is not sent.
	waiting, stop := context.WithTimeout(ctx, 10*time.Millisecond)
	defer stop()
	if _, err := spins.Call(waiting, x); !errors.Is(err, context.DeadlineExceeded) || errors.As(err, new(*RemoteError)) {
		t.Error(err)
	}
	spins.Close()
	if err := <-done; !errors.Is(err, ErrDisconnected) || !strings.Contains(err.Error(), "closed here") {
		t.Error(err)
	}
	if err := c.Ping(ctx); err != nil {
		t.Error(err)
	}
}

func TestPreparedEndsWithItsConnection(t *testing.T) {
	x := Inputs{"x": Slice([]float64{1})}
	for name, end := range map[string]func(c *Client, kill func() error) error{
		"close": func(c *Client, _ func() error) error { return c.Close() },
		"kill":  func(_ *Client, kill func() error) error { return kill() },
	} {
		leavesNothing(t, name, func(t *testing.T) {
			address, process := hosttest.Start(t, "spins.wasm")
			c, ctx := dialAt(t, address), context.Background()
			idle := must[*Prepared](t)(c.Prepare(ctx, "scale-shift", Inputs{"x": Each[float64](4)}))
			spins := must[*Prepared](t)(c.Prepare(ctx, "spins/k", Inputs{"x": Each[float64](4)}))
			done := make(chan error)
			go func() {
				_, err := spins.Call(ctx, x)
				done <- err
			}()
			time.Sleep(30 * time.Millisecond)
			if err := end(c, process.Kill); err != nil {
				t.Error(err)
			}
			if err := <-done; !errors.Is(err, ErrDisconnected) {
				t.Error(err)
			}
			for _, p := range []*Prepared{idle, spins} {
				if _, err := p.Call(ctx, x); !errors.Is(err, ErrDisconnected) {
					t.Error(err)
				}
			}
			if _, err := c.Prepare(ctx, "scale-shift", Inputs{"x": Each[float64](4)}); !errors.Is(err, ErrDisconnected) {
				t.Error(err)
			}
			// Never closed, and never leaked.
		})
	}
}

func TestForgottenPreparedEnds(t *testing.T) {
	c, ctx := dial(t), context.Background()
	before := openFDs(t)
	for range 5 {
		p := must[*Prepared](t)(c.Prepare(ctx, "scale-shift", Inputs{"x": Each[float64](4)}))
		must[*Result](t)(p.Call(ctx, Inputs{"x": Slice([]float64{1})}))
	}
	collect(t, func() bool {
		c.conn.mu.Lock()
		defer c.conn.mu.Unlock()
		return openFDs(t) == before && len(c.conn.lines) == 0
	})
}

func TestManyGoroutinesOfOnePrepared(t *testing.T) {
	c, ctx := dial(t), context.Background()
	p := must[*Prepared](t)(c.Prepare(ctx, "scale-shift", Inputs{"x": Each[float64](100)}, Param("a", 2)))
	defer p.Close()
	var group sync.WaitGroup
	for worker := range 8 {
		group.Go(func() {
			for i := range 200 {
				x := []float64{float64(worker), float64(i)}
				// Some are cancelled, at any moment; nobody gets another's result for it.
				limited, stop := context.WithCancel(ctx)
				if i%4 == 0 {
					time.AfterFunc(time.Duration(i)*time.Microsecond, stop)
				}
				res, err := p.Call(limited, Inputs{"x": Slice(x)})
				stop()
				if err != nil {
					if i%4 != 0 || !errors.Is(err, context.Canceled) {
						t.Error(worker, i, err)
					}
					continue
				}
				if y, err := As[float64](res.Tensor("y")); err != nil || !slices.Equal(y, []float64{2 * x[0], 2 * x[1]}) {
					t.Error(worker, i, y, err)
				}
			}
		})
	}
	group.Wait()
	must[*Result](t)(p.Call(ctx, Inputs{"x": Slice([]float64{1})}))
}

// places of float64[2] in and out.
const placesOfTwo = `{"prepared":3,"request_bytes":128,"inputs":[{"port":"x","dtype":"float64","shape":[2],"offset":64,"length":16}],` +
	`"reply_bytes":128,"outputs":[{"port":"y","dtype":"float64","shape":[2],"offset":64,"length":16}],"request_id":"r"}`

// packetPair is two connected sockets for packets; the caller closes both.
func packetPair(t *testing.T) (near, far int) {
	t.Helper()
	fds := must[[2]int](t)(unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0))
	return fds[0], fds[1]
}

func TestLiesAboutWhatIsPreparedAreErrors(t *testing.T) {
	change := func(from, to string) string { return strings.Replace(placesOfTwo, from, to, 1) }
	for name, body := range map[string]string{
		"another type":          change("float64", "int64"),
		"another shape":         change("[2]", "[3]"),
		"another port":          change(`"x"`, `"z"`),
		"no input":              change(`{"port":"x","dtype":"float64","shape":[2],"offset":64,"length":16}`, ""),
		"an input twice":        change(`"inputs":[`, `"inputs":[{"port":"x","dtype":"float64","shape":[2],"offset":64,"length":16},`),
		"too few bytes":         change("128", "64"),
		"too many bytes":        change("128", "192"),
		"negative bytes":        change("128", "-128"),
		"bytes beyond a frame":  change(`"reply_bytes":128`, `"reply_bytes":131136`),
		"an odd place":          change(`"offset":64`, `"offset":65`),
		"a wrong length":        change(`"length":16`, `"length":8`),
		"an output that grows":  strings.Replace(placesOfTwo, `"y","dtype":"float64","shape":[2]`, `"y","dtype":"float64","shape":[4611686018427387904,4611686018427387904]`, 1),
		"an output of nothing":  strings.Replace(placesOfTwo, `"y","dtype":"float64"`, `"y","dtype":""`, 1),
		"an output before 0":    strings.Replace(placesOfTwo, `"y","dtype":"float64","shape":[2]`, `"y","dtype":"float64","shape":[-2]`, 1),
		"an output of the sort": strings.Replace(placesOfTwo, `"length":16}],"request_id"`, `"length":24}],"request_id"`, 1),
		"not JSON":              "[]",
	} {
		lieAboutPrepared(t, name, body, func(t *testing.T) []int { near, far := packetPair(t); unix.Close(far); return []int{near} })
	}
	lieAboutPrepared(t, "no descriptor", placesOfTwo, func(*testing.T) []int { return nil })
	lieAboutPrepared(t, "two", placesOfTwo, func(t *testing.T) []int { near, far := packetPair(t); return []int{near, far} })
	lieAboutPrepared(t, "a stream", placesOfTwo, func(t *testing.T) []int {
		fds := must[[2]int](t)(unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0))
		unix.Close(fds[1])
		return fds[:1]
	})
	lieAboutPrepared(t, "a file", placesOfTwo, func(t *testing.T) []int {
		return []int{must[int](t)(unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0))}
	})
}

func lieAboutPrepared(t *testing.T, name, body string, open func(*testing.T) []int) {
	leavesNothing(t, name, func(t *testing.T) {
		c, p := scripted(t)
		go func() {
			asked := p.receive()
			fds := open(t)
			p.send(opOK, asked.sequence, body, fds...)
			closeAll(fds)
			p.drain()
		}()
		if _, err := c.Prepare(context.Background(), "k", Inputs{"x": Each[float64](2)}); !errors.Is(err, ErrProtocol) {
			t.Error(err)
		}
		if c.conn.end() != nil || len(c.conn.lines) != 0 {
			t.Error(c.conn.end(), c.conn.lines)
		}
	})
}

// preparedPeer is a client with a prepared kernel of placesOfTwo, and the host's end of its socket.
func preparedPeer(t *testing.T) (*Prepared, *peer, int) {
	t.Helper()
	c, p := scripted(t)
	near, far := packetPair(t)
	t.Cleanup(func() { unix.Close(far) })
	go func() {
		p.send(opOK, p.receive().sequence, placesOfTwo, near)
		unix.Close(near)
	}()
	return must[*Prepared](t)(c.Prepare(context.Background(), "k", Inputs{"x": Each[float64](2)})), p, far
}

// okToCall is a frame with the elements 1, 2.
func okToCall(sequence uint32) []byte {
	payload := make([]byte, 128)
	payload[0] = 2
	copy(payload[64:], shm.Raw([]float64{1, 2}))
	frame, _ := encodeFrame(header{op: opOK, sequence: sequence}, json.RawMessage(`{}`), payload)
	return frame
}

func TestLiesInAReplyToACallEndIt(t *testing.T) {
	bare := func(frame []byte) []byte {
		// Without a body, as hosts send it.
		frame = slices.Delete(slices.Clone(frame), headerBytes, headerBytes+2)
		frame[8] = 0
		return frame
	}
	at := func(offset int, b byte) []byte {
		frame := bare(okToCall(1))
		frame[offset] = b
		return frame
	}
	framed := func(op op, sequence uint32, body string, payload int) []byte {
		return must[[]byte](t)(encodeFrame(header{op: op, sequence: sequence}, json.RawMessage(body), make([]byte, payload)))
	}
	good := bare(okToCall(1))
	for name, example := range map[string]struct {
		frame []byte
		fds   bool
		says  string
	}{
		"another sequence":   {at(4, 2), false, "answers call 2"},
		"sequence 0":         {at(4, 0), false, "answers call 0"},
		"another version":    {at(2, 1), false, "version 1"},
		"another magic":      {at(0, 'X'), false, `"ST"`},
		"flags":              {at(44, 1), false, "flags"},
		"reserved bytes":     {at(41, 1), false, "reserved"},
		"an op for hosts":    {at(3, byte(opCall)), false, "op 19 answers"},
		"a push":             {framed(opGone, 1, `{}`, 0), false, "op 65 answers"},
		"a larger shape":     {at(headerBytes, 3), false, `"y" has 3 along axis 0`},
		"a huge shape":       {at(headerBytes+7, 0x80), false, `"y" has 9223372036854775810 along axis 0`},
		"another axis":       {at(headerBytes+8, 1), false, `"y" has 1 along axis 1`},
		"no payload":         {framed(opOK, 1, `{}`, 0), false, "0 payload bytes answer"},
		"a short payload":    {bare(framed(opOK, 1, `{}`, 64)), false, "64 payload bytes answer"},
		"a long payload":     {bare(framed(opOK, 1, `{}`, 192)), false, "192 payload bytes answer"},
		"half a packet":      {good[:100], false, "the packet has"},
		"half a header":      {good[:20], false, "shorter than its header"},
		"more than it says":  {append(slices.Clone(good), 0), false, "the packet has"},
		"longer than frames": {append(slices.Clone(good), make([]byte, bodyBytesMax+2)...), false, "longer than a frame"},
		"descriptors":        {good, true, "has descriptors"},
		"no JSON":            {framed(opOK, 1, `[]`, 128), false, "malformed"},
		"an ERROR of none":   {framed(opError, 1, `[]`, 0), false, "malformed"},
		"an ERROR that pays": {slices.Concat([]byte{'S', 'T', 2, 4, 1, 0, 0, 0, 0, 0, 0, 0, 8}, make([]byte, 43)), false, "payload bytes after op 4"},
		"an empty packet":    {nil, false, "the host ended"},
	} {
		leavesNothing(t, name, func(t *testing.T) {
			p, _, far := preparedPeer(t)
			done := make(chan bool)
			go func() {
				defer close(done)
				if n, err := unix.Read(far, make([]byte, 1<<17)); n != headerBytes+128 || err != nil {
					t.Error(n, err)
				}
				var rights []byte
				if example.fds {
					rights = unix.UnixRights(far)
				}
				if err := unix.Sendmsg(far, example.frame, rights, nil, 0); err != nil {
					t.Error(err)
				}
				// What comes late is nobody's.
				_ = unix.Sendmsg(far, bare(okToCall(2)), nil, nil, unix.MSG_NOSIGNAL)
			}()
			ctx, x := context.Background(), Inputs{"x": Slice([]float64{1, 2})}
			res, err := p.Call(ctx, x)
			<-done
			want := ErrProtocol
			if example.frame == nil {
				want = ErrDisconnected
			}
			if !errors.Is(err, want) || !strings.Contains(err.Error(), example.says) {
				t.Errorf("%v does not say %q: %v", err, example.says, res)
			}
			if _, again := p.Call(ctx, x); again == nil || again.Error() != err.Error() {
				t.Error("it goes on:", again)
			}
			if p.conn.end() != nil || len(p.conn.lines) != 0 {
				t.Error("the connection is whole:", p.conn.end(), p.conn.lines)
			}
		})
	}
}

func TestAStuckHostDoesNotHoldAPreparedCall(t *testing.T) {
	leavesNothing(t, "stuck", func(t *testing.T) {
		p, _, _ := preparedPeer(t)
		ctx, stop := context.WithTimeout(context.Background(), 20*time.Millisecond)
		defer stop()
		_, err := p.Call(ctx, Inputs{"x": Slice([]float64{1, 2})})
		if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, ErrDisconnected) {
			t.Error(err)
		}
		if _, err := p.Call(context.Background(), Inputs{"x": Slice([]float64{1, 2})}); !errors.Is(err, ErrDisconnected) {
			t.Error(err)
		}
	})
	for name, end := range map[string]func(p *Prepared) error{
		"closed":           (*Prepared).Close,
		"client is closed": func(p *Prepared) error { p.conn.finish(fmt.Errorf("%w: here", ErrDisconnected)); return nil },
	} {
		leavesNothing(t, name, func(t *testing.T) {
			p, _, _ := preparedPeer(t)
			time.AfterFunc(20*time.Millisecond, func() { _ = end(p) })
			if _, err := p.Call(context.Background(), Inputs{"x": Slice([]float64{1, 2})}); !errors.Is(err, ErrDisconnected) || !strings.Contains(err.Error(), "here") {
				t.Error(err)
			}
		})
	}
}

// TestACancelMeetsNoLaterCall has a host that answers CANCEL late, when the call it was for is over.
func TestACancelMeetsNoLaterCall(t *testing.T) {
	p, host, far := preparedPeer(t)
	x := Inputs{"x": Slice([]float64{1, 2})}
	answered := make(chan bool)
	go func() {
		buffer := make([]byte, 1<<17)
		_, _ = unix.Read(far, buffer)
		asked := host.receive()
		if asked.op != opCancel || asked.body["prepared"] != 3.0 || asked.body["sequence"] != nil {
			t.Error(asked)
		}
		// Its result came all the same.
		_ = unix.Sendmsg(far, okToCall(1), nil, nil, 0)
		unix.SetsockoptTimeval(far, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50_000})
		if n, err := unix.Read(far, buffer); err == nil {
			t.Error("a call was sent while a CANCEL was not answered:", n)
		}
		host.send(opOK, asked.sequence, `{"cancelled":true}`)
		close(answered)
		unix.SetsockoptTimeval(far, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10})
		if _, err := unix.Read(far, buffer); err != nil {
			t.Error(err)
		}
		_ = unix.Sendmsg(far, okToCall(2), nil, nil, 0)
	}()
	ctx, stop := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer stop()
	first := make(chan error)
	go func() {
		_, err := p.Call(ctx, x)
		first <- err
	}()
	time.Sleep(5 * time.Millisecond)
	res, err := p.Call(context.Background(), x)
	if err != nil {
		t.Fatal(err)
	}
	<-answered
	if y := must[[]float64](t)(As[float64](res.Tensor("y"))); !slices.Equal(y, []float64{1, 2}) {
		t.Error(y)
	}
	if err := <-first; err != nil {
		t.Error("results that arrived are returned:", err)
	}
}

func TestPreparedFramesAreAsTheProtocolHasThem(t *testing.T) {
	c, p := scripted(t)
	near, far := packetPair(t)
	t.Cleanup(func() { unix.Close(far) })
	const body = `{"prepared":1,"request_bytes":320,"inputs":[{"port":"b","dtype":"int8","shape":[2,3],"offset":128,"length":6},` +
		`{"port":"a","dtype":"float64","shape":[9],"offset":192,"length":72}],"reply_bytes":0,"outputs":[],"request_id":"r"}`
	go func() {
		p.send(opOK, p.receive().sequence, body, near)
		unix.Close(near)
	}()
	prepared := must[*Prepared](t)(c.Prepare(context.Background(), "k", Inputs{"a": Each[float64](9), "b": Each[int8](2, 3), "c": Name("f")}))
	got := make(chan []byte, 1)
	go func() {
		buffer := make([]byte, 1<<17)
		n, _ := unix.Read(far, buffer)
		got <- buffer[:n]
		frame, _ := encodeFrame(header{op: opOK, sequence: 1}, json.RawMessage(`{"notes":[{"key":"k","text":"t"}]}`), nil)
		_ = unix.Sendmsg(far, frame, nil, nil, 0)
	}()
	res := must[*Result](t)(prepared.Call(context.Background(), Inputs{"a": Slice([]float64{1}), "b": Slice([]int8{7, 8}, 2, 1)}))
	want := make([]byte, headerBytes+320)
	copy(want, []byte{'S', 'T', 2, 19, 1, 0, 0, 0, 0, 0, 0, 0, 0x40, 1})
	want[headerBytes], want[headerBytes+8], want[headerBytes+64] = 2, 1, 1
	copy(want[headerBytes+128:], []byte{7, 8})
	copy(want[headerBytes+192:], shm.Raw([]float64{1}))
	if frame := <-got; !bytes.Equal(frame, want) {
		t.Errorf("%x\nis not\n%x", frame, want)
	}
	if len(res.Tensors) != 0 || !slices.Equal(res.Notes, []Note{{"k", "t"}}) {
		t.Error(res)
	}
	runtime.KeepAlive(prepared)
}
