package strait

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"iter"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"strait/internal/hosttest"
	"strait/internal/shm"
)

// sampled is numbers, some of which are none.
func sampled(random *rand.Rand, count int) []float64 {
	x := make([]float64, count)
	for i := range x {
		switch x[i] = float64(random.IntN(2000))/7 - 100; random.IntN(20) {
		case 0:
			x[i] = []float64{math.NaN(), math.Inf(1), math.Inf(-1), math.Copysign(0, -1), 1e300}[random.IntN(5)]
		}
	}
	return x
}

// held is what this client's principal has at the host, once that is as wanted.
func held(t *testing.T, c *Client, connections, bytes int64) {
	t.Helper()
	var had struct {
		Account struct{ Connections, Bytes, Running int64 }
	}
	for range 200 {
		stats := must[Stats](t)(c.Stats(context.Background()))
		if err := json.Unmarshal(stats.JSON, &had); err != nil {
			t.Fatal(err)
		}
		if had.Account.Connections == connections && had.Account.Bytes == bytes && had.Account.Running == 0 {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Errorf("the host has %+v; %d connections and %d bytes are wanted", had, connections, bytes)
}

func TestHoweverRowsAreCutTheyAreThoseOfOneCall(t *testing.T) {
	c, ctx := dial(t), context.Background()
	seed := uint64(time.Now().UnixNano())
	t.Log("seed", seed)
	random := rand.New(rand.NewPCG(seed, 1))
	taps := Slice([]float64{0.5, -0.25, 3, 1e-3, 0, 7, 1})
	for _, example := range []struct {
		kernel  string
		options []KernelOption
		row     []int
		with    Inputs
	}{
		{"cumsum", nil, []int{3}, nil},
		{"cumsum", nil, []int{2, 0}, nil},
		{"rolling-mean", []KernelOption{Param("window", 5)}, []int{2}, nil},
		{"fir", nil, []int{2}, Inputs{"taps": taps}},
		{"histogram", []KernelOption{Param("bins", 6), Param("lo", -50.0), Param("hi", 50.0)}, nil, nil},
		{"cast", []KernelOption{Param("to", Float32)}, []int{1, 2}, nil},
		{"filter-finite", nil, nil, nil},
	} {
		width := product(example.row)
		for _, most := range []int{1, 3, 16, 200} {
			inputs := Inputs{"x": Each[float64](append([]int{most}, example.row...)...)}
			whole := Inputs{}
			for port, input := range example.with {
				inputs[port], whole[port] = input, input
			}
			var prepareOptions []PrepareOption
			var callOptions []CallOption
			for _, option := range example.options {
				prepareOptions, callOptions = append(prepareOptions, option), append(callOptions, option)
			}
			s := must[*Stream](t)(c.PrepareStream(ctx, example.kernel, inputs, prepareOptions...))
			// Nothing of one is in the next.
			for _, count := range []int{0, 1, 7, 100} {
				x := sampled(random, count*width)
				rows := func(from, to int) Inputs {
					return Inputs{"x": Slice(x[from*width:to*width], append([]int{to - from}, example.row...)...)}
				}
				counted, before := c.ClientStats(), framed(t, c)
				came := make([]struct {
					bytes []byte
					rows  int
				}, len(s.Outputs()))
				var notes []Note
				frames, at := 0, 0
				for last := false; !last; {
					// Of no rows, too, also as the last one, and more than were prepared.
					to := min(at+random.IntN(2*most+2), count)
					last = to == count && random.IntN(2) == 0
					frames += max((to-at+most-1)/most, 1)
					send, given := s.Chunk, rows(at, to)
					if last {
						send = s.Last
						if at == to {
							given = nil
						}
					}
					res := must[*Result](t)(send(ctx, given))
					for i, y := range res.Tensors {
						came[i].bytes = append(came[i].bytes, must[[]byte](t)(y.Bytes())...)
						came[i].rows += y.Shape()[0]
						if y.ByteLen() > 0 && cap(must[[]byte](t)(y.Bytes())) != y.ByteLen() {
							t.Error("an append to a result would write where others are")
						}
					}
					if len(res.Notes) > 0 && !last || res.RequestID == "" {
						t.Error(res)
					}
					notes, at = res.Notes, to
				}
				out := 0
				for _, output := range came {
					out += len(output.bytes)
				}
				stats := c.ClientStats()
				if copied, calls := stats.CopiedBytes-counted.CopiedBytes, stats.Calls-counted.Calls; copied != int64(8*len(x)+out) || calls != int64(frames) {
					t.Error(example.kernel, copied, calls, 8*len(x)+out, frames)
				}
				if went := framed(t, c); went != [2]int64{before[0] + int64(8*len(x)), before[1] + int64(out)} {
					t.Error(example.kernel, went, before, 8*len(x), out)
				}
				whole["x"] = rows(0, count)["x"]
				want := must[*Result](t)(c.Call(ctx, example.kernel, whole, callOptions...))
				for i, y := range want.Tensors {
					if !bytes.Equal(came[i].bytes, must[[]byte](t)(y.Bytes())) || came[i].rows != y.Shape()[0] || s.Outputs()[i].Name != y.Name() {
						t.Errorf("%s: %d rows of %v in chunks of %d: output %q differs", example.kernel, count, example.row, most, y.Name())
					}
				}
				if !slices.Equal(notes, want.Notes) {
					t.Error(notes, want.Notes)
				}
				want.Release()
			}
			s.Close()
		}
	}
}

func product(sizes []int) int {
	all := 1
	for _, size := range sizes {
		all *= size
	}
	return all
}

// counting is chunks of x with so many rows each, that counts those that were asked for.
func counting(x []float64, each int, asked *int) iter.Seq[Inputs] {
	return func(yield func(Inputs) bool) {
		for chunk := range slices.Chunk(x, each) {
			*asked++
			if !yield(Inputs{"x": Slice(chunk)}) {
				return
			}
		}
	}
}

func TestALoopOverAStream(t *testing.T) {
	c, ctx := dial(t), context.Background()
	held(t, c, 1, 0)
	x := sampled(rand.New(rand.NewPCG(1, 2)), 1000)
	inputs := Inputs{"x": Each[float64](64), "taps": Slice([]float64{0.5, 2, -1})}
	var y []float64
	asked, yields := 0, 0
	leavesNothing(t, "whole", func(t *testing.T) {
		for rows, err := range c.Stream(ctx, "fir", inputs, counting(x, 300, &asked)) {
			if err != nil {
				t.Fatal(err)
			}
			yields++
			y = append(y, must[[]float64](t)(As[float64](rows.Tensor("y")))...)
		}
	})
	want := must[*Result](t)(c.Call(ctx, "fir", Inputs{"x": Slice(x), "taps": inputs["taps"]}))
	if !bytes.Equal(shm.Raw(y), must[[]byte](t)(want.Tensor("y").Bytes())) || asked != 4 || yields != 5 {
		t.Error(asked, yields, len(y))
	}
	want.Release()
	held(t, c, 1, 0)
	cancelled, cancel := context.WithCancel(ctx)
	for name, run := range map[string]func(t *testing.T){
		"left": func(t *testing.T) {
			asked = 0
			for range c.Stream(ctx, "fir", inputs, counting(x, 100, &asked)) {
				break
			}
			if asked != 1 {
				t.Error(asked)
			}
		},
		"panics": func(t *testing.T) {
			defer func() {
				if recover() != "here" {
					t.Error("no panic")
				}
			}()
			for range c.Stream(ctx, "fir", inputs, counting(x, 100, &asked)) {
				panic("here")
			}
		},
		"the chunks panic": func(t *testing.T) {
			defer func() {
				if recover() != "there" {
					t.Error("no panic")
				}
			}()
			for range c.Stream(ctx, "fir", inputs, func(func(Inputs) bool) { panic("there") }) {
			}
		},
		"a chunk that does not fit": func(t *testing.T) {
			got := erring(c.Stream(ctx, "fir", inputs, slices.Values([]Inputs{{"x": Slice(x)}, {"x": Slice([]int8{1})}, {"x": Slice(x)}})))
			if len(got) != 2 || got[0] != nil || !errors.Is(got[1], ErrArgument) {
				t.Error(got)
			}
		},
		"a context that ends": func(t *testing.T) {
			got := erring(c.Stream(cancelled, "fir", inputs, func(yield func(Inputs) bool) {
				yield(Inputs{"x": Slice(x)})
				cancel()
				if yield(Inputs{"x": Slice(x)}) {
					t.Error("it goes on")
				}
			}))
			if len(got) != 2 || got[0] != nil || !errors.Is(got[1], context.Canceled) {
				t.Error(got)
			}
		},
		"no such kernel": func(t *testing.T) {
			got := erring(c.Stream(ctx, "nothing", inputs, counting(x, 100, &asked)))
			if len(got) != 1 || reason(got[0]) != "KERNEL_NOT_FOUND" {
				t.Error(got)
			}
		},
	} {
		leavesNothing(t, name, run)
		held(t, c, 1, 0)
	}
	must[*Result](t)(c.Call(ctx, "scale-shift", Inputs{"x": Slice(x)}))
}

// erring is the errors of a stream.
func erring(rows iter.Seq2[*Result, error]) (all []error) {
	for _, err := range rows {
		all = append(all, err)
	}
	return all
}

func TestWhatDoesNotFitAStreamIsNotSent(t *testing.T) {
	c, ctx := dial(t), context.Background()
	for says, x := range map[string]Input{
		"float64[], comes in chunks":    Each[float64](),
		"float64[0 2], comes in chunks": Each[float64](0, 2),
		"-1":                            Each[float64](2, -1),
	} {
		if _, err := c.PrepareStream(ctx, "cumsum", Inputs{"x": x}); !errors.Is(err, ErrArgument) || !strings.Contains(err.Error(), says) {
			t.Errorf("%v does not say %q", err, says)
		}
	}
	for want, try := range map[string]func() (*Stream, error){
		"UNSUPPORTED":   func() (*Stream, error) { return c.PrepareStream(ctx, "zscore", Inputs{"x": Each[float64](4)}) },
		"BAD_INPUT":     func() (*Stream, error) { return c.PrepareStream(ctx, "cumsum", Inputs{"x": Each[float64](1 << 20)}) },
		"MISSING_INPUT": func() (*Stream, error) { return c.PrepareStream(ctx, "cumsum", Inputs{}) },
	} {
		if _, err := try(); reason(err) != want {
			t.Error(err, "is not", want)
		}
	}
	s := must[*Stream](t)(c.PrepareStream(ctx, "cumsum", Inputs{"x": Each[float64](2, 3)}))
	defer s.Close()
	one := Inputs{"x": Slice([]float64{1, 2, 3}, 1, 3)}
	must[*Result](t)(s.Chunk(ctx, one))
	before := framed(t, c)
	for says, inputs := range map[string]Inputs{
		`"x" is missing`:                   nil,
		`input "z" is not one`:             {"x": one["x"], "z": one["x"]},
		"float32[1 3] does not fit":        {"x": Slice(make([]float32, 3), 1, 3)},
		"float64[1 2] does not fit":        {"x": Slice(make([]float64, 2), 1, 2)},
		"float64[3] does not fit":          {"x": Slice(make([]float64, 3))},
		"float64[] does not fit":           {"x": Scalar(1.0)},
		"5 were given":                     {"x": Raw(Float64, make([]byte, 5), 1, 3)},
		`the flight "f" does not go`:       {"x": Name("f")},
		"an Each does not go":              {"x": Each[float64](2, 3)},
		"float64[1 3 1] does not fit flo":  {"x": Slice(make([]float64, 3), 1, 3, 1)},
		"float64[9 4] does not fit float6": {"x": Slice(make([]float64, 36), 9, 4)},
	} {
		if res, err := s.Chunk(ctx, inputs); !errors.Is(err, ErrArgument) || !strings.Contains(err.Error(), says) {
			t.Errorf("%v does not say %q: %v", err, says, res)
		}
	}
	over, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := s.Last(over, one); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if now := framed(t, c); now != before {
		t.Error("something was sent:", now, before)
	}
	// It goes on, with a tensor in shared memory, too.
	x := must[TensorOf[float64]](t)(NewTensor[float64](ctx, c, 1, 3))
	defer x.Release()
	copy(x.Data(), []float64{1, 1, 1})
	if y := must[[]float64](t)(As[float64](must[*Result](t)(s.Last(ctx, Inputs{"x": x})).Tensor("y"))); !slices.Equal(y, []float64{2, 3, 4}) {
		t.Error(y)
	}
}

func TestStreamsEndWithTheirConnection(t *testing.T) {
	x := Inputs{"x": Slice([]float64{1})}
	for name, end := range map[string]func(c *Client, s *Stream, kill func() error) error{
		"close":  func(_ *Client, s *Stream, _ func() error) error { return errors.Join(s.Close(), s.Close()) },
		"client": func(c *Client, _ *Stream, _ func() error) error { return c.Close() },
		"kill":   func(_ *Client, _ *Stream, kill func() error) error { return kill() },
	} {
		leavesNothing(t, name, func(t *testing.T) {
			address, process := hosttest.Start(t)
			c, ctx := dialAt(t, address), context.Background()
			s := must[*Stream](t)(c.PrepareStream(ctx, "cumsum", Inputs{"x": Each[float64](4)}))
			must[*Result](t)(s.Chunk(ctx, x))
			if err := end(c, s, process.Kill); err != nil {
				t.Error(err)
			}
			for range 2 {
				if _, err := s.Chunk(ctx, x); !errors.Is(err, ErrDisconnected) {
					t.Error(err)
				}
			}
			if name == "close" {
				held(t, c, 1, 0)
			}
		})
	}
}

func TestACancelledChunkLeavesNothing(t *testing.T) {
	c, ctx := dial(t), context.Background()
	// Piece after piece, for longer than any test.
	x := Inputs{"x": Slice(make([]bool, 1<<24))}
	leavesNothing(t, "cancelled", func(t *testing.T) {
		for i := range 10 {
			s := must[*Stream](t)(c.PrepareStream(ctx, "cumsum", Inputs{"x": EachOf(Bool8, 1)}))
			calls := c.ClientStats().Calls
			limited, stop := context.WithTimeout(ctx, time.Duration(i)*time.Millisecond+50*time.Microsecond)
			_, err := s.Chunk(limited, x)
			stop()
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Error(i, err)
			}
			sent := c.ClientStats().Calls > calls
			if _, err := s.Chunk(ctx, Inputs{"x": Slice([]bool{true})}); errors.Is(err, ErrDisconnected) != sent {
				t.Error(i, sent, err)
			}
			s.Close()
		}
	})
	held(t, c, 1, 0)
}

func TestForgottenStreamEnds(t *testing.T) {
	c, ctx := dial(t), context.Background()
	before := openFDs(t)
	for range 3 {
		s := must[*Stream](t)(c.PrepareStream(ctx, "cumsum", Inputs{"x": Each[float64](4)}))
		must[*Result](t)(s.Chunk(ctx, Inputs{"x": Slice([]float64{1})}))
	}
	collect(t, func() bool {
		c.conn.mu.Lock()
		defer c.conn.mu.Unlock()
		return openFDs(t) == before && len(c.conn.lines) == 0
	})
	held(t, c, 1, 0)
}
