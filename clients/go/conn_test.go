package strait

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"strait/internal/shm"
)

// peer is the host's end of a socket pair: a script says what it answers.
type peer struct {
	t      *testing.T
	socket *net.UnixConn
}

type packet struct {
	op       op
	sequence uint32
	body     map[string]any
	payload  []byte
}

// unixPair is two connected SEQPACKET sockets.
func unixPair(t *testing.T) (*net.UnixConn, *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		file := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(file)
		if err != nil {
			t.Fatal(err)
		}
		file.Close()
		ends[i] = c.(*net.UnixConn)
	}
	t.Cleanup(func() { ends[0].Close(); ends[1].Close() })
	return ends[0], ends[1]
}

func scripted(t *testing.T, options ...DialOption) (*Client, *peer) {
	t.Helper()
	near, far := unixPair(t)
	p := &peer{t, far}
	go func() {
		hello := p.receive()
		p.send(opWelcome, hello.sequence, `{"protocol":2,"host_id":"h","move_min_bytes":524288,"inline_bytes":32768,"deadline_ms_max":600000,"new":{}}`)
	}()
	c, err := greet(context.Background(), near, options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c, p
}

func (p *peer) receive() packet {
	p.t.Helper()
	buffer := make([]byte, frameBytesMax)
	if err := p.socket.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		p.t.Error(err)
	}
	n, err := p.socket.Read(buffer)
	if err != nil {
		p.t.Error("the peer reads:", err)
		return packet{}
	}
	h, body, payload, err := decodeFrame(buffer[:n])
	if err != nil {
		p.t.Error(err)
	}
	got := packet{op: h.op, sequence: h.sequence, payload: slices.Clone(payload)}
	if err := json.Unmarshal(body, &got.body); err != nil {
		p.t.Error(err)
	}
	return got
}

func (p *peer) send(op op, sequence uint32, body string, fds ...int) {
	p.t.Helper()
	p.sendBeside(op, sequence, body, nil, fds...)
}

func (p *peer) sendBeside(op op, sequence uint32, body string, payload []byte, fds ...int) {
	p.t.Helper()
	frame, err := encodeFrame(header{op: op, sequence: sequence}, json.RawMessage(body), payload)
	if err != nil {
		p.t.Error(err)
	}
	if _, _, err := p.socket.WriteMsgUnix(frame, unix.UnixRights(fds...), nil); err != nil {
		p.t.Error(err)
	}
}

// memory is a memory file of 128 KiB, and the mapping JSON for a float64[2 3] in it.
func (p *peer) memory(writers string) (*os.File, string) {
	p.t.Helper()
	file, err := shm.NewFile("test")
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { file.Close() })
	p.seal(file, 1<<17, writers == writersNone)
	return file, mapping(writers)
}

// seal gives a memory file its length for good, and its bytes if write.
func (p *peer) seal(file *os.File, length int64, write bool) {
	p.t.Helper()
	seals := shm.SealLent
	if write {
		seals = shm.SealWrite
	}
	if err := errors.Join(file.Truncate(length), seals(int(file.Fd()))); err != nil {
		p.t.Fatal(err)
	}
}

// mapping is for a float64[2 3] in a segment of 128 KiB.
func mapping(writers string) string {
	return `{"strait-mmap":1,"host_id":"h","socket":"s","segment":"0123456789abcdef0123456789abcdef","generation":1,"bytes":131072,"writers":"` +
		writers + `","tensors":[{"name":"x","dtype":"float64","shape":[2,3],"offset":65536,"length":48}]}`
}

func openFDs(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func TestRequestBodies(t *testing.T) {
	for want, body := range map[string]any{
		`{}`: &emptyRequest{},
		`{"request_id":"r","tensors":[{"name":"x","dtype":"int8","shape":[]}]}`: &createRequest{traced: traced{"r"}, Tensors: []Spec{{"x", Int8, []int{}}}},
		`{"kernel":"k","inputs":{"x":{"segment":"0a"},"z":"f#c"},"parameters":{"a":[1,"inf",2.5]},"map":false}`: &invokeRequest{kernelRequest: kernelRequest{
			Kernel: "k", Inputs: map[string]any{"x": segmentInput{Segment: "0a"}, "z": "f#c"},
			Parameters: map[string]any{"a": []any{1, "inf", 2.5}}}, Map: new(bool)},
		`{"kernel":"k","inputs":{"s":{"dtype":"int8","shape":[]},"z":"f#c"},"deadline_ms":7,"limits":{"log_bytes":1}}`: &kernelRequest{
			Kernel: "k", Inputs: map[string]any{"s": specInput{Int8, []int{}}, "z": "f#c"}, DeadlineMS: 7, Limits: &Limits{LogBytes: 1}},
		`{"sequence":3}`: &cancelRequest{Sequence: 3},
		`{"prepared":3}`: &cancelRequest{Prepared: 3},
		`{"tensors":[{"name":"x","dtype":"float64","shape":[2],"offset":65536,"length":16}]}`: &adoptRequest{Tensors: []Place{{Spec{"x", Float64, []int{2}}, 65536, 16}}},
	} {
		if got, err := json.Marshal(body); err != nil || string(got) != want {
			t.Errorf("%s\nis not\n%s (%v)", got, want, err)
		}
	}
}

func TestRepliesMayOvertake(t *testing.T) {
	c, p := scripted(t)
	go func() {
		first, second := p.receive(), p.receive()
		p.send(opOK, second.sequence, `{"name":"`+second.body["name"].(string)+`","mapping":{"segment":"`+second.body["name"].(string)+`"}}`)
		p.send(opOK, first.sequence, `{"mapping":{"segment":"`+first.body["name"].(string)+`"}}`)
	}()
	done := make(chan error, 2)
	for _, name := range []string{"a", "b"} {
		go func() {
			flight, err := c.Lookup(context.Background(), name)
			if err == nil && flight.Mapping.Segment != name {
				err = errors.New(name + " got the reply of " + flight.Mapping.Segment)
			}
			done <- err
		}()
	}
	for range 2 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func TestAnAbandonedReplyIsGivenBack(t *testing.T) {
	c, p := scripted(t)
	before := openFDs(t)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() {
		_, err := c.Fetch(ctx, "x")
		done <- err
	}()
	asked := p.receive()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	file, mapping := p.memory(writersNone)
	p.send(opOK, asked.sequence, `{"mapping":`+mapping+`,"lease":9,"expires_ms":1000}`, int(file.Fd()))
	released := p.receive()
	if leases := released.body["leases"].([]any); released.op != opRelease || len(leases) != 1 || leases[0] != 9.0 {
		t.Error("nobody wanted lease 9, but:", released)
	}
	if now := openFDs(t) - 1; now != before {
		t.Errorf("%d descriptors, %d before", now, before)
	}
}

func TestAContextCancelsACall(t *testing.T) {
	c, p := scripted(t)
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	go func() {
		invoke := p.receive()
		if ms, _ := invoke.body["deadline_ms"].(float64); ms < 1 || ms > 50 {
			t.Error("the host is to know the deadline as well:", invoke.body)
		}
		stop := p.receive()
		if stop.op != opCancel || stop.body["sequence"] != float64(invoke.sequence) {
			t.Error("no CANCEL:", stop)
		}
		p.send(opOK, stop.sequence, `{"cancelled":true}`)
		p.send(opError, invoke.sequence, `{"code":"CANCELLED","reason":"CANCELLED","message":"m","request_id":"r"}`)
	}()
	_, err := c.Call(ctx, "k", Inputs{"x": Name("x")})
	var remote *RemoteError
	if !errors.Is(err, context.DeadlineExceeded) || !errors.As(err, &remote) || remote.Reason != "CANCELLED" {
		t.Error(err)
	}
}

func TestAContextThatIsOverSendsNothing(t *testing.T) {
	c, p := scripted(t)
	past, stop := context.WithDeadline(context.Background(), time.Now().Add(-time.Second))
	defer stop()
	why := errors.New("enough")
	caused, cancel := context.WithCancelCause(context.Background())
	cancel(why)
	late, stop := context.WithTimeoutCause(context.Background(), time.Nanosecond, why)
	defer stop()
	for _, example := range []struct {
		ctx  context.Context
		want error
	}{
		{past, context.DeadlineExceeded}, {caused, context.Canceled}, {caused, why}, {late, context.DeadlineExceeded},
		{unfired{time.Now().Add(-time.Millisecond)}, context.DeadlineExceeded},
	} {
		_, err := c.Call(example.ctx, "k", Inputs{"x": Slice([]float64{1})})
		if !errors.Is(err, example.want) {
			t.Error(err, "is not", example.want)
		}
		if _, err := c.Fetch(example.ctx, "x"); !errors.Is(err, example.want) {
			t.Error(err, "is not", example.want)
		}
	}
	for _, wrong := range []time.Duration{0, -time.Second} {
		if _, err := c.Call(context.Background(), "k", nil, Deadline(wrong)); !errors.Is(err, ErrArgument) {
			t.Error(wrong, err)
		}
	}
	go func() {
		if asked := p.receive(); asked.op != opPing {
			t.Error("something was sent:", asked)
		} else {
			p.send(opOK, asked.sequence, `{}`)
		}
	}()
	if err := c.Ping(context.Background()); err != nil {
		t.Error(err)
	}
}

// unfired is a context whose deadline has passed before anything noticed.
type unfired struct{ deadline time.Time }

func (u unfired) Deadline() (time.Time, bool) { return u.deadline, true }
func (unfired) Done() <-chan struct{}         { return nil }
func (unfired) Err() error                    { return nil }
func (unfired) Value(any) any                 { return nil }

func TestDeadlinesAreAtLeastAMillisecondAndAtMostTheHostsOwn(t *testing.T) {
	c, p := scripted(t)
	soon, stop := context.WithTimeout(context.Background(), time.Minute)
	defer stop()
	far, stop := context.WithTimeout(context.Background(), 1000*time.Hour)
	defer stop()
	for _, example := range []struct {
		ctx      context.Context
		options  []CallOption
		from, to float64
	}{
		{context.Background(), []CallOption{Deadline(1)}, 1, 1}, {far, nil, 600_000, 600_000}, {soon, nil, 1, 60_000},
		{far, []CallOption{Deadline(1500 * time.Microsecond)}, 2, 2},
	} {
		go func() {
			asked := p.receive()
			if ms, _ := asked.body["deadline_ms"].(float64); ms < example.from || ms > example.to {
				t.Error(asked.body)
			}
			p.send(opOK, asked.sequence, `{}`)
		}()
		if _, err := c.Call(example.ctx, "k", nil, example.options...); err != nil {
			t.Error(err)
		}
	}
	go func() {
		asked := p.receive()
		if _, said := asked.body["deadline_ms"]; said {
			t.Error("the host's default was to be left alone:", asked.body)
		}
		p.send(opError, asked.sequence, `{"code":"ALREADY_EXISTS","reason":"IDEMPOTENCY_KEY_REUSED","message":"m","request_id":"r"}`)
	}()
	_, err := c.Call(context.Background(), "k", nil, IdempotencyKey("twice"))
	if reason(err) != "IDEMPOTENCY_KEY_REUSED" {
		t.Error(err)
	}
}

func TestTheEndIsToldToEveryone(t *testing.T) {
	c, p := scripted(t)
	done := make(chan error, 2)
	for range 2 {
		go func() { done <- c.Ping(context.Background()) }()
	}
	p.receive()
	p.receive()
	p.socket.Close()
	for range 2 {
		if err := <-done; !errors.Is(err, ErrDisconnected) {
			t.Error(err)
		}
	}
	if err := c.Ping(context.Background()); !errors.Is(err, ErrDisconnected) {
		t.Error(err)
	}
}

func TestAHostThatBreaksTheProtocol(t *testing.T) {
	for says, speak := range map[string]func(p *peer, sequence uint32){
		"not for clients":    func(p *peer, sequence uint32) { p.send(opInvoke, sequence, `{}`) },
		"malformed reply":    func(p *peer, sequence uint32) { p.send(opOK, sequence, `[1]`) },
		"it refused a frame": func(p *peer, _ uint32) { p.send(opError, 0, `{"message":"BAD_FRAME"}`) },
		"descriptors beside": func(p *peer, sequence uint32) { p.send(opOK, sequence, `{"lease":1}`) },
	} {
		c, p := scripted(t)
		go func() { speak(p, p.receive().sequence) }()
		if _, err := c.Fetch(context.Background(), "x"); !errors.Is(err, ErrProtocol) || !strings.Contains(err.Error(), says) {
			t.Errorf("%v does not say %q", err, says)
		}
	}
}

func TestMappingsAreCheckedBeforeUse(t *testing.T) {
	place := func(offset, length int64, dtype DType, shape ...int) Mapping {
		return Mapping{Version: 1, Bytes: 1 << 17, Tensors: []Place{{Spec{"x", dtype, shape}, offset, length}}}
	}
	newer := place(65536, 8, Float64)
	newer.Version = 2
	for says, mapping := range map[string]Mapping{
		"its version is 2":                   newer,
		"48 bytes, not 56":                   place(65536, 56, Float64, 2, 3),
		"65544 bytes at 65536":               place(65536, 65544, Float64, 8193),
		"8 bytes at 9223372036854775800":     place(1<<63-8, 8, Float64),
		"no multiple of 64":                  place(65544, 8, Float64),
		"more bytes than there are addresse": place(0, 8, Float64, 1<<40, 1<<40),
		"not one that this client knows":     place(0, 8, "float7", 8),
		"at most 8":                          place(0, 8, Float64, 1, 1, 1, 1, 1, 1, 1, 1, 1),
		"negative":                           place(0, 8, Float64, -1),
	} {
		if err := mapping.check(); !errors.Is(err, ErrProtocol) || !strings.Contains(err.Error(), says) {
			t.Errorf("%v does not say %q", err, says)
		}
	}
	for _, good := range []Mapping{place(65536, 65536, Float64, 8192), place(1<<17-1, 0, Int8, 0, 5), place(0, 16, Complex128)} {
		if err := good.check(); err != nil {
			t.Error(err)
		}
	}
}

func TestMemoryThatOthersCanWriteIsNotLent(t *testing.T) {
	c, p := scripted(t)
	file, mapping := p.memory(writersCreator)
	go func() {
		p.send(opOK, p.receive().sequence, `{"mapping":`+mapping+`,"lease":3,"expires_ms":60000}`, int(file.Fd()))
	}()
	if _, err := c.Fetch(context.Background(), "x"); err == nil || !strings.Contains(err.Error(), "published first") {
		t.Error(err)
	}
	if released := p.receive(); released.op != opRelease {
		t.Error(released)
	}
}

func TestASegmentThatIsTooShortIsNotMapped(t *testing.T) {
	c, p := scripted(t)
	file := must[*os.File](t)(shm.NewFile("short"))
	defer file.Close()
	p.seal(file, 4096, true)
	go func() {
		p.send(opOK, p.receive().sequence, `{"mapping":`+mapping(writersNone)+`,"lease":3,"expires_ms":60000}`, int(file.Fd()))
	}()
	if _, err := c.Fetch(context.Background(), "x"); err == nil || !strings.Contains(err.Error(), "131072 bytes of a segment that has 4096") {
		t.Error(err)
	}
	if released := p.receive(); released.op != opRelease {
		t.Error(released)
	}
}

func TestLeasesAreRenewedAndTheirEndIsTold(t *testing.T) {
	c, p := scripted(t)
	file, mapping := p.memory(writersNone)
	go func() {
		p.send(opOK, p.receive().sequence, `{"mapping":`+mapping+`,"lease":3,"expires_ms":40}`, int(file.Fd()))
	}()
	x, err := c.Fetch(context.Background(), "x")
	if err != nil {
		t.Fatal(err)
	}
	renew := p.receive()
	if renew.op != opRenew || renew.body["lease_ms"] != 40.0 {
		t.Error(renew)
	}
	p.send(opOK, renew.sequence, `{"expires_ms":40}`)
	renew = p.receive()
	if renew.op != opRenew || x.Err() != nil {
		t.Error(renew, x.Err())
	}
	p.send(opGone, 0, `{"lease":3,"segment":"0123456789abcdef0123456789abcdef","reason":"expired"}`)
	p.send(opError, renew.sequence, `{"code":"FAILED_PRECONDITION","reason":"LEASE_EXPIRED","message":"m","request_id":"r"}`)
	for x.Err() == nil {
		time.Sleep(time.Millisecond)
	}
	if !errors.Is(x.Err(), ErrLeaseExpired) {
		t.Error(x.Err())
	}
	if _, err := c.Call(context.Background(), "k", Inputs{"x": x}); !errors.Is(err, ErrLeaseExpired) {
		t.Error(err)
	}
	if data, err := As[float64](x); err != nil || len(data) != 6 {
		t.Error("its pages stay readable:", err)
	}
	x.Release()
	if stats := c.ClientStats(); stats.Mappings != 0 {
		t.Error(stats)
	}
}

func TestARequestIDGoesAlong(t *testing.T) {
	c, p := scripted(t)
	go func() {
		asked := p.receive()
		p.send(opError, asked.sequence, `{"code":"NOT_FOUND","reason":"FLIGHT_NOT_FOUND","message":"no x","request_id":"`+asked.body["request_id"].(string)+`"}`)
	}()
	err := c.Delete(WithRequestID(context.Background(), "job-7"), "x")
	var remote *RemoteError
	if !errors.As(err, &remote) || remote.RequestID != "job-7" || err.Error() != "strait: no x [NOT_FOUND FLIGHT_NOT_FOUND, request job-7]" {
		t.Error(err)
	}
	for _, id := range []string{"", "a b", "ü", strings.Repeat("x", 65)} {
		if err := c.Ping(WithRequestID(context.Background(), id)); !errors.Is(err, ErrArgument) {
			t.Errorf("%q: %v", id, err)
		}
	}
}

func TestShutdownIsKnown(t *testing.T) {
	c, p := scripted(t)
	if _, draining := c.Draining(); draining {
		t.Error("it has not said so")
	}
	p.send(opShutdown, 0, `{"drain_ms":60000}`)
	go func() { p.send(opOK, p.receive().sequence, `{}`) }()
	if err := c.Ping(context.Background()); err != nil {
		t.Error(err)
	}
	if end, draining := c.Draining(); !draining || time.Until(end) > time.Minute {
		t.Error(end, draining)
	}
}

func TestAStuckHostDoesNotHoldACallerWithAContext(t *testing.T) {
	c, _ := scripted(t)
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	big := strings.Repeat("x", 50_000)
	// Nobody reads: sooner or later the socket is full.
	for c.conn.tell(ctx, opLookup, &nameRequest{Name: big}) == nil {
	}
	if ctx.Err() == nil {
		t.Fatal("a write failed while its context lived")
	}
	soon, stop := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer stop()
	if err := c.Ping(soon); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	if err := c.conn.end(); err != nil {
		t.Error("the connection is whole:", err)
	}
}

func TestForgottenTensors(t *testing.T) {
	var log bytes.Buffer
	c, p := scripted(t, WithLogger(slog.New(slog.NewTextHandler(&log, nil))))
	file, mapping := p.memory(writersNone)
	fetch := func(lease string) *Tensor {
		go func() {
			p.send(opOK, p.receive().sequence, `{"mapping":`+mapping+`,"lease":`+lease+`,"expires_ms":60000}`, int(file.Fd()))
		}()
		x, err := c.Fetch(context.Background(), "x")
		if err != nil {
			t.Fatal(err)
		}
		return x
	}
	lender := fetch("4")
	data, err := As[float64](lender)
	if err != nil {
		t.Fatal(err)
	}
	lender = nil
	collect(t, func() bool { return c.ClientStats().Forgotten == 1 })
	if data[5] != 0 {
		t.Error(data)
	}
	if stats := c.ClientStats(); stats.Mappings != 1 {
		t.Error("memory that a slice shows was taken away:", stats)
	}
	quiet := fetch("5")
	if err := quiet.View(func([]byte) error { return nil }); err != nil {
		t.Error(err)
	}
	quiet = nil
	collect(t, func() bool { return c.ClientStats().Mappings == 1 })
	if released := p.receive(); released.op != opRelease || released.body["leases"].([]any)[0] != 5.0 {
		t.Error(released)
	}
	c.Close()
	if !strings.Contains(log.String(), "forgotten without Release") {
		t.Error(log.String())
	}
}
