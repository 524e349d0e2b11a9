package strait

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"strait/internal/hosttest"
)

// TestMain is another process, too: one that feeds the channel `levels` of the host that this names until it is killed.
const producesAt = "STRAIT_TEST_PRODUCES_AT"

func produceForEver(address string) error {
	ctx := context.Background()
	c, err := Dial(ctx, address)
	if err != nil {
		return err
	}
	s, err := c.PrepareStream(ctx, "cumsum", Inputs{"x": Each[float64](4)}, ChannelOptions{Name: "levels"})
	if err != nil {
		return err
	}
	for {
		if _, err := s.Chunk(ctx, Inputs{"x": Slice([]float64{1})}); err != nil {
			return err
		}
	}
}

// producing is a running sum of float64s whose rows go to the channel `levels`.
func producing(t *testing.T, c *Client, options ChannelOptions) *Stream {
	t.Helper()
	options.Name = "levels"
	s := must[*Stream](t)(c.PrepareStream(context.Background(), "cumsum", Inputs{"x": Each[float64](4)}, options))
	t.Cleanup(func() { s.Close() })
	return s
}

func chunk(t *testing.T, s *Stream, x ...float64) {
	t.Helper()
	if res := must[*Result](t)(s.Chunk(context.Background(), Inputs{"x": Slice(x)})); len(res.Tensors) != 0 {
		t.Error("they go to the channel:", res.Tensors)
	}
}

func levels(t *testing.T, c *Client) *Channel {
	t.Helper()
	channel := must[*Channel](t)(c.ReadChannel(context.Background(), "levels"))
	t.Cleanup(func() { channel.Close() })
	return channel
}

// comes is the next batch of one output, y.
func comes(t *testing.T, c *Channel, number uint64, want ...float64) {
	t.Helper()
	batch := must[*Batch](t)(c.Next(context.Background()))
	if y := must[[]float64](t)(As[float64](batch.Tensor("y"))); batch.Number != number || !slices.Equal(y, want) {
		t.Errorf("batch %d is %v; batch %d of %v is wanted", batch.Number, y, number, want)
	}
}

func TestWhatGoesIntoAChannelComesOutOfIt(t *testing.T) {
	address, _ := hosttest.Start(t)
	one, other, ctx := dialAt(t, address), dialAt(t, address), context.Background()
	seed := uint64(time.Now().UnixNano())
	t.Log("seed", seed)
	random := rand.New(rand.NewPCG(seed, 1))
	taps := Slice([]float64{0.5, -0.25, 3})
	for _, example := range []struct {
		kernel  string
		options []KernelOption
		row     []int
		with    Inputs
	}{
		{"cumsum", nil, []int{3}, nil},
		{"fir", nil, []int{2}, Inputs{"taps": taps}},
		{"filter-finite", nil, nil, nil},
		// Two outputs, at the end.
		{"histogram", []KernelOption{Param("bins", 6), Param("lo", -50.0), Param("hi", 50.0)}, nil, nil},
	} {
		leavesNothing(t, example.kernel, func(t *testing.T) {
			width, most, count := product(example.row), 16, 500
			x := sampled(random, count*width)
			rows := func(from, to int) Copied {
				return Slice(x[from*width:to*width], append([]int{to - from}, example.row...)...)
			}
			inputs, whole := Inputs{"x": Each[float64](append([]int{most}, example.row...)...)}, Inputs{"x": rows(0, count)}
			for port, input := range example.with {
				inputs[port], whole[port] = input, input
			}
			prepareOptions, callOptions := []PrepareOption{ChannelOptions{Name: "levels", Batches: 2}}, []CallOption{}
			for _, option := range example.options {
				prepareOptions, callOptions = append(prepareOptions, option), append(callOptions, option)
			}
			fed := make(chan error)
			s := must[*Stream](t)(one.PrepareStream(ctx, example.kernel, inputs, prepareOptions...))
			defer s.Close()
			go func() {
				var err error
				for at := 0; err == nil && at < count; {
					to := min(at+random.IntN(2*most), count)
					_, err = s.Chunk(ctx, Inputs{"x": rows(at, to)})
					at = to
				}
				res, lastErr := s.Last(ctx, nil)
				if lastErr == nil && len(res.Tensors) != 0 {
					err = fmt.Errorf("%d tensors", len(res.Tensors))
				}
				fed <- errors.Join(err, lastErr)
			}()
			counted := other.ClientStats().CopiedBytes
			channel := levels(t, other)
			came, shapes, number := make([][]byte, len(channel.Outputs())), make([]int, len(channel.Outputs())), uint64(0)
			for batch, err := range channel.Batches(ctx) {
				if err != nil {
					t.Fatal(err)
				}
				if number++; batch.Number != number {
					t.Error(batch.Number, number)
				}
				for i, y := range batch.Tensors {
					came[i] = append(came[i], must[[]byte](t)(y.Bytes())...)
					shapes[i] += y.Shape()[0]
				}
			}
			if err := <-fed; err != nil {
				t.Error(err)
			}
			counted = other.ClientStats().CopiedBytes - counted
			want := must[*Result](t)(other.Call(ctx, example.kernel, whole, callOptions...))
			defer want.Release()
			for i, y := range want.Tensors {
				if !bytes.Equal(came[i], must[[]byte](t)(y.Bytes())) || shapes[i] != y.Shape()[0] || channel.Outputs()[i].Name != y.Name() {
					t.Errorf("output %q differs", y.Name())
				}
				counted -= int64(len(came[i]))
			}
			if counted != 0 || !slices.Equal(channel.Notes(), want.Notes) || channel.Kernel() != example.kernel {
				t.Error(counted, channel.Notes(), want.Notes, channel.Kernel())
			}
		})
		held(t, one, 2, 0)
	}
}

func TestAFullChannelHoldsItsProducerUp(t *testing.T) {
	c, ctx := dial(t), context.Background()
	s := producing(t, c, ChannelOptions{Batches: 2})
	channel := levels(t, c)
	chunk(t, s, 1)
	chunk(t, s, 2)
	done := make(chan error)
	go func() {
		_, err := s.Chunk(ctx, Inputs{"x": Slice([]float64{3})})
		done <- err
	}()
	select {
	case err := <-done:
		t.Fatal("it is full:", err)
	case <-time.After(200 * time.Millisecond):
	}
	stats := must[Stats](t)(c.Stats(ctx))
	if len(stats.Channels) != 1 {
		t.Fatal(stats.Channels)
	}
	if own := stats.Account; own.Connections < 2 || own.Quotas["streams"] == nil || own.Quotas["bytes"] != nil {
		t.Error(own)
	}
	if got := stats.Channels[0]; got.Name != "levels" || got.Kernel != "cumsum" || got.Batches != 2 || got.LagBatches != 2 || got.LagMS < 200 || !got.IsRead {
		t.Error(got)
	}
	// Asking for the second one acknowledges the first one, and that is room enough.
	comes(t, channel, 1, 1)
	comes(t, channel, 2, 3)
	if err := <-done; err != nil {
		t.Error(err)
	}
	comes(t, channel, 3, 6)
	go func() {
		_, err := s.Last(ctx, Inputs{"x": Slice([]float64{4})})
		done <- err
	}()
	comes(t, channel, 4, 10)
	select {
	case err := <-done:
		t.Fatal("the end is not acknowledged:", err)
	case <-time.After(20 * time.Millisecond):
	}
	if _, err := channel.Next(ctx); err != io.EOF {
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := s.Chunk(ctx, Inputs{"x": Slice([]float64{5})}); !errors.Is(err, ErrDisconnected) || !strings.Contains(err.Error(), "over with its last chunk") {
		t.Error(err)
	}
	held(t, c, 1, 0)
}

func TestAReaderThatComesBackGoesOnWhereItHadAcknowledged(t *testing.T) {
	c, ctx := dial(t), context.Background()
	s := producing(t, c, ChannelOptions{Resume: time.Minute})
	channel := levels(t, c)
	if _, err := c.ReadChannel(ctx, "levels"); reason(err) != "WRONG_STATE" {
		t.Error(err)
	}
	for i := range 5 {
		chunk(t, s, float64(i+1))
	}
	comes(t, channel, 1, 1)
	comes(t, channel, 2, 3)
	comes(t, channel, 3, 6)
	channel.Close()
	// By hand, and then by a loop that is left.
	channel = levels(t, c)
	comes(t, channel, 3, 6)
	if err := channel.Acknowledge(ctx); err != nil {
		t.Error(err)
	}
	channel.Close()
	channel = levels(t, c)
	for batch, err := range channel.Batches(ctx) {
		if err != nil || batch.Number != 4 {
			t.Error(batch, err)
		}
		break
	}
	for batch, err := range channel.Batches(ctx) {
		if err != nil || batch.Number != 5 {
			t.Error(batch, err)
		}
		break
	}
	channel.Close()
	channel = levels(t, c)
	comes(t, channel, 5, 15)
	done := make(chan error)
	go func() {
		_, err := s.Last(ctx, nil)
		done <- err
	}()
	if _, err := channel.Next(ctx); err != io.EOF {
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestWhoeverIsLeftOnAChannelIsTold(t *testing.T) {
	address, _ := hosttest.Start(t)
	one, other, ctx := dialAt(t, address), dialAt(t, address), context.Background()
	leavesNothing(t, "a producer that is killed", func(t *testing.T) {
		program := exec.Command(must[string](t)(os.Executable()))
		program.Env = append(os.Environ(), producesAt+"="+address)
		program.Stderr = os.Stderr
		if err := program.Start(); err != nil {
			t.Fatal(err)
		}
		var channel *Channel
		for channel == nil {
			var err error
			if channel, err = other.ReadChannel(ctx, "levels"); err != nil && reason(err) != "CHANNEL_NOT_FOUND" {
				t.Fatal(err)
			}
			time.Sleep(5 * time.Millisecond)
		}
		for number := range uint64(100) {
			comes(t, channel, number+1, float64(number+1))
		}
		if err := channel.Acknowledge(ctx); err != nil {
			t.Error(err)
		}
		// With 8 more it waits for room.
		for must[Stats](t)(other.Stats(ctx)).Channels[0].Batches < 108 {
			time.Sleep(time.Millisecond)
		}
		begun := time.Now()
		if err := program.Process.Kill(); err != nil {
			t.Error(err)
		}
		for len(must[Stats](t)(other.Stats(ctx)).Channels) > 0 {
			time.Sleep(time.Millisecond)
		}
		last, err := uint64(100), error(nil)
		for batch, nextErr := range channel.Batches(ctx) {
			if err = nextErr; err == nil {
				// What there was comes before that.
				if last++; batch.Number != last {
					t.Error(batch.Number, last)
				}
			}
		}
		var remote *RemoteError
		if !errors.As(err, &remote) || remote.Code != "UNAVAILABLE" || remote.Reason != "PRODUCER_LOST" || last != 108 {
			t.Error(err, last)
		}
		if took := time.Since(begun); took > 10*time.Second {
			t.Error("it was told after", took)
		}
		if _, err := channel.Next(ctx); !errors.Is(err, ErrDisconnected) {
			t.Error(err)
		}
		_ = program.Wait()
	})
	held(t, one, 2, 0)
	for name, leave := range map[string]func(s *Stream, c *Client) error{
		"a producer that closes":  func(s *Stream, _ *Client) error { return s.Close() },
		"its client that does so": func(_ *Stream, c *Client) error { return c.Close() },
	} {
		leavesNothing(t, name, func(t *testing.T) {
			mine := dialAt(t, address)
			s := producing(t, mine, ChannelOptions{})
			channel := levels(t, other)
			chunk(t, s, 1)
			if err := leave(s, mine); err != nil {
				t.Error(err)
			}
			comes(t, channel, 1, 1)
			if _, err := channel.Next(ctx); reason(err) != "PRODUCER_LOST" {
				t.Error(err)
			}
			mine.Close()
		})
	}
	for name, leave := range map[string]func(channel *Channel, c *Client) error{
		"a consumer that closes":  func(channel *Channel, _ *Client) error { return channel.Close() },
		"its client that does it": func(_ *Channel, c *Client) error { return c.Close() },
	} {
		for _, held := range []bool{false, true} {
			leavesNothing(t, name, func(t *testing.T) {
				mine := dialAt(t, address)
				s := producing(t, one, ChannelOptions{Batches: 1})
				channel := levels(t, mine)
				chunk(t, s, 1)
				comes(t, channel, 1, 1)
				wait := time.Duration(0)
				if held {
					wait = 30 * time.Millisecond
				}
				left := make(chan error)
				time.AfterFunc(wait, func() { left <- leave(channel, mine) })
				if !held {
					<-left
				}
				_, err := s.Chunk(ctx, Inputs{"x": Slice([]float64{2})})
				var remote *RemoteError
				if !errors.As(err, &remote) || remote.Code != "UNAVAILABLE" || remote.Reason != "CONSUMER_LOST" || remote.Details["chunk"] != 1.0 {
					t.Error(err)
				}
				if held {
					<-left
				}
				mine.Close()
			})
		}
	}
	leavesNothing(t, "a kernel that fails", func(t *testing.T) {
		// It keeps every row, and may not have so much memory.
		const most = 512
		limits := Limits{GuestBytes: 4 << 20}
		s := must[*Stream](t)(one.PrepareStream(ctx, "rolling-mean", Inputs{"x": Each[float64](most)}, Param("window", 1_000_000), limits, ChannelOptions{Name: "levels"}))
		defer s.Close()
		channel := levels(t, other)
		done := make(chan error)
		go func() {
			x, err := Inputs{"x": Slice(make([]float64, 2*most))}, error(nil)
			for err == nil {
				_, err = s.Chunk(ctx, x)
			}
			done <- err
		}()
		came, consumer := 0, error(nil)
		for _, err := range channel.Batches(ctx) {
			if consumer = err; err == nil {
				came++
			}
		}
		producer := <-done
		var told, heard *RemoteError
		if !errors.As(producer, &told) || !errors.As(consumer, &heard) {
			t.Fatal(producer, consumer)
		}
		at := told.Details["chunk"]
		if told.Reason != "LIMIT_GUEST_BYTES" && told.Reason != "KERNEL_FAILED" || heard.Reason != told.Reason || heard.Message != told.Message {
			t.Error(told, heard)
		}
		// A chunk that was cut counts once for each piece; each gave a batch before.
		if at != float64(came) || heard.Details["chunk"] != at || came == 0 {
			t.Error(at, heard.Details, came)
		}
	})
	leavesNothing(t, "a producer that nobody reads", func(t *testing.T) {
		s := producing(t, one, ChannelOptions{Batches: 1, Wait: 100 * time.Millisecond})
		chunk(t, s, 1)
		if _, err := s.Chunk(ctx, Inputs{"x": Slice([]float64{2})}); reason(err) != "DEADLINE" || !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	})
	leavesNothing(t, "a producer whose context ends", func(t *testing.T) {
		s := producing(t, one, ChannelOptions{Batches: 1})
		channel := levels(t, other)
		chunk(t, s, 1)
		limited, stop := context.WithTimeout(ctx, 20*time.Millisecond)
		defer stop()
		if _, err := s.Chunk(limited, Inputs{"x": Slice([]float64{2})}); reason(err) != "CANCELLED" || !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		comes(t, channel, 1, 1)
		if _, err := channel.Next(ctx); reason(err) != "CANCELLED" {
			t.Error(err)
		}
	})
	held(t, one, 2, 0)
	if channels := must[Stats](t)(one.Stats(ctx)).Channels; len(channels) != 0 {
		t.Error(channels)
	}
}

func TestWhatIsWrongWithAChannelIsSaid(t *testing.T) {
	c, ctx := dial(t), context.Background()
	x := Inputs{"x": Each[float64](4)}
	for says, try := range map[string]func() error{
		"-1 batches": func() error {
			_, err := c.PrepareStream(ctx, "cumsum", x, ChannelOptions{Name: "a", Batches: -1})
			return err
		},
		"a wait of -1ns": func() error {
			_, err := c.PrepareStream(ctx, "cumsum", x, ChannelOptions{Name: "a", Wait: -1})
			return err
		},
		"-1s to resume": func() error {
			_, err := c.PrepareStream(ctx, "cumsum", x, ChannelOptions{Name: "a", Resume: -time.Second})
			return err
		},
		`"\xff"`:                func() error { _, err := c.PrepareStream(ctx, "cumsum", x, ChannelOptions{Name: "\xff"}); return err },
		"it by PrepareStream":   func() error { _, err := c.Prepare(ctx, "cumsum", x, ChannelOptions{Name: "a"}); return err },
		"not UTF-8: \"a\\xff\"": func() error { _, err := c.ReadChannel(ctx, "a\xff"); return err },
	} {
		if err := try(); !errors.Is(err, ErrArgument) || !strings.Contains(err.Error(), says) {
			t.Errorf("%v does not say %q", err, says)
		}
	}
	s := producing(t, c, ChannelOptions{})
	for want, options := range map[string]ChannelOptions{
		"BAD_REQUEST": {Name: "a", Batches: 1025},
		"BAD_NAME":    {Name: "a#b"},
		"NAME_TAKEN":  {Name: "levels"},
	} {
		if _, err := c.PrepareStream(ctx, "cumsum", x, options); reason(err) != want {
			t.Error(err, "is not", want)
		}
	}
	for _, name := range []string{"", "level", strings.Repeat("x", 5000)} {
		if _, err := c.ReadChannel(ctx, name); reason(err) != "CHANNEL_NOT_FOUND" {
			t.Error(err)
		}
	}
	over, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := c.ReadChannel(over, "levels"); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	chunk(t, s, 1)
	comes(t, levels(t, c), 1, 1)
}

func TestChannelsEndWithTheirConnection(t *testing.T) {
	for name, end := range map[string]func(c *Client, kill func() error) error{
		"client": func(c *Client, _ func() error) error { return c.Close() },
		"kill":   func(_ *Client, kill func() error) error { return kill() },
	} {
		leavesNothing(t, name, func(t *testing.T) {
			address, process := hosttest.Start(t)
			c, ctx := dialAt(t, address), context.Background()
			producing(t, dialAt(t, address), ChannelOptions{})
			channel := must[*Channel](t)(c.ReadChannel(ctx, "levels"))
			done := make(chan error)
			go func() {
				_, err := channel.Next(ctx)
				done <- err
			}()
			time.Sleep(20 * time.Millisecond)
			if err := end(c, process.Kill); err != nil {
				t.Error(err)
			}
			if err := <-done; !errors.Is(err, ErrDisconnected) {
				t.Error(err)
			}
			if _, err := channel.Next(ctx); !errors.Is(err, ErrDisconnected) {
				t.Error(err)
			}
			// Never closed, and never leaked.
		})
	}
}

func TestForgottenChannelEnds(t *testing.T) {
	c, ctx := dial(t), context.Background()
	s := producing(t, c, ChannelOptions{Resume: time.Minute})
	before := openFDs(t)
	chunk(t, s, 1)
	comes(t, must[*Channel](t)(c.ReadChannel(ctx, "levels")), 1, 1)
	collect(t, func() bool {
		c.conn.mu.Lock()
		defer c.conn.mu.Unlock()
		return openFDs(t) == before && len(c.conn.lines) == 1
	})
	for must[Stats](t)(c.Stats(ctx)).Channels[0].IsRead {
		time.Sleep(time.Millisecond)
	}
}
