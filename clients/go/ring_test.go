package strait

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"strait/internal/hosttest"
	"strait/internal/shm"
)

func TestCallsAreTheSameWhicheverWayTheyGo(t *testing.T) {
	address, _ := hosttest.Start(t, "traps.wasm", "spins.wasm")
	for name, way := range map[string]struct {
		spin    time.Duration
		options []PrepareOption
	}{
		"socket":           {},
		"socket, spinning": {200 * time.Microsecond, nil},
		"ring":             {0, []PrepareOption{Ring()}},
		"ring, spinning":   {200 * time.Microsecond, []PrepareOption{Ring()}},
	} {
		leavesNothing(t, name, func(t *testing.T) {
			c, ctx := dialAt(t, address, WithSpin(way.spin)), context.Background()
			defer c.Close()
			prepare := func(kernel string, x Brought, options ...PrepareOption) *Prepared {
				return must[*Prepared](t)(c.Prepare(ctx, kernel, Inputs{"x": x}, append(options, way.options...)...))
			}
			scale := prepare("scale-shift", Each[float64](100), Param("a", 2), Param("b", 1))
			before := framed(t, c)
			for i := range 500 {
				x := make([]float64, i%101)
				for j := range x {
					x[j] = float64(i * j)
				}
				res := must[*Result](t)(scale.Call(ctx, Inputs{"x": Slice(x)}))
				y := must[[]float64](t)(As[float64](res.Tensor("y")))
				for j := range x {
					x[j] = 2*x[j] + 1
				}
				if !slices.Equal(x, y) {
					t.Fatal(i, x, y)
				}
			}
			if now := framed(t, c); now[0] == before[0] || now[0]-before[0] != now[1]-before[1] {
				t.Error(before, now)
			}
			// Notes, and errors, which do not fit a slot.
			filter := prepare("filter-finite", Each[float64](3))
			traps := prepare("traps/k", Each[float64](4))
			spins := prepare("spins/k", Each[float64](4))
			limited := prepare("spins/k", Each[float64](4), Deadline(20*time.Millisecond))
			x := Inputs{"x": Slice([]float64{1, 2, math.NaN()})}
			for i := range 5 {
				y := make([]float64, 3)
				res := must[*Result](t)(filter.Call(ctx, x, Into("y", y)))
				if !slices.Equal(res.Notes, []Note{{"dropped", "1"}}) || !slices.Equal(y[:2], []float64{1, 2}) {
					t.Error(res.Notes, y)
				}
				if _, err := traps.Call(ctx, x); reason(err) != "GUEST_TRAP" {
					t.Error(err)
				}
				if _, err := limited.Call(ctx, x); reason(err) != "DEADLINE" {
					t.Error(err)
				}
				cancelled, stop := context.WithTimeout(ctx, time.Duration(i*i)*time.Millisecond+10*time.Microsecond)
				_, err := spins.Call(cancelled, x)
				stop()
				// At first it may be over before anything is sent.
				if !errors.Is(err, context.DeadlineExceeded) || reason(err) != "CANCELLED" && i == 4 {
					t.Error(i, err)
				}
			}
			var group sync.WaitGroup
			for worker := range 4 {
				group.Go(func() {
					for i := range 100 {
						x := []float64{float64(worker), float64(i)}
						res, err := scale.Call(ctx, Inputs{"x": Slice(x)})
						if err != nil {
							t.Error(err)
							return
						}
						if y, err := As[float64](res.Tensor("y")); err != nil || !slices.Equal(y, []float64{2*x[0] + 1, 2*x[1] + 1}) {
							t.Error(y, err)
						}
					}
				})
			}
			group.Wait()
			for _, p := range []*Prepared{scale, filter, traps, spins, limited} {
				p.Close()
			}
			held(t, c, 1, 0)
			// Nor is the memory of a ring left.
			if segments := must[Stats](t)(c.Stats(ctx)).Segments; segments != 0 {
				t.Error(segments)
			}
			// Closed while a call waits, or looks.
			spins = prepare("spins/k", Each[float64](4))
			time.AfterFunc(20*time.Millisecond, func() { spins.Close() })
			if _, err := spins.Call(ctx, x); !errors.Is(err, ErrDisconnected) || !strings.Contains(err.Error(), "closed here") {
				t.Error(err)
			}
		})
	}
	c := dialAt(t, address)
	if _, err := c.PrepareStream(context.Background(), "cumsum", Inputs{"x": Each[float64](4)}, Ring()); !errors.Is(err, ErrArgument) {
		t.Error(err)
	}
}

func TestAHostThatDiesEndsARing(t *testing.T) {
	for _, spin := range []time.Duration{0, time.Hour} {
		leavesNothing(t, fmt.Sprint("spin ", spin), func(t *testing.T) {
			address, process := hosttest.Start(t, "spins.wasm")
			c, ctx := dialAt(t, address, WithSpin(spin)), context.Background()
			idle := must[*Prepared](t)(c.Prepare(ctx, "scale-shift", Inputs{"x": Each[float64](4)}, Ring()))
			spins := must[*Prepared](t)(c.Prepare(ctx, "spins/k", Inputs{"x": Each[float64](4)}, Ring()))
			x := Inputs{"x": Slice([]float64{1})}
			done := make(chan error)
			go func() {
				_, err := spins.Call(ctx, x)
				done <- err
			}()
			time.Sleep(20 * time.Millisecond)
			if err := process.Kill(); err != nil {
				t.Error(err)
			}
			begun := time.Now()
			if err := <-done; !errors.Is(err, ErrDisconnected) || time.Since(begun) > 10*time.Second {
				t.Error(err, time.Since(begun))
			}
			if _, err := idle.Call(ctx, x); !errors.Is(err, ErrDisconnected) {
				t.Error(err)
			}
		})
	}
}

// ringOfTwo is that of placesOfTwo.
const ringOfTwo = `"ring":{"bytes":16384,"slots":2,"requests":8192,"request_stride":192,"replies":12288,"reply_stride":192}`

var preparedRing = strings.Replace(placesOfTwo, `"request_id"`, ringOfTwo+`,"request_id"`, 1)

// ringMemory is a memory file of so many bytes, as a host makes it.
func ringMemory(t *testing.T, bytes int64, seals int) *os.File {
	t.Helper()
	file := must[*os.File](t)(shm.NewFile("ring"))
	if err := file.Truncate(bytes); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.FcntlInt(file.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		t.Fatal(err)
	}
	return file
}

const ringSeals = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL

// ringHost is the host's side of a ring.
type ringHost struct {
	t     *testing.T
	far   int
	pages shm.Pages
	tail  uint32
}

// ringPeer is a client with a ring of placesOfTwo, and the host's side of it.
func ringPeer(t *testing.T) (*Prepared, *ringHost) {
	t.Helper()
	c, p := scripted(t)
	near, far := packetPair(t)
	file := ringMemory(t, 16384, ringSeals)
	host := &ringHost{t: t, far: far, pages: must[shm.Pages](t)(shm.Map(int(file.Fd()), 16384, true))}
	t.Cleanup(func() {
		unix.Close(far)
		if err := host.pages.Unmap(); err != nil {
			t.Error(err)
		}
	})
	if err := unix.SetsockoptTimeval(far, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10}); err != nil {
		t.Fatal(err)
	}
	go func() {
		asked := p.receive()
		if asked.op != opPrepare || asked.body["ring"] != true {
			t.Error(asked)
		}
		p.send(opOK, asked.sequence, preparedRing, near, int(file.Fd()))
		unix.Close(near)
		file.Close()
	}()
	prepared := must[*Prepared](t)(c.Prepare(context.Background(), "k", Inputs{"x": Each[float64](2)}, Ring()))
	t.Cleanup(func() { prepared.Close() })
	return prepared, host
}

// awaits waits for the request of that number, from 1, and says what is in its slot.
func (h *ringHost) awaits(number uint32) []byte {
	h.t.Helper()
	for range 10_000 {
		if h.pages.Word(ownTail).Load() == number {
			at := 8192 + 192*int((number-1)%2)
			return h.pages.Bytes()[at : at+headerBytes+128]
		}
		time.Sleep(time.Millisecond)
	}
	h.t.Error("no request", number)
	return make([]byte, headerBytes+128)
}

// puts puts a frame into the next slot, without saying so.
func (h *ringHost) puts(frame []byte) {
	copy(h.pages.Bytes()[12288+192*int(h.tail%2):], frame)
	h.tail++
}

// says makes the tail known, and wakes whoever sleeps.
func (h *ringHost) says(tail uint32) {
	h.pages.Word(hostTail).Store(tail)
	if h.pages.Word(ownAsleep).Load() != 0 {
		saysFrame(h.t, h.far, []byte{0})
	}
}

func bareOK(sequence uint32, x ...float64) []byte {
	return rowsOf(opOK, sequence, 128, len(x), 0, x...)
}

func TestARingIsAsTheProtocolHasIt(t *testing.T) {
	leavesNothing(t, "ring", func(t *testing.T) {
		p, host := ringPeer(t)
		noted := must[[]byte](t)(encodeFrame(header{op: opOK, sequence: 3}, json.RawMessage(`{"notes":[{"key":"k","text":"t"}]}`), bareOK(3, 5)[headerBytes:]))
		done := make(chan bool)
		go func() {
			defer close(done)
			for number := uint32(1); number <= 4; number++ {
				asleep := number%2 == 0
				want := bareOK(number, float64(number))
				want[3] = byte(opCall)
				if got := host.awaits(number); !bytes.Equal(got, want) {
					t.Errorf("%x\nis not\n%x", got, want)
				}
				if asleep {
					if got := reads(t, host.far); len(got) != 1 {
						t.Errorf("it was not woken: %x", got)
					}
				}
				// It sleeps before each second request.
				host.pages.Word(hostAsleep).Store(number % 2)
				if number == 3 {
					saysFrame(t, host.far, []byte{1})
					host.puts(noted[:headerBytes])
					host.says(host.tail)
					saysFrame(t, host.far, noted)
					continue
				}
				host.puts(bareOK(number, float64(number), 2))
				host.says(host.tail)
			}
		}()
		for number := 1; number <= 4; number++ {
			res := must[*Result](t)(p.Call(context.Background(), Inputs{"x": Slice([]float64{float64(number)})}))
			want := []float64{float64(number), 2}
			if number == 3 {
				want = []float64{5}
			}
			if y := must[[]float64](t)(As[float64](res.Tensor("y"))); !slices.Equal(y, want) || (len(res.Notes) == 1) != (number == 3) {
				t.Error(number, y, res.Notes)
			}
		}
		<-done
		if err := p.Close(); err != nil || reads(t, host.far) != nil {
			t.Error(err)
		}
	})
}

func TestLiesInARingEndIt(t *testing.T) {
	refusal := bodyFrame(t, opError, 0, `{"code":"INVALID_ARGUMENT","reason":"BAD_FRAME","message":"a wrong tail","request_id":"r"}`)
	announced := must[[]byte](t)(encodeFrame(header{op: opOK, sequence: 1}, json.RawMessage(`{}`), bareOK(1, 5)[headerBytes:]))
	at := func(offset int, b byte) []byte {
		frame := bareOK(1, 1, 2)
		frame[offset] = b
		return frame
	}
	slot := func(frame []byte) func(*ringHost) {
		return func(h *ringHost) { h.puts(frame); h.says(1) }
	}
	tells := func(packets ...[]byte) func(*ringHost) {
		return func(h *ringHost) {
			h.puts(announced[:headerBytes])
			h.says(1)
			for _, packet := range packets {
				saysFrame(h.t, h.far, packet)
			}
		}
	}
	for name, example := range map[string]struct {
		lie  func(h *ringHost)
		says string
		is   error
	}{
		"a tail too far":          {func(h *ringHost) { h.says(2) }, "2 replies came to 1 calls", ErrProtocol},
		"a tail far too far":      {func(h *ringHost) { h.says(1 << 31) }, "2147483648 replies", ErrProtocol},
		"a tail before":           {func(h *ringHost) { h.says(math.MaxUint32) }, "4294967295 replies", ErrProtocol},
		"another sequence":        {slot(at(4, 2)), "answers call 2", ErrProtocol},
		"a CALL":                  {slot(at(3, byte(opCall))), "op 19 answers", ErrProtocol},
		"an ERROR in a slot":      {slot(at(3, byte(opError))), "payload bytes after op 4", ErrProtocol},
		"another magic":           {slot(at(0, 'X')), `"ST"`, ErrProtocol},
		"another length":          {slot(at(12, 64)), "64 payload bytes", ErrProtocol},
		"a larger shape":          {slot(at(headerBytes, 3)), `"y" has 3 along axis 0`, ErrProtocol},
		"nothing":                 {slot(make([]byte, headerBytes+128)), `"ST"`, ErrProtocol},
		"two bytes":               {func(h *ringHost) { saysFrame(h.t, h.far, []byte{0, 0}) }, "no slot told of", ErrProtocol},
		"a reply on the socket":   {func(h *ringHost) { saysFrame(h.t, h.far, bareOK(1, 1)) }, "no slot told of", ErrProtocol},
		"descriptors":             {func(h *ringHost) { _ = unix.Sendmsg(h.far, []byte{0}, unix.UnixRights(h.far), nil, 0) }, "has descriptors", ErrProtocol},
		"an end":                  {func(h *ringHost) { _ = unix.Shutdown(h.far, unix.SHUT_RDWR) }, "the host ended", ErrDisconnected},
		"a refusal":               {func(h *ringHost) { saysFrame(h.t, h.far, refusal) }, "a wrong tail", nil},
		"another than announced":  {tells(bodyFrame(t, opOK, 1, `{"new":1}`)), "another frame", ErrProtocol},
		"a short one":             {tells(announced[:20]), "another frame", ErrProtocol},
		"less than was announced": {tells(announced[:headerBytes]), "the packet has 0", ErrProtocol},
		"none at all": {func(h *ringHost) {
			tells()(h)
			_ = unix.Shutdown(h.far, unix.SHUT_RDWR)
		}, "the host ended", ErrDisconnected},
		"too much that is announced": {func(h *ringHost) {
			frame := bare(opOK, 1)
			frame[11] = 0xff
			h.puts(frame)
			h.says(1)
			saysFrame(h.t, h.far, frame)
		}, "body bytes", ErrProtocol},
	} {
		for _, spin := range []time.Duration{0, time.Millisecond} {
			leavesNothing(t, name, func(t *testing.T) {
				p, host := ringPeer(t)
				p.conn.spin = spin
				done := make(chan bool)
				go func() {
					defer close(done)
					host.awaits(1)
					example.lie(host)
				}()
				ctx, stop := context.WithTimeout(context.Background(), 10*time.Second)
				defer stop()
				x := Inputs{"x": Slice([]float64{1, 2})}
				res, err := p.Call(ctx, x)
				<-done
				if err == nil || !strings.Contains(err.Error(), example.says) || example.is != nil && !errors.Is(err, example.is) {
					t.Errorf("%v does not say %q: %v", err, example.says, res)
				}
				if example.is == nil && reason(err) != "BAD_FRAME" {
					t.Error(err)
				}
				if _, again := p.Call(ctx, x); !errors.Is(again, ErrProtocol) && !errors.Is(again, ErrDisconnected) || errors.As(again, new(*RemoteError)) {
					t.Error("it goes on:", again)
				}
				if p.conn.end() != nil {
					t.Error("the connection is whole:", p.conn.end())
				}
				p.Close()
				if len(p.conn.lines) != 0 || p.line.ring.pages.Len() != 0 {
					t.Error("its memory is mapped")
				}
			})
		}
	}
}

func TestLiesAboutARingAreErrors(t *testing.T) {
	socket := func(t *testing.T) int { near, far := packetPair(t); unix.Close(far); return near }
	ring := func(t *testing.T) int {
		file := ringMemory(t, 16384, ringSeals)
		defer file.Close()
		return must[int](t)(unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 0))
	}
	sized := func(bytes int64, seals int) func(t *testing.T) int {
		return func(t *testing.T) int {
			file := ringMemory(t, bytes, seals)
			defer file.Close()
			return must[int](t)(unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 0))
		}
	}
	null := func(t *testing.T) int { return must[int](t)(unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)) }
	change := func(from, to string) string { return strings.Replace(preparedRing, from, to, 1) }
	type opens []func(*testing.T) int
	for name, example := range map[string]struct {
		body string
		open opens
		asks []PrepareOption
	}{
		"no layout":             {placesOfTwo, opens{socket, ring}, []PrepareOption{Ring()}},
		"too few bytes":         {change(`"bytes":16384`, `"bytes":12288`), opens{socket, ring}, []PrepareOption{Ring()}},
		"more slots":            {change(`"slots":2`, `"slots":4`), opens{socket, ring}, []PrepareOption{Ring()}},
		"no slots":              {change(`"slots":2`, `"slots":0`), opens{socket, ring}, []PrepareOption{Ring()}},
		"requests over words":   {change(`"requests":8192`, `"requests":0`), opens{socket, ring}, []PrepareOption{Ring()}},
		"replies over requests": {change(`"replies":12288`, `"replies":8192`), opens{socket, ring}, []PrepareOption{Ring()}},
		"a negative stride":     {change(`"reply_stride":192`, `"reply_stride":-192`), opens{socket, ring}, []PrepareOption{Ring()}},
		"one descriptor":        {preparedRing, opens{socket}, []PrepareOption{Ring()}},
		"three":                 {preparedRing, opens{socket, ring, ring}, []PrepareOption{Ring()}},
		"the other way round":   {preparedRing, opens{ring, socket}, []PrepareOption{Ring()}},
		"memory that is short":  {preparedRing, opens{socket, sized(8192, ringSeals)}, []PrepareOption{Ring()}},
		"memory that shrinks":   {preparedRing, opens{socket, sized(16384, unix.F_SEAL_GROW)}, []PrepareOption{Ring()}},
		"no memory":             {preparedRing, opens{socket, null}, []PrepareOption{Ring()}},
		"a ring unasked":        {preparedRing, opens{socket}, nil},
		"its memory unasked":    {preparedRing, opens{socket, ring}, nil},
	} {
		leavesNothing(t, name, func(t *testing.T) {
			c, p := scripted(t)
			go func() {
				asked := p.receive()
				var fds []int
				for _, open := range example.open {
					fds = append(fds, open(t))
				}
				p.send(opOK, asked.sequence, example.body, fds...)
				closeAll(fds)
				p.drain()
			}()
			if _, err := c.Prepare(context.Background(), "k", Inputs{"x": Each[float64](2)}, example.asks...); !errors.Is(err, ErrProtocol) {
				t.Error(err)
			}
			if c.conn.end() != nil || len(c.conn.lines) != 0 {
				t.Error(c.conn.end(), c.conn.lines)
			}
		})
	}
}
