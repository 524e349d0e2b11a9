package strait

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// streamedRows is the OK to STREAM about rows of float64[2] from batch 7 on.
const streamedRows = `{"channel":"levels","kernel":"k","outputs":[{"port":"y","dtype":"float64","shape":[2,2],"offset":64,"length":32}],` +
	`"batch_bytes":128,"first":7,"request_id":"r","new":1}`

// channelPeer is a client that reads a channel of what body says, and the host's end of its socket.
func channelPeer(t *testing.T, body string) (*Channel, int) {
	t.Helper()
	c, p := scripted(t)
	near, far := packetPair(t)
	t.Cleanup(func() { unix.Close(far) })
	if err := unix.SetsockoptTimeval(far, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10}); err != nil {
		t.Fatal(err)
	}
	go func() {
		asked := p.receive()
		if asked.op != opStream || asked.body["channel"] != "levels" || len(asked.body) != 1 {
			t.Error(asked)
		}
		p.send(opOK, asked.sequence, body, near)
		unix.Close(near)
	}()
	return must[*Channel](t)(c.ReadChannel(context.Background(), "levels")), far
}

// acknowledged is the frame that a consumer sends for a batch, and the host for a producer's chunk.
func acknowledged(sequence uint32) []byte { return bare(opOK, sequence) }

// bare is a frame of a header alone.
func bare(op op, sequence uint32) []byte {
	frame := make([]byte, headerBytes)
	encodeHeader(frame, header{op: op, sequence: sequence}, 0, 0)
	return frame
}

// reads is the next packet at the host's end; nil is the end.
func reads(t *testing.T, far int) []byte {
	t.Helper()
	buffer := make([]byte, 1<<17)
	n, err := unix.Read(far, buffer)
	if err != nil && err != unix.ECONNRESET {
		t.Error(err)
	}
	if n <= 0 {
		return nil
	}
	return buffer[:n]
}

func saysFrame(t *testing.T, far int, frame []byte) {
	t.Helper()
	if err := unix.Sendmsg(far, frame, nil, nil, unix.MSG_NOSIGNAL); err != nil {
		t.Error(err)
	}
}

func bodyFrame(t *testing.T, op op, sequence uint32, body string) []byte {
	t.Helper()
	return must[[]byte](t)(encodeFrame(header{op: op, sequence: sequence}, json.RawMessage(body), nil))
}

func TestAChannelsFramesAreAsTheProtocolHasThem(t *testing.T) {
	leavesNothing(t, "read", func(t *testing.T) {
		// The last numbers that a sequence has, and those after them.
		c, far := channelPeer(t, strings.Replace(streamedRows, `"first":7`, `"first":4294967295`, 1))
		ctx := context.Background()
		if outputs := c.Outputs(); c.Kernel() != "k" || len(outputs) != 1 || !outputs[0].is(Place{Spec: Spec{"y", Float64, []int{2, 2}}}) {
			t.Error(c.Kernel(), outputs)
		}
		if err := c.Acknowledge(ctx); err != nil {
			t.Error("there is nothing to acknowledge:", err)
		}
		saysFrame(t, far, rowsOf(opChunk, 0xffffffff, 128, 2, 2, 1, 2, 3, 4))
		noted := bodyFrame(t, opChunk, 0, `{}`)
		noted[12] = 128
		saysFrame(t, far, append(noted, rowsOf(opChunk, 0, 128, 1, 2, 5, 6)[headerBytes:]...))
		first := must[*Batch](t)(c.Next(ctx))
		second := must[*Batch](t)(c.Next(ctx))
		if got := reads(t, far); !bytes.Equal(got, acknowledged(0xffffffff)) {
			t.Errorf("%x", got)
		}
		for i, batch := range []*Batch{first, second} {
			want := [][]float64{{1, 2, 3, 4}, {5, 6}}[i]
			y := batch.Tensor("y")
			if got := must[[]float64](t)(As[float64](y)); batch.Number != uint64(0xffffffff+i) || !slices.Equal(got, want) || !slices.Equal(y.Shape(), []int{2 - i, 2}) || cap(got) != len(want) {
				t.Error(i, batch.Number, got, y.Shape())
			}
		}
		if _, err := first.Tensor("z").Bytes(); !errors.Is(err, ErrArgument) || !strings.Contains(err.Error(), `"z"`) {
			t.Error(err)
		}
		for range 2 {
			if err := c.Acknowledge(ctx); err != nil {
				t.Error(err)
			}
		}
		if got := reads(t, far); !bytes.Equal(got, acknowledged(0)) {
			t.Errorf("%x", got)
		}
		if c.Notes() != nil {
			t.Error(c.Notes())
		}
		saysFrame(t, far, bodyFrame(t, opLast, 1, `{"notes":[{"key":"k","text":"t"}]}`))
		for range 2 {
			if batch, err := c.Next(ctx); err != io.EOF {
				t.Error(batch, err)
			}
		}
		// Once for each, and then it is closed.
		if got, end := reads(t, far), reads(t, far); !bytes.Equal(got, acknowledged(1)) || end != nil {
			t.Errorf("%x %x", got, end)
		}
		if !slices.Equal(c.Notes(), []Note{{"k", "t"}}) {
			t.Error(c.Notes())
		}
		if err := errors.Join(c.Close(), c.Acknowledge(ctx)); err != nil {
			t.Error(err)
		}
		if _, err := c.Next(ctx); err != io.EOF {
			t.Error(err)
		}
	})
	leavesNothing(t, "an end at once", func(t *testing.T) {
		c, far := channelPeer(t, streamedRows)
		saysFrame(t, far, bare(opLast, 7))
		for batch, err := range c.Batches(context.Background()) {
			t.Error(batch, err)
		}
		if got := reads(t, far); !bytes.Equal(got, acknowledged(7)) || len(c.Notes()) != 0 {
			t.Errorf("%x %v", got, c.Notes())
		}
	})
}

func TestLiesOnAChannelEndIt(t *testing.T) {
	good := func() []byte { return rowsOf(opChunk, 7, 128, 2, 2, 1, 2, 3, 4) }
	at := func(offset int, b byte) []byte {
		frame := good()
		frame[offset] = b
		return frame
	}
	ending := func(sequence uint32, payload int) []byte {
		return must[[]byte](t)(encodeFrame(header{op: opLast, sequence: sequence}, json.RawMessage(`{}`), make([]byte, payload)))
	}
	for name, example := range map[string]struct {
		frames [][]byte
		fds    bool
		says   string
	}{
		"a batch before":         {[][]byte{at(4, 6)}, false, "call 7 answers call 6"},
		"a batch too late":       {[][]byte{at(4, 8)}, false, "call 7 answers call 8"},
		"a batch twice":          {[][]byte{good(), good()}, false, "call 8 answers call 7"},
		"sequence 0":             {[][]byte{at(4, 0)}, false, "answers call 0"},
		"an OK":                  {[][]byte{at(3, byte(opOK))}, false, "op 3 answers op 21"},
		"a CALL":                 {[][]byte{at(3, byte(opCall))}, false, "op 19 answers op 21"},
		"a push":                 {[][]byte{bodyFrame(t, opGone, 7, `{}`)}, false, "op 65 answers op 21"},
		"no rows":                {[][]byte{rowsOf(opChunk, 7, 128, 0, 2)}, false, "has no rows"},
		"too many rows":          {[][]byte{at(headerBytes, 3)}, false, `"y" has 3 along axis 0`},
		"a huge number":          {[][]byte{at(headerBytes+7, 0x80)}, false, "along axis 0"},
		"wider rows":             {[][]byte{at(headerBytes+8, 3)}, false, `"y" has 3 along axis 1`},
		"narrower rows":          {[][]byte{at(headerBytes+8, 1)}, false, `"y" has 1 along axis 1`},
		"one more axis":          {[][]byte{at(headerBytes+16, 1)}, false, `"y" has 1 along axis 2`},
		"a short batch":          {[][]byte{rowsOf(opChunk, 7, 64, 1, 2)}, false, "64 payload bytes"},
		"a long batch":           {[][]byte{good(), rowsOf(opChunk, 8, 192, 1, 2)}, false, "192 payload bytes"},
		"no payload":             {[][]byte{bodyFrame(t, opChunk, 7, `{}`)}, false, "0 payload bytes"},
		"half a packet":          {[][]byte{good()[:100]}, false, "the packet has"},
		"half a header":          {[][]byte{good()[:20]}, false, "shorter than its header"},
		"more than it says":      {[][]byte{append(good(), 0)}, false, "the packet has"},
		"longer than frames":     {[][]byte{append(good(), make([]byte, bodyBytesMax+2)...)}, false, "longer than one can be"},
		"another version":        {[][]byte{at(2, 1)}, false, "version 1"},
		"another magic":          {[][]byte{at(0, 'X')}, false, `"ST"`},
		"flags":                  {[][]byte{at(44, 1)}, false, "flags"},
		"no JSON":                {[][]byte{bodyFrame(t, opLast, 7, `[]`)}, false, "malformed"},
		"an end too early":       {[][]byte{ending(8, 0)}, false, "call 7 answers call 8"},
		"an end of another":      {[][]byte{good(), ending(7, 0)}, false, "call 8 answers call 7"},
		"an end without number":  {[][]byte{ending(0, 0)}, false, "answers call 0"},
		"an end with rows":       {[][]byte{ending(7, 128)}, false, "128 payload bytes"},
		"an ERROR of another":    {[][]byte{bodyFrame(t, opError, 9, `{"code":"UNAVAILABLE","reason":"PRODUCER_LOST"}`)}, false, "answers call 9"},
		"an ERROR of none":       {[][]byte{bodyFrame(t, opError, 0, `[]`)}, false, "malformed"},
		"descriptors":            {[][]byte{good()}, true, "has descriptors"},
		"descriptors later":      {[][]byte{good(), rowsOf(opChunk, 8, 128, 1, 2)}, true, "has descriptors"},
		"descriptors at the end": {[][]byte{ending(7, 0)}, true, "has descriptors"},
		"an end of the socket":   {[][]byte{nil}, false, "did not say why"},
		"one in the middle":      {[][]byte{good(), nil}, false, "did not say why"},
	} {
		leavesNothing(t, name, func(t *testing.T) {
			c, far := channelPeer(t, streamedRows)
			for i, frame := range example.frames {
				var rights []byte
				if example.fds && i == len(example.frames)-1 {
					rights = unix.UnixRights(far)
				}
				if err := unix.Sendmsg(far, frame, rights, nil, 0); err != nil {
					t.Error(err)
				}
			}
			// A lie that is believed ends, too.
			ctx, stop := context.WithTimeout(context.Background(), 10*time.Second)
			defer stop()
			var err error
			came := 0
			for _, err = range c.Batches(ctx) {
				came++
			}
			want := ErrProtocol
			if strings.Contains(example.says, "did not say") {
				want = ErrDisconnected
			}
			if !errors.Is(err, want) || !strings.Contains(err.Error(), example.says) || came != len(example.frames) {
				t.Errorf("%d batches, and %v does not say %q", came-1, err, example.says)
			}
			for range came - 1 {
				reads(t, far)
			}
			if rest := reads(t, far); rest != nil {
				t.Errorf("the socket is open: %x", rest)
			}
			if _, again := c.Next(ctx); again == nil || again.Error() != err.Error() {
				t.Error("it goes on:", again)
			}
			if again := c.Acknowledge(ctx); came > 1 && again != nil {
				t.Error(again)
			}
			if c.conn.end() != nil || len(c.conn.lines) != 0 || c.Notes() != nil {
				t.Error("the connection is whole:", c.conn.end(), c.conn.lines, c.Notes())
			}
		})
	}
}

func TestLiesAboutAChannelAreErrors(t *testing.T) {
	change := func(from, to string) string { return strings.Replace(streamedRows, from, to, 1) }
	socket := func(t *testing.T) []int { near, far := packetPair(t); unix.Close(far); return []int{near} }
	for name, example := range map[string]struct {
		body string
		open func(*testing.T) []int
	}{
		"another name":        {change(`"levels"`, `"level"`), socket},
		"no first batch":      {change(`"first":7`, `"first":0`), socket},
		"a first one below 0": {change(`"first":7`, `"first":-1`), socket},
		"a first one of half": {change(`"first":7`, `"first":1.5`), socket},
		"too few bytes":       {change("128", "64"), socket},
		"too many bytes":      {change("128", "192"), socket},
		"negative bytes":      {change("128", "-128"), socket},
		"bytes beyond frames": {change("128", "131136"), socket},
		"an odd place":        {change(`"offset":64`, `"offset":72`), socket},
		"a wrong length":      {change(`"length":32`, `"length":24`), socket},
		"an output of no row": {change(`"shape":[2,2],"offset":64,"length":32`, `"shape":[],"offset":64,"length":8`), socket},
		"an unknown type":     {change("float64", "float7"), socket},
		"a shape below 0":     {change("[2,2]", "[-2,-2]"), socket},
		"not JSON":            {"[]", socket},
		"no descriptor":       {streamedRows, func(*testing.T) []int { return nil }},
		"two of them":         {streamedRows, func(t *testing.T) []int { near, far := packetPair(t); return []int{near, far} }},
		"a stream's": {streamedRows, func(t *testing.T) []int {
			fds := must[[2]int](t)(unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0))
			unix.Close(fds[1])
			return fds[:1]
		}},
		"a file's": {streamedRows, func(t *testing.T) []int {
			return []int{must[int](t)(unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0))}
		}},
	} {
		leavesNothing(t, name, func(t *testing.T) {
			c, p := scripted(t)
			go func() {
				asked := p.receive()
				fds := example.open(t)
				p.send(opOK, asked.sequence, example.body, fds...)
				closeAll(fds)
				p.drain()
			}()
			if _, err := c.ReadChannel(context.Background(), "levels"); !errors.Is(err, ErrProtocol) {
				t.Error(err)
			}
			if c.conn.end() != nil || len(c.conn.lines) != 0 {
				t.Error(c.conn.end(), c.conn.lines)
			}
		})
	}
}

func TestLiesToAProducerEndIt(t *testing.T) {
	channel := ChannelOptions{Name: "levels", Batches: 3, Wait: 1500 * time.Microsecond, Resume: time.Minute}
	none := strings.Replace(placesOfTwo, `"reply_bytes":128,"outputs":[{"port":"y","dtype":"float64","shape":[2],"offset":64,"length":16}]`, `"reply_bytes":0,"outputs":[]`, 1)
	produces := func(t *testing.T, body string) (*Stream, int, error) {
		c, p := scripted(t)
		near, far := packetPair(t)
		t.Cleanup(func() { unix.Close(far) })
		go func() {
			asked := p.receive()
			said, _ := json.Marshal(asked.body["channel"])
			if string(said) != `{"batches":3,"name":"levels","resume_ms":60000,"wait_ms":2}` || asked.body["stream"] != true {
				t.Error(asked)
			}
			p.send(opOK, asked.sequence, body, near)
			unix.Close(near)
		}()
		s, err := c.PrepareStream(context.Background(), "k", Inputs{"x": Each[float64](2)}, channel)
		return s, far, err
	}
	leavesNothing(t, "outputs", func(t *testing.T) {
		if _, _, err := produces(t, placesOfTwo); !errors.Is(err, ErrProtocol) || !strings.Contains(err.Error(), `channel "levels"`) {
			t.Error(err)
		}
	})
	for says, frame := range map[string][]byte{
		"":                  acknowledged(1),
		"op 64 answers":     bare(opChunk, 1),
		"128 payload bytes": rowsOf(opOK, 1, 128, 1, 0, 1),
		"answers call 0":    acknowledged(0),
		"op 67 answers":     bodyFrame(t, opLast, 1, `{}`),
	} {
		leavesNothing(t, "it says "+says, func(t *testing.T) {
			s, far, err := produces(t, none)
			if err != nil {
				t.Fatal(err)
			}
			saysFrame(t, far, frame)
			res, err := s.Chunk(context.Background(), Inputs{"x": Slice([]float64{1})})
			switch {
			case says == "" && (err != nil || len(res.Tensors) != 0 || len(s.Outputs()) != 0):
				t.Error(err, res)
			case says != "" && (!errors.Is(err, ErrProtocol) || !strings.Contains(err.Error(), says)):
				t.Errorf("%v does not say %q", err, says)
			}
			runtime.KeepAlive(s)
		})
	}
}

func TestAnErrorEndsAChannel(t *testing.T) {
	const lost = `{"code":"UNAVAILABLE","reason":"PRODUCER_LOST","message":"the producer left","request_id":"r","details":{"chunk":3}}`
	for _, sequence := range []uint32{0, 7} {
		leavesNothing(t, "error", func(t *testing.T) {
			c, far := channelPeer(t, streamedRows)
			if sequence == 7 {
				saysFrame(t, far, bodyFrame(t, opError, 7, lost))
			} else {
				// What was acknowledged and never read does not hide why it is over.
				saysFrame(t, far, rowsOf(opChunk, 7, 128, 1, 2, 1, 2))
				must[*Batch](t)(c.Next(context.Background()))
				if err := c.Acknowledge(context.Background()); err != nil {
					t.Error(err)
				}
				saysFrame(t, far, bodyFrame(t, opError, 0, lost))
				_ = unix.Shutdown(far, unix.SHUT_RDWR)
			}
			_, err := c.Next(context.Background())
			var remote *RemoteError
			if !errors.As(err, &remote) || remote.Code != "UNAVAILABLE" || remote.Reason != "PRODUCER_LOST" || remote.Details["chunk"] != 3.0 || errors.Is(err, ErrDisconnected) {
				t.Error(err)
			}
			_, err = c.Next(context.Background())
			if !errors.Is(err, ErrDisconnected) || errors.As(err, &remote) || !strings.Contains(err.Error(), "the producer left") {
				t.Error(err)
			}
		})
	}
	leavesNothing(t, "unread", func(t *testing.T) {
		c, p := scripted(t)
		near, far := packetPair(t)
		go func() {
			p.send(opOK, p.receive().sequence, streamedRows, near)
			unix.Close(near)
		}()
		channel := must[*Channel](t)(c.ReadChannel(context.Background(), "levels"))
		saysFrame(t, far, rowsOf(opChunk, 7, 128, 1, 2, 1, 2))
		must[*Batch](t)(channel.Next(context.Background()))
		if err := channel.Acknowledge(context.Background()); err != nil {
			t.Error(err)
		}
		saysFrame(t, far, bodyFrame(t, opError, 0, lost))
		// Linux says first that something was left unread, and then what was said.
		unix.Close(far)
		if _, err := channel.Next(context.Background()); reason(err) != "PRODUCER_LOST" {
			t.Error(err)
		}
	})
}

func TestAContextEndsAWaitAndLosesNoBatch(t *testing.T) {
	leavesNothing(t, "waits", func(t *testing.T) {
		c, far := channelPeer(t, streamedRows)
		over, cancel := context.WithCancel(context.Background())
		cancel()
		for name, limited := range map[string]func() (context.Context, context.CancelFunc){
			"deadline": func() (context.Context, context.CancelFunc) {
				return context.WithTimeout(context.Background(), 5*time.Millisecond)
			},
			"cancelled": func() (context.Context, context.CancelFunc) {
				ctx, stop := context.WithCancel(context.Background())
				time.AfterFunc(5*time.Millisecond, stop)
				return ctx, stop
			},
			"over": func() (context.Context, context.CancelFunc) { return over, func() {} },
		} {
			ctx, stop := limited()
			_, err := c.Next(ctx)
			stop()
			if !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, context.Canceled) {
				t.Error(name, err)
			}
		}
		// Some waits end at the moment at which a batch comes: it is here then, or comes with the next.
		const batches = 200
		go func() {
			for i := range batches {
				saysFrame(t, far, rowsOf(opChunk, uint32(7+i), 128, 1, 2, float64(i), 0))
				time.Sleep(time.Duration(i%3) * 50 * time.Microsecond)
			}
		}()
		interrupted := 0
		for i := 0; i < batches; {
			ctx, stop := context.WithTimeout(context.Background(), time.Duration(20+i)*time.Microsecond)
			batch, err := c.Next(ctx)
			stop()
			if errors.Is(err, context.DeadlineExceeded) {
				interrupted++
				continue
			}
			if y := must[[]float64](t)(As[float64](must[*Batch](t)(batch, err).Tensor("y"))); y[0] != float64(i) || batch.Number != uint64(7+i) {
				t.Error(i, y, batch.Number)
			}
			i++
		}
		t.Log(interrupted, "waits were interrupted")
		for i := range batches - 1 {
			if got := reads(t, far); !bytes.Equal(got, acknowledged(uint32(7+i))) {
				t.Errorf("%d: %x", i, got)
			}
		}
		if err := c.Close(); err != nil || reads(t, far) != nil {
			t.Error("the last one was acknowledged:", err)
		}
	})
	leavesNothing(t, "a host that reads nothing", func(t *testing.T) {
		c, far := channelPeer(t, streamedRows)
		var err error
		unread := uint32(0)
		for ; err == nil && unread < 1<<20; unread++ {
			saysFrame(t, far, rowsOf(opChunk, 7+unread, 128, 1, 2, 1, 2))
			ctx, stop := context.WithTimeout(context.Background(), 50*time.Millisecond)
			_, err = c.Next(ctx)
			stop()
		}
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Error(unread, err)
		}
		// The batch before is acknowledged once there is room.
		for i := range unread - 2 {
			if got := reads(t, far); !bytes.Equal(got, acknowledged(7+i)) {
				t.Errorf("%d: %x", i, got)
			}
		}
		if batch := must[*Batch](t)(c.Next(context.Background())); batch.Number != uint64(6+unread) {
			t.Error(batch.Number, unread)
		}
		if got := reads(t, far); !bytes.Equal(got, acknowledged(5+unread)) {
			t.Errorf("%x", got)
		}
	})
	for name, end := range map[string]func(c *Channel) error{
		"closed here":        (*Channel).Close,
		"the client's end":   func(c *Channel) error { c.conn.finish(left("closed here")); return nil },
		"closed here by two": func(c *Channel) error { go c.Close(); return c.Close() },
	} {
		leavesNothing(t, name, func(t *testing.T) {
			c, _ := channelPeer(t, streamedRows)
			time.AfterFunc(10*time.Millisecond, func() { _ = end(c) })
			for range 2 {
				if _, err := c.Next(context.Background()); !errors.Is(err, ErrDisconnected) || !strings.Contains(err.Error(), "closed here") {
					t.Error(err)
				}
			}
		})
	}
}
