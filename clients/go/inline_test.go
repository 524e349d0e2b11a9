package strait

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"os"
	"reflect"
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

// framed is what the host says went through frames: in and out.
func framed(t *testing.T, c *Client) [2]int64 {
	t.Helper()
	copied := must[Stats](t)(c.Stats(context.Background())).Copied
	return [2]int64{copied["frame_in"], copied["frame_out"]}
}

func TestSmallTensorsTravelInFrames(t *testing.T) {
	c, ctx := dial(t), context.Background()
	for _, example := range []struct {
		x    Copied
		want any
	}{
		{Slice([]float64{1, -2, 3, 4, 5, 6}, 2, 3), []float64{1, -1, 2, 2, 2, 2}},
		{Slice([]float32{-3, 1}), []float32{-1, 1}},
		{Slice([]int8{-128, 0, 127}), []int8{-1, 0, 2}},
		{Slice([]uint64{math.MaxUint64}), []uint64{2}},
		{Scalar(int32(7)), []int32{2}},
		{Slice([]int16{}, 3, 0), []int16{}},
	} {
		counted, before := c.ClientStats().CopiedBytes, framed(t, c)
		res := must[*Result](t)(c.Call(ctx, "clip", Inputs{"x": example.x}, Param("lo", -1), Param("hi", 2)))
		y := res.Tensor("y")
		bytes := must[[]byte](t)(y.Bytes())
		if want := rawOf(example.want); !slices.Equal(bytes, want) {
			t.Error(bytes, want)
		}
		if y.DType() != example.x.dtype || !slices.Equal(y.Shape(), example.x.shape) || y.ByteLen() != len(example.x.bytes) || y.Name() != "y" {
			t.Error(y.Name(), y.DType(), y.Shape())
		}
		each := int64(len(example.x.bytes))
		if copied, went := c.ClientStats().CopiedBytes-counted, framed(t, c); copied != 2*each || went != [2]int64{before[0] + each, before[1] + each} {
			t.Error(copied, went, before, each)
		}
		if inode := inode(t, bytes); each > 0 && inode != "0" {
			t.Error("it is in a memory file:", inode)
		}
		res.Release()
	}
	if stats, host := c.ClientStats(), must[Stats](t)(c.Stats(ctx)); stats.Mappings != 0 || host.Own.Leases != 0 || host.Segments != 0 {
		t.Error("a small call made a segment:", stats, string(host.JSON))
	}
}

func rawOf(elements any) []byte {
	switch elements := elements.(type) {
	case []float64:
		return shm.Raw(elements)
	case []float32:
		return shm.Raw(elements)
	case []int8:
		return shm.Raw(elements)
	case []int16:
		return shm.Raw(elements)
	case []int32:
		return shm.Raw(elements)
	case []uint64:
		return shm.Raw(elements)
	}
	panic(fmt.Sprintf("%T", elements))
}

func TestASmallResultIsATensorLikeOthers(t *testing.T) {
	address, _ := hosttest.Start(t)
	c, other, ctx := dialAt(t, address), dialAt(t, address), context.Background()
	call := func(x Input, options ...CallOption) *Tensor {
		t.Helper()
		res := must[*Result](t)(c.Call(ctx, "scale-shift", Inputs{"x": x}, append(options, Param("a", 2.0), Param("b", 1))...))
		return res.Tensor("y")
	}
	y := call(Slice([]float64{1, 2}))
	if y.Writable() || y.Err() != nil || y.Mapping().Segment != "" || must[time.Duration](t)(y.Renew(ctx, time.Second)) < time.Hour {
		t.Error(y.Writable(), y.Err(), y.Mapping())
	}
	if _, err := y.ReadFrom(bytes.NewReader(make([]byte, 16))); !errors.Is(err, ErrReadOnly) {
		t.Error(err)
	}
	if _, err := As[float32](y); !errors.Is(err, ErrArgument) {
		t.Error(err)
	}
	if _, err := other.Call(ctx, "scale-shift", Inputs{"x": y}); !errors.Is(err, ErrArgument) {
		t.Error("it is of another client:", err)
	}
	// It goes on as it came, and under a name by a copy.
	before := framed(t, c)
	z := call(y)
	if data := must[[]float64](t)(As[float64](z)); !slices.Equal(data, []float64{7, 11}) || framed(t, c) != [2]int64{before[0] + 16, before[1] + 16} {
		t.Error(data, framed(t, c), before)
	}
	counted := c.ClientStats().CopiedBytes
	must[Flight](t)(c.Publish(ctx, "go small", y))
	defer c.Delete(ctx, "go small")
	if copied := c.ClientStats().CopiedBytes - counted; copied != 16 || c.ClientStats().Mappings != 0 {
		t.Error(copied, c.ClientStats())
	}
	if _, err := other.Publish(ctx, "go small too", y); !errors.Is(err, ErrArgument) {
		t.Error("it is of another client:", err)
	}
	// Named as the port, as of one that has a segment.
	seen := must[*Tensor](t)(other.Fetch(ctx, "go small#y"))
	defer seen.Release()
	if data := must[[]float64](t)(As[float64](seen)); !slices.Equal(data, []float64{3, 5}) {
		t.Error(data)
	}
	truths := call(Slice([]float64{0, 1}))
	truths.Release()
	truths.Release()
	_, bytesErr := truths.Bytes()
	_, callErr := c.Call(ctx, "clip", Inputs{"x": truths})
	_, publishErr := c.Publish(ctx, "go gone", truths)
	_, renewErr := truths.Renew(ctx, 0)
	for _, err := range []error{bytesErr, callErr, publishErr, renewErr, truths.Err()} {
		if !errors.Is(err, ErrReleased) {
			t.Error(err)
		}
	}
	if err := c.Close(); err != nil || !errors.Is(y.Err(), ErrDisconnected) {
		t.Error(err, y.Err())
	}
	if data := must[[]float64](t)(As[float64](y)); !slices.Equal(data, []float64{3, 5}) {
		t.Error("its elements outlive the connection:", data)
	}
}

func TestForgottenSmallResultsCostNothing(t *testing.T) {
	var log bytes.Buffer
	c, ctx := dial(t, WithLogger(slog.New(slog.NewTextHandler(&log, nil)))), context.Background()
	var kept [][]float64
	for i := range 100 {
		res := must[*Result](t)(c.Call(ctx, "scale-shift", Inputs{"x": Slice([]float64{float64(i)})}, Param("a", 2)))
		kept = append(kept, must[[]float64](t)(As[float64](res.Tensor("y"))))
	}
	runtime.GC()
	runtime.GC()
	for i, data := range kept {
		if data[0] != 2*float64(i) {
			t.Error(i, data)
		}
	}
	if err := c.Ping(ctx); err != nil || c.ClientStats().Forgotten != 0 || log.Len() != 0 {
		t.Error(err, c.ClientStats(), log.String())
	}
}

func TestWhatIsASegmentAllTheSame(t *testing.T) {
	c, ctx := dial(t), context.Background()
	most := int(c.Welcome().InlineBytes)
	call := func(elements int, options ...CallOption) bool {
		t.Helper()
		res := must[*Result](t)(c.Call(ctx, "scale-shift", Inputs{"x": Slice(make([]float64, elements))}, append(options, Param("b", 1))...))
		defer res.Release()
		y := res.Tensor("y")
		data := must[[]float64](t)(As[float64](y))
		if len(data) != elements || data[0] != 1 || data[elements-1] != 1 {
			t.Error(len(data))
		}
		return y.Mapping().Segment != ""
	}
	for _, example := range []struct {
		elements int
		options  []CallOption
		segment  bool
	}{
		{most / 8, nil, false}, {most/8 + 1, nil, true}, {1, []CallOption{InlineBytes(0)}, true},
		{4, []CallOption{InlineBytes(32)}, false}, {5, []CallOption{InlineBytes(32)}, true},
		{most/8 + 1, []CallOption{InlineBytes(math.MaxInt64)}, true}, {1, []CallOption{Seal()}, true},
		{1, []CallOption{PublishAs("y", "go named"), Replace()}, true},
	} {
		before := framed(t, c)
		if got := call(example.elements, example.options...); got != example.segment {
			t.Error(example, got)
		}
		if out := framed(t, c)[1] - before[1]; (out == 0) != example.segment {
			t.Error(example, out)
		}
	}
	defer c.Delete(ctx, "go named")
	if _, err := c.Call(ctx, "scale-shift", Inputs{"x": Scalar(1.0)}, InlineBytes(-1)); !errors.Is(err, ErrArgument) {
		t.Error(err)
	}
	// A segment asked for is published without a copy.
	res := must[*Result](t)(c.Call(ctx, "scale-shift", Inputs{"x": Scalar(1.0)}, InlineBytes(0)))
	defer res.Release()
	counted := c.ClientStats().CopiedBytes
	must[Flight](t)(c.Publish(ctx, "go six", res.Tensor("y")))
	defer c.Delete(ctx, "go six")
	if copied := c.ClientStats().CopiedBytes - counted; copied != 0 {
		t.Error(copied)
	}
}

func TestAHostThatTakesNoneInFrames(t *testing.T) {
	t.Setenv("STRAIT__LIMITS__INLINE_BYTES", "0")
	c, ctx := dial(t), context.Background()
	for _, x := range []Copied{Slice([]float64{1, 2}), Slice([]float64{})} {
		res := must[*Result](t)(c.Call(ctx, "scale-shift", Inputs{"x": x}, Param("a", 3)))
		if y := res.Tensor("y"); y.Mapping().Segment == "" || y.Len() != x.shape[0] {
			t.Error(y.Mapping())
		}
		res.Release()
	}
	if c.Welcome().InlineBytes != 0 || framed(t, c) != [2]int64{} {
		t.Error(c.Welcome(), framed(t, c))
	}
}

func TestAPayloadHasRoomForSoMuch(t *testing.T) {
	for _, example := range []struct {
		sendBuffer, room int
	}{{0, 0}, {headerBytes + bodyBytesMax, 0}, {headerBytes + bodyBytesMax + 32 + 9, 9}, {212992, payloadBytesMax}, {1 << 30, payloadBytesMax}} {
		if room := payloadRoom(example.sendBuffer); room != example.room {
			t.Error(example, room)
		}
	}
	// Linux itself: the longest body and as much payload as there is room for is sent, and a byte more is not.
	near, far := unixPair(t)
	if err := near.SetWriteBuffer(64 << 10); err != nil {
		t.Fatal(err)
	}
	o := defaultOptions()
	o.renew = false
	c := must[*conn](t)(newConn(near, &o))
	defer c.finish(net.ErrClosed)
	longest := headerBytes + bodyBytesMax + c.payloadRoom
	if c.payloadRoom == 0 || c.payloadRoom == payloadBytesMax {
		t.Fatal(c.payloadRoom)
	}
	if err := c.write(make([]byte, longest), nil); err != nil {
		t.Error(err)
	}
	if n, err := far.Read(make([]byte, frameBytesMax)); n != longest || err != nil {
		t.Error(n, err)
	}
	if err := c.write(make([]byte, longest+1), nil); !errors.Is(err, unix.EMSGSIZE) {
		t.Error(err)
	}
}

// TestInputsThatDoNotFitOneFrame have segments, as many as there are too many.
func TestInputsThatDoNotFitOneFrame(t *testing.T) {
	c, p := scripted(t)
	inputs := Inputs{"long": Slice(make([]byte, 32769))}
	for i := range 5 {
		inputs[fmt.Sprint(i)] = Raw(Uint8, bytes.Repeat([]byte{byte(i)}, 32768-i), 32768-i)
	}
	counts := make(chan [2]int, 1)
	go func() {
		segments := 0
		for {
			asked := p.receive()
			if asked.op != opCreate {
				inline := 0
				for port, input := range asked.body["inputs"].(map[string]any) {
					said, framed := input.(map[string]any)["inline"].(map[string]any)
					if !framed {
						continue
					}
					inline++
					at, length := int(said["offset"].(float64)), int(said["length"].(float64))
					if part := asked.payload[at : at+length]; at%alignBytes != 0 || bytes.Count(part, []byte{port[0] - '0'}) != length {
						t.Error(port, at, length)
					}
				}
				p.send(opOK, asked.sequence, `{}`)
				counts <- [2]int{inline, segments}
				return
			}
			segments++
			spec := asked.body["tensors"].([]any)[0].(map[string]any)
			shape := int(spec["shape"].([]any)[0].(float64))
			file := must[*os.File](t)(shm.NewFile("made"))
			defer file.Close()
			must[int](t)(unix.FcntlInt(file.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK))
			if err := file.Truncate(131072); err != nil {
				t.Error(err)
			}
			p.send(opOK, asked.sequence, fmt.Sprintf(`{"mapping":{"strait-mmap":1,"segment":"%d","bytes":131072,"writers":"anyone",`+
				`"tensors":[{"name":"x","dtype":"uint8","shape":[%d],"offset":65536,"length":%[2]d}]},"lease":%[1]d,"expires_ms":60000}`, segments, shape), int(file.Fd()))
		}
	}()
	must[*Result](t)(c.Call(context.Background(), "k", inputs))
	if got := <-counts; got != [2]int{4, 2} {
		t.Error("inline and in segments:", got)
	}
}

func TestSeveralResultsOfOneFrame(t *testing.T) {
	c, p := scripted(t)
	payload := make([]byte, 80)
	copy(payload, "abc")
	copy(payload[64:], shm.Raw([]float64{1.5, 2.5}))
	file, _ := p.memory(writersHost)
	go func() {
		asked := p.receive()
		if asked.body["inline_bytes"] != 32768.0 {
			t.Error(asked.body)
		}
		segment := strings.Replace(mapping(writersHost), `"x"`, `"s"`, 1)
		p.sendBeside(opOK, asked.sequence, `{"results":[{"port":"b","inline":{"dtype":"uint8","shape":[3],"offset":0,"length":3}},`+
			`{"port":"s","mapping":`+segment+`,"lease":3,"expires_ms":60000,"fd":0},`+
			`{"port":"none","inline":{"dtype":"float64","shape":[0,2],"offset":80,"length":0}},`+
			`{"port":"f","inline":{"dtype":"float64","shape":[2],"offset":64,"length":16}}]}`, payload, int(file.Fd()))
	}()
	res := must[*Result](t)(c.Call(context.Background(), "k", nil))
	var ports []string
	for _, tensor := range res.Tensors {
		ports = append(ports, tensor.Name())
	}
	if !reflect.DeepEqual(ports, []string{"b", "s", "none", "f"}) || c.ClientStats().CopiedBytes != 19 {
		t.Error(ports, c.ClientStats())
	}
	f, b := must[[]float64](t)(As[float64](res.Tensor("f"))), must[[]byte](t)(res.Tensor("b").Bytes())
	if !slices.Equal(f, []float64{1.5, 2.5}) || string(b) != "abc" || cap(b) != 3 || res.Tensor("none").Len() != 0 {
		t.Error(f, b, cap(b))
	}
	res.Tensor("b").Release()
	if again := must[[]float64](t)(As[float64](res.Tensor("f"))); again[1] != 2.5 {
		t.Error("each is released by itself:", again)
	}
	res.Release()
	if stats := c.ClientStats(); stats.Mappings != 0 {
		t.Error(stats)
	}
}

func TestLiesAboutSmallResultsAreErrors(t *testing.T) {
	inline := func(dtype, shape, offset, length string) string {
		return `"inline":{"dtype":"` + dtype + `","shape":` + shape + `,"offset":` + offset + `,"length":` + length + `}`
	}
	right := inline("float64", "[2]", "0", "16")
	for says, more := range map[string]string{
		"88 bytes at 0 of 80 in all":             inline("float64", "[3]", "0", "24") + `},{"port":"z",` + inline("float64", "[11]", "0", "88"),
		"8 bytes at 128 of 80":                   inline("float64", "[1]", "128", "8"),
		"at 9223372036854775744 of 80":           inline("float64", "[1]", "9223372036854775744", "8"),
		"at -64 of 80":                           inline("float64", "[1]", "-64", "8"),
		"0 bytes at 81 of 80":                    inline("float64", "[0]", "81", "0"),
		"number 18446744073709551552":            inline("float64", "[1]", "18446744073709551552", "8"),
		"number 0.5":                             inline("float64", "[1]", "0.5", "8"),
		"float64[2] has 16 bytes, not 8":         inline("float64", "[2]", "0", "8"),
		"float64[2] has 16 bytes, not -16":       inline("float64", "[2]", "0", "-16"),
		"at 8, no multiple of 64":                inline("float64", "[1]", "8", "8"),
		"more bytes than there are addresses":    inline("float64", "[4294967296,4294967296,2]", "0", "16"),
		"negative size":                          inline("float64", "[-2,-1]", "0", "16"),
		"at most 8":                              inline("float64", "[1,1,1,1,1,1,1,1,2]", "0", "16"),
		`"float7" is not one`:                    inline("float7", "[2]", "0", "16"),
		"neither a mapping nor bytes":            `"name":"x"`,
		"output \"y\" has neither":               `"mapping":null,"inline":null`,
		"both a mapping and bytes":               right + `,"mapping":` + mapping(writersHost),
		"lease, name or descriptor":              right + `,"lease":9,"expires_ms":60000`,
		"which need no lease, name":              right + `,"fd":0`,
		"need no lease, name or descriptor; che": right + `,"name":"x"`,
		"a lease but no descriptor of its own":   right + `},{"port":"s","mapping":` + mapping(writersHost) + `,"lease":9`,
	} {
		leavesNothing(t, says, func(t *testing.T) {
			c, p := scripted(t)
			// What was granted beside the lie is given back.
			released := make(chan bool, 1)
			go func() {
				file, _ := p.memory(writersHost)
				var fds []int
				if strings.Contains(more, `"fd"`) {
					fds = append(fds, int(file.Fd()))
				}
				p.sendBeside(opOK, p.receive().sequence, `{"results":[{"port":"y",`+more+`}]}`, make([]byte, 80), fds...)
				if strings.Contains(more, `"lease":9`) {
					released <- p.receive().op == opRelease
				} else {
					released <- true
				}
				p.drain()
			}()
			if res, err := c.Call(context.Background(), "k", nil); !errors.Is(err, ErrProtocol) || !strings.Contains(err.Error(), says) {
				t.Errorf("%v does not say %q: %v", err, says, res)
			}
			if !<-released {
				t.Error("the lease was not given back")
			}
			if stats := c.ClientStats(); stats.Mappings != 0 || c.conn.end() != nil {
				t.Error("the connection is whole:", stats, c.conn.end())
			}
		})
	}
}

func TestAPayloadWhereNoneBelongs(t *testing.T) {
	for says, speak := range map[string]func(p *peer, sequence uint32){
		"payload bytes answer op 22": func(p *peer, sequence uint32) { p.sendBeside(opOK, sequence, `{}`, make([]byte, 8)) },
		"8 payload bytes after op 4": func(p *peer, sequence uint32) { p.sendBeside(opError, sequence, `{}`, make([]byte, 8)) },
		"8 payload bytes after op 65": func(p *peer, _ uint32) {
			p.sendBeside(opGone, 0, `{}`, make([]byte, 8))
		},
		"131073 payload bytes of at most": func(p *peer, sequence uint32) {
			if err := p.socket.SetWriteBuffer(1 << 20); err != nil {
				p.t.Error(err)
			}
			p.sendBeside(opOK, sequence, `{}`, make([]byte, payloadBytesMax+1))
		},
	} {
		leavesNothing(t, says, func(t *testing.T) {
			c, p := scripted(t)
			go func() {
				speak(p, p.receive().sequence)
				p.drain()
			}()
			if err := c.Ping(context.Background()); !errors.Is(err, ErrProtocol) || !strings.Contains(err.Error(), says) {
				t.Errorf("%v does not say %q", err, says)
			}
		})
	}
}

func TestReleaseMeetsEveryUseOfASmallResult(t *testing.T) {
	c, ctx := dial(t), context.Background()
	for range 20 {
		res := must[*Result](t)(c.Call(ctx, "scale-shift", Inputs{"x": Slice([]float64{1, 2, 3})}, Param("a", 2)))
		y := res.Tensor("y")
		var group sync.WaitGroup
		for name, use := range map[string]func() error{
			"view":    func() error { return y.View(func(bytes []byte) error { _ = bytes[23]; return nil }) },
			"renew":   func() error { _, err := y.Renew(ctx, time.Minute); return err },
			"shape":   func() error { _, _, _ = y.Shape(), y.Writable(), y.Mapping(); return nil },
			"release": func() error { y.Release(); return nil },
			"call": func() error {
				again, err := c.Call(ctx, "scale-shift", Inputs{"x": y}, Param("a", 2))
				if err == nil {
					if data, err := As[float64](again.Tensor("y")); err != nil || data[2] != 12 {
						t.Error(data, err)
					}
				}
				again.Release()
				return err
			},
			"publish": func() error { _, err := c.Publish(ctx, "go raced", y, Replace()); return err },
		} {
			group.Go(func() {
				for range 5 {
					if err := use(); err != nil && !errors.Is(err, ErrReleased) {
						t.Error(name, err)
					}
				}
			})
		}
		group.Wait()
	}
	if err := c.Delete(ctx, "go raced"); err != nil && reason(err) != "FLIGHT_NOT_FOUND" {
		t.Error(err)
	}
	if stats := c.ClientStats(); stats.Mappings != 0 {
		t.Error(stats)
	}
}
