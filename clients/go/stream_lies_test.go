package strait

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"strait/internal/shm"
)

// streamPeer is a client with a stream of what body says, and the host's end of its socket.
func streamPeer(t *testing.T, body string, x Brought) (*Stream, *peer, int) {
	t.Helper()
	c, p := scripted(t)
	near, far := packetPair(t)
	t.Cleanup(func() { unix.Close(far) })
	if err := unix.SetsockoptTimeval(far, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10}); err != nil {
		t.Fatal(err)
	}
	go func() {
		asked := p.receive()
		if asked.op != opPrepare || asked.body["stream"] != true {
			t.Error(asked)
		}
		p.send(opOK, asked.sequence, body, near)
		unix.Close(near)
	}()
	return must[*Stream](t)(c.PrepareStream(context.Background(), "k", Inputs{"x": x})), p, far
}

// rowsOf is a frame with rows, of width elements each, in a payload of so many bytes.
func rowsOf(op op, sequence uint32, payloadBytes, count, width int, elements ...float64) []byte {
	frame := make([]byte, headerBytes+payloadBytes)
	encodeHeader(frame, header{op: op, sequence: sequence}, 0, payloadBytes)
	payload := frame[headerBytes:]
	binary.LittleEndian.PutUint64(payload, uint64(count))
	if width > 0 {
		binary.LittleEndian.PutUint64(payload[8:], uint64(width))
	}
	copy(payload[min(sizesBytes, len(payload)):], shm.Raw(elements))
	return frame
}

// placesOfRows are of float64[2 2] in and out.
var placesOfRows = strings.NewReplacer("[2]", "[2,2]", `"length":16`, `"length":32`).Replace(placesOfTwo)

func TestAStreamsFramesAreAsTheProtocolHasThem(t *testing.T) {
	s, _, far := streamPeer(t, placesOfTwo, Each[float64](2))
	go func() {
		frame := func(op op, sequence uint32, x ...float64) []byte { return rowsOf(op, sequence, 128, len(x), 0, x...) }
		noted := must[[]byte](t)(encodeFrame(header{op: opOK, sequence: 5}, json.RawMessage(`{"notes":[{"key":"k","text":"t"}]}`),
			frame(opOK, 5, 60)[headerBytes:]))
		for _, step := range []struct {
			want    []byte
			answers [][]byte
		}{
			{frame(opChunk, 1), [][]byte{frame(opOK, 1)}},
			// Three rows where two were prepared, of which come five.
			{frame(opChunk, 2, 1, 2), [][]byte{frame(opChunk, 2, 10, 20), frame(opChunk, 2), frame(opOK, 2, 30)}},
			{frame(opChunk, 3, 3), [][]byte{frame(opChunk, 3, 40), frame(opOK, 3, 50)}},
			{frame(opChunk, 4, 4, 5), [][]byte{frame(opOK, 4)}},
			{frame(opLast, 5, 6), [][]byte{noted}},
			{frame(opLast, 6), [][]byte{frame(opOK, 6)}},
		} {
			buffer := make([]byte, 1<<17)
			n, err := unix.Read(far, buffer)
			if err != nil || !bytes.Equal(buffer[:n], step.want) {
				t.Errorf("%v: %x\nis not\n%x", err, buffer[:n], step.want)
			}
			for _, answer := range step.answers {
				if err := unix.Sendmsg(far, answer, nil, nil, 0); err != nil {
					t.Error(err)
				}
			}
		}
	}()
	ctx := context.Background()
	for _, step := range []struct {
		send  func(context.Context, Inputs) (*Result, error)
		x     []float64
		want  []float64
		notes []Note
	}{
		{s.Chunk, []float64{}, []float64{}, nil},
		{s.Chunk, []float64{1, 2, 3}, []float64{10, 20, 30, 40, 50}, nil},
		{s.Last, []float64{4, 5, 6}, []float64{60}, []Note{{"k", "t"}}},
		{s.Last, nil, []float64{}, nil},
	} {
		var inputs Inputs
		if step.x != nil {
			inputs = Inputs{"x": Slice(step.x)}
		}
		res := must[*Result](t)(step.send(ctx, inputs))
		y := res.Tensor("y")
		if got := must[[]float64](t)(As[float64](y)); !slices.Equal(got, step.want) || !slices.Equal(y.Shape(), []int{len(step.want)}) || !slices.Equal(res.Notes, step.notes) {
			t.Error(got, y.Shape(), res.Notes, step)
		}
	}
}

func TestLiesInAStreamEndIt(t *testing.T) {
	good := func(op op) []byte { return rowsOf(op, 1, 128, 2, 2, 1, 2, 3, 4) }
	at := func(op op, offset int, b byte) []byte {
		frame := good(op)
		frame[offset] = b
		return frame
	}
	for name, example := range map[string]struct {
		frames [][]byte
		fds    bool
		says   string
	}{
		"another sequence":     {[][]byte{at(opOK, 4, 2)}, false, "answers call 2"},
		"another one later":    {[][]byte{good(opChunk), at(opChunk, 4, 2)}, false, "answers call 2"},
		"sequence 0":           {[][]byte{at(opChunk, 4, 0)}, false, "answers call 0"},
		"too many rows":        {[][]byte{at(opOK, headerBytes, 3)}, false, `"y" has 3 along axis 0`},
		"too many rows later":  {[][]byte{good(opChunk), at(opChunk, headerBytes, 3)}, false, `"y" has 3 along axis 0`},
		"a huge number":        {[][]byte{at(opChunk, headerBytes+7, 0x80)}, false, "along axis 0"},
		"wider rows":           {[][]byte{at(opOK, headerBytes+8, 3)}, false, `"y" has 3 along axis 1`},
		"narrower rows":        {[][]byte{at(opChunk, headerBytes+8, 1)}, false, `"y" has 1 along axis 1`},
		"one more axis":        {[][]byte{at(opOK, headerBytes+16, 1)}, false, `"y" has 1 along axis 2`},
		"a short OK":           {[][]byte{good(opChunk), rowsOf(opOK, 1, 64, 1, 2)}, false, "64 payload bytes answer"},
		"an OK of nothing":     {[][]byte{rowsOf(opOK, 1, 128, 0, 0)[:headerBytes]}, false, "the packet has 0"},
		"a short CHUNK":        {[][]byte{rowsOf(opChunk, 1, 64, 1, 2)}, false, "64 payload bytes answer"},
		"a long CHUNK":         {[][]byte{rowsOf(opChunk, 1, 192, 1, 2)}, false, "192 payload bytes answer"},
		"half a packet":        {[][]byte{good(opChunk)[:100]}, false, "the packet has"},
		"an op for hosts":      {[][]byte{good(opLast)}, false, "op 67 answers"},
		"a CALL":               {[][]byte{good(opCall)}, false, "op 19 answers"},
		"descriptors":          {[][]byte{good(opOK)}, true, "has descriptors"},
		"descriptors later":    {[][]byte{good(opChunk), good(opChunk)}, true, "has descriptors"},
		"an end":               {[][]byte{nil}, false, "the host ended"},
		"an end in the middle": {[][]byte{good(opChunk), nil}, false, "the host ended"},
	} {
		leavesNothing(t, name, func(t *testing.T) {
			s, _, far := streamPeer(t, placesOfRows, Each[float64](2, 2))
			done := make(chan bool)
			go func() {
				defer close(done)
				if n, err := unix.Read(far, make([]byte, 1<<17)); n != headerBytes+128 || err != nil {
					t.Error(n, err)
				}
				for i, frame := range example.frames {
					var rights []byte
					if example.fds && i == len(example.frames)-1 {
						rights = unix.UnixRights(far)
					}
					_ = unix.Sendmsg(far, frame, rights, nil, unix.MSG_NOSIGNAL)
				}
				if n, err := unix.Read(far, make([]byte, 1<<17)); n != 0 || err != nil && err != unix.ECONNRESET {
					t.Error("the socket is open:", n, err)
				}
			}()
			// A lie that is believed ends, too.
			ctx, stop := context.WithTimeout(context.Background(), 10*time.Second)
			defer stop()
			x := Inputs{"x": Slice([]float64{1, 2}, 1, 2)}
			res, err := s.Chunk(ctx, x)
			<-done
			want := ErrProtocol
			if strings.Contains(example.says, "ended") {
				want = ErrDisconnected
			}
			if !errors.Is(err, want) || !strings.Contains(err.Error(), example.says) {
				t.Errorf("%v does not say %q: %v", err, example.says, res)
			}
			if _, again := s.Last(ctx, nil); again == nil || again.Error() != err.Error() {
				t.Error("it goes on:", again)
			}
			if s.prepared.conn.end() != nil || len(s.prepared.conn.lines) != 0 {
				t.Error("the connection is whole:", s.prepared.conn.end(), s.prepared.conn.lines)
			}
		})
	}
}

func TestAnErrorEndsAStream(t *testing.T) {
	leavesNothing(t, "error", func(t *testing.T) {
		s, _, far := streamPeer(t, placesOfTwo, Each[float64](2))
		done := make(chan bool)
		go func() {
			defer close(done)
			buffer := make([]byte, 1<<17)
			_, _ = unix.Read(far, buffer)
			_ = unix.Sendmsg(far, rowsOf(opOK, 1, 128, 1, 0, 5), nil, nil, 0)
			_, _ = unix.Read(far, buffer)
			_ = unix.Sendmsg(far, rowsOf(opChunk, 2, 128, 1, 0, 6), nil, nil, 0)
			_ = unix.Sendmsg(far, must[[]byte](t)(encodeFrame(header{op: opError, sequence: 2},
				json.RawMessage(`{"code":"INTERNAL","reason":"GUEST_TRAP","message":"chunk 1 of a stream: trap","request_id":"r","details":{"chunk":1}}`), nil)), nil, nil, 0)
			// The rest of what was cut is not sent.
			if n, err := unix.Read(far, buffer); n != 0 || err != nil {
				t.Error(n, err)
			}
		}()
		ctx := context.Background()
		must[*Result](t)(s.Chunk(ctx, Inputs{"x": Slice([]float64{1})}))
		_, err := s.Chunk(ctx, Inputs{"x": Slice([]float64{1, 2, 3, 4, 5})})
		var remote *RemoteError
		if !errors.As(err, &remote) || remote.Reason != "GUEST_TRAP" || remote.Details["chunk"] != 1.0 || errors.Is(err, ErrDisconnected) {
			t.Error(err)
		}
		<-done
		for _, send := range []func(context.Context, Inputs) (*Result, error){s.Chunk, s.Last} {
			_, err := send(ctx, Inputs{"x": Slice([]float64{1})})
			if !errors.Is(err, ErrDisconnected) || errors.As(err, &remote) || !strings.Contains(err.Error(), "chunk 1 of a stream: trap") {
				t.Error(err)
			}
		}
	})
}

func TestLiesAboutAStreamAreErrors(t *testing.T) {
	scalar := strings.Replace(placesOfTwo, `"y","dtype":"float64","shape":[2],"offset":64,"length":16`, `"y","dtype":"float64","shape":[],"offset":64,"length":8`, 1)
	other := strings.Replace(placesOfTwo, `"x","dtype":"float64","shape":[2]`, `"x","dtype":"float64","shape":[1]`, 1)
	for says, body := range map[string]string{`"y" of a stream has no axis`: scalar, `"x" is float64[1]`: other} {
		leavesNothing(t, says, func(t *testing.T) {
			c, p := scripted(t)
			near, far := packetPair(t)
			go func() {
				p.send(opOK, p.receive().sequence, body, near)
				closeAll([]int{near, far})
			}()
			_, err := c.PrepareStream(context.Background(), "k", Inputs{"x": Each[float64](2)})
			if !errors.Is(err, ErrProtocol) || !strings.Contains(err.Error(), says) {
				t.Error(err)
			}
		})
	}
	// Rows of nothing, more than an int counts.
	most := fmt.Sprint(math.MaxInt)
	body := strings.Replace(placesOfTwo, `"y","dtype":"float64","shape":[2],"offset":64,"length":16`, `"y","dtype":"float64","shape":[`+most+`,0],"offset":64,"length":0`, 1)
	body = strings.Replace(body, `"reply_bytes":128`, `"reply_bytes":64`, 1)
	s, _, far := streamPeer(t, body, Each[float64](2))
	go func() {
		_, _ = unix.Read(far, make([]byte, 1<<17))
		for range 2 {
			_ = unix.Sendmsg(far, rowsOf(opChunk, 1, 64, math.MaxInt, 0), nil, nil, 0)
		}
	}()
	ctx, stop := context.WithTimeout(context.Background(), 10*time.Second)
	defer stop()
	if _, err := s.Chunk(ctx, Inputs{"x": Slice([]float64{1})}); !errors.Is(err, ErrProtocol) || !strings.Contains(err.Error(), "counted") {
		t.Error(err)
	}
}

func TestAContextEndsAStream(t *testing.T) {
	x := Inputs{"x": Slice([]float64{1, 2, 3})}
	for name, answers := range map[string]func(s *Stream, far int){
		"a host that says nothing": func(*Stream, int) {},
		"a host that never ends": func(_ *Stream, far int) {
			for {
				if err := unix.Sendmsg(far, rowsOf(opChunk, 1, 128, 2, 0, 1, 2), nil, nil, unix.MSG_NOSIGNAL); err != nil {
					return
				}
				time.Sleep(100 * time.Microsecond)
			}
		},
	} {
		for how, answersCancel := range map[string]bool{"and no CANCEL": false, "but CANCEL": true} {
			leavesNothing(t, name+" "+how, func(t *testing.T) {
				s, p, far := streamPeer(t, placesOfTwo, Each[float64](2))
				ctx, stop := context.WithTimeout(context.Background(), 20*time.Millisecond)
				defer stop()
				go func() {
					_, _ = unix.Read(far, make([]byte, 1<<17))
					answers(s, far)
				}()
				if answersCancel {
					go func() {
						asked := p.receive()
						if asked.op != opCancel || asked.body["prepared"] != 3.0 {
							t.Error(asked)
						}
						p.send(opOK, asked.sequence, `{"cancelled":true}`)
						if name == "a host that says nothing" {
							_ = unix.Sendmsg(far, must[[]byte](t)(encodeFrame(header{op: opError, sequence: 1}, json.RawMessage(`{"code":"CANCELLED","reason":"CANCELLED","message":"so"}`), nil)), nil, nil, 0)
						}
						p.drain()
					}()
				}
				_, err := s.Chunk(ctx, x)
				if !errors.Is(err, context.DeadlineExceeded) {
					t.Error(err)
				}
				if _, err := s.Chunk(context.Background(), x); !errors.Is(err, ErrDisconnected) {
					t.Error(err)
				}
			})
		}
	}
	leavesNothing(t, "between pieces", func(t *testing.T) {
		s, p, far := streamPeer(t, placesOfTwo, Each[float64](2))
		ctx, stop := context.WithCancel(context.Background())
		done := make(chan bool)
		go func() {
			defer close(done)
			_, _ = unix.Read(far, make([]byte, 1<<17))
			stop()
			// Its rows came all the same, the others do not go any more.
			_ = unix.Sendmsg(far, rowsOf(opOK, 1, 128, 2, 0, 1, 2), nil, nil, 0)
			if n, err := unix.Read(far, make([]byte, 1<<17)); n != 0 || err != nil {
				t.Error(n, err)
			}
		}()
		go func() {
			p.send(opOK, p.receive().sequence, `{"cancelled":false}`)
			p.drain()
		}()
		_, err := s.Chunk(ctx, x)
		if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "in the middle of a chunk") {
			t.Error(err)
		}
		<-done
		if _, err := s.Last(context.Background(), nil); !errors.Is(err, ErrDisconnected) || errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}
