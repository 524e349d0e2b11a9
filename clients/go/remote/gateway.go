package remote

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	arrowflight "github.com/apache/arrow-go/v18/arrow/flight"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"strait"
	"strait/internal/driver"
)

// Frames of the data socket, as far as this side of it needs them.
const (
	headerBytes   = 48
	frameBytesMax = headerBytes + 61440 + 131072
	traceAt       = 16
	traceEnd      = 41

	opHello, opWelcome, opOK, opError       = 1, 2, 3, 4
	opKernels, opLookup, opList             = 5, 6, 7
	opPublish, opDrop, opStats              = 8, 9, 10
	opCreate, opAdopt, opMap                = 11, 13, 14
	opRelease, opRenew, opInvoke            = 15, 16, 17
	opPrepare, opCancel, opStream           = 18, 20, 21
	opPing, opShutdown                      = 22, 66
	leaseMS                           int64 = 24 * 60 * 60 * 1000
	// What the host need not keep any more is told after that, and when the client is closed for so long at most.
	releaseAfter, releaseMost = 50 * time.Millisecond, 2 * time.Second
	// Beyond a call's own deadline, for the way there and back.
	slack = 30 * time.Second
)

// gateway answers a Client as a host's data socket does.
type gateway struct {
	remote  *connection
	socket  *net.UnixConn
	welcome map[string]any
	hostID  string
	// Ends with the client.
	context context.Context
	stop    context.CancelFunc
	copied  atomic.Int64
	// Of one frame.
	writing sync.Mutex
	work    sync.WaitGroup

	mu        sync.Mutex
	segments  map[string]*segment
	leases    map[uint64]*segment
	lastLease uint64
	// Requests under way, by sequence.
	running  map[uint32]context.CancelFunc
	lines    map[uint64]*line
	lastLine uint64
	// What the host need not keep any more.
	over     released
	isTelled bool
}

type released struct {
	Segments []string `json:"segments,omitempty"`
	Keys     []string `json:"idempotency_keys,omitempty"`
}

// asked is a frame that came.
type asked struct {
	op       byte
	sequence uint32
	trace    []byte
	body     []byte
	payload  []byte
	fds      []int
}

// answer is what an op gives.
type answer struct {
	op      byte
	body    any
	payload []byte
	fds     []int
}

func newGateway(c *connection, welcome []byte) (driver.Opened, error) {
	g := &gateway{remote: c, segments: map[string]*segment{}, leases: map[uint64]*segment{}, running: map[uint32]context.CancelFunc{}, lines: map[uint64]*line{}}
	if err := json.Unmarshal(welcome, &g.welcome); err != nil {
		return driver.Opened{}, errors.Join(protocol("the action welcome: %w", err), c.Close())
	}
	g.hostID, _ = g.welcome["host_id"].(string)
	ours, theirs, err := pair()
	if err != nil {
		return driver.Opened{}, errors.Join(err, c.Close())
	}
	g.socket = ours
	g.context, g.stop = context.WithCancel(context.Background())
	go g.serve()
	return driver.Opened{Socket: theirs, Copied: g.copied.Load}, nil
}

// pair is both ends of a socket of packets.
func pair() (ours, theirs *net.UnixConn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("strait: a socket: %w", err)
	}
	ends := make([]*net.UnixConn, 2)
	for i, fd := range fds {
		// Best effort: what is longer than the buffer is refused where it is sent.
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 4*frameBytesMax)
		file := os.NewFile(uintptr(fd), "strait-far")
		conn, failed := net.FileConn(file)
		err = errors.Join(err, failed, file.Close())
		ends[i], _ = conn.(*net.UnixConn)
	}
	if err != nil || ends[0] == nil || ends[1] == nil {
		return nil, nil, fmt.Errorf("strait: a socket: %w", err)
	}
	return ends[0], ends[1], nil
}

// serve takes requests until the client is closed. Then nothing is left.
func (g *gateway) serve() {
	packet, control := make([]byte, frameBytesMax+1), make([]byte, unix.CmsgSpace(4*16))
	for {
		n, controlled, _, _, err := g.socket.ReadMsgUnix(packet, control)
		if err != nil || n < headerBytes {
			break
		}
		g.take(slices.Clone(packet[:n]), descriptors(control[:controlled]))
	}
	g.stop()
	g.mu.Lock()
	lines := g.lines
	g.lines = map[uint64]*line{}
	g.mu.Unlock()
	for _, line := range lines {
		line.stop()
	}
	g.work.Wait()
	g.mu.Lock()
	leases := make([]uint64, 0, len(g.leases))
	for lease := range g.leases {
		leases = append(leases, lease)
	}
	g.mu.Unlock()
	g.drop(leases)
	ctx, stop := context.WithTimeout(context.Background(), releaseMost)
	defer stop()
	g.tell(ctx)
	// Whatever they return, it is over.
	_ = g.remote.Close()
	_ = g.socket.Close()
}

func descriptors(control []byte) (fds []int) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return nil
	}
	for i := range messages {
		if rights, err := unix.ParseUnixRights(&messages[i]); err == nil {
			fds = append(fds, rights...)
		}
	}
	return fds
}

func closeAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}

// take has a request answered. What may wait for the host does so beside the others.
func (g *gateway) take(packet []byte, fds []int) {
	bodyBytes := int(binary.LittleEndian.Uint32(packet[8:]))
	if headerBytes+bodyBytes > len(packet) {
		closeAll(fds)
		return
	}
	r := asked{packet[3], binary.LittleEndian.Uint32(packet[4:]), packet[traceAt:traceEnd], packet[headerBytes : headerBytes+bodyBytes],
		packet[headerBytes+bodyBytes:], fds}
	if len(r.body) == 0 {
		r.body = []byte("{}")
	}
	ctx, stop := context.WithCancel(g.context)
	g.mu.Lock()
	g.running[r.sequence] = stop
	g.mu.Unlock()
	do := func() {
		given, err := g.answer(ctx, r)
		g.mu.Lock()
		delete(g.running, r.sequence)
		g.mu.Unlock()
		stop()
		g.reply(r, given, err)
		closeAll(given.fds)
		closeAll(r.fds)
	}
	switch r.op {
	case opHello, opCreate, opRelease, opRenew, opCancel:
		do()
	default:
		g.work.Go(do)
	}
}

func (g *gateway) reply(r asked, given answer, failed error) {
	op, body := byte(opOK), given.body
	if given.op != 0 {
		op = given.op
	}
	if failed != nil {
		var remote *strait.RemoteError
		switch {
		case errors.As(failed, &remote):
		case errors.Is(failed, context.Canceled):
			remote = &strait.RemoteError{Code: "CANCELLED", Reason: "CANCELLED", Message: "it was cancelled", RequestID: "-"}
		case errors.Is(failed, strait.ErrProtocol):
			remote = &strait.RemoteError{Code: "INTERNAL", Reason: reasonProtocol, Message: failed.Error(), RequestID: "-"}
		default:
			remote = &strait.RemoteError{Code: "INTERNAL", Reason: "CLIENT", Message: failed.Error(), RequestID: "-"}
		}
		op, body, given.payload, given.fds = opError, remote, nil, nil
	}
	text, err := json.Marshal(body)
	if err != nil {
		return
	}
	frame := header(op, r.sequence, r.trace, len(text), len(given.payload))
	frame = append(append(frame, text...), given.payload...)
	var rights []byte
	if len(given.fds) > 0 {
		rights = unix.UnixRights(given.fds...)
	}
	g.writing.Lock()
	defer g.writing.Unlock()
	// Who is gone needs no answer.
	_, _, _ = g.socket.WriteMsgUnix(frame, rights, nil)
}

func header(op byte, sequence uint32, trace []byte, body, payload int) []byte {
	frame := make([]byte, headerBytes, headerBytes+body+payload)
	frame[0], frame[1], frame[2], frame[3] = 'S', 'T', 2, op
	binary.LittleEndian.PutUint32(frame[4:], sequence)
	binary.LittleEndian.PutUint32(frame[8:], uint32(body))
	binary.LittleEndian.PutUint32(frame[12:], uint32(payload))
	copy(frame[traceAt:traceEnd], trace)
	return frame
}

type nothing struct{}

func (g *gateway) answer(ctx context.Context, r asked) (answer, error) {
	var named struct {
		RequestID string `json:"request_id"`
	}
	_ = json.Unmarshal(r.body, &named)
	switch r.op {
	case opHello:
		return answer{op: opWelcome, body: g.welcome}, nil
	case opPing:
		_, err := g.remote.act(ctx, true, "welcome", nil)
		return answer{body: nothing{}}, err
	case opStats:
		found, err := g.one(ctx, "stats")
		return answer{body: found}, err
	case opKernels:
		return g.kernels(ctx, r)
	case opDrop:
		return g.dropFlight(ctx, r)
	case opList:
		return g.list(ctx, r)
	case opLookup, opMap:
		return g.find(ctx, r)
	case opCreate, opAdopt:
		return g.create(ctx, r)
	case opPublish:
		return g.publish(ctx, r)
	case opRelease, opRenew:
		return g.lease(r)
	case opInvoke:
		return g.invoke(ctx, r, named.RequestID)
	case opPrepare:
		return g.prepare(ctx, r, named.RequestID)
	case opStream:
		return g.line(ctx, "stream", json.RawMessage(r.body), named.RequestID)
	case opCancel:
		return g.cancel(r)
	}
	return answer{}, g.remote.localOnly("op %d is for shared memory: connect on that machine (unix:///DIRECTORY)", r.op)
}

func (g *gateway) one(ctx context.Context, kind string) (json.RawMessage, error) {
	found, err := g.remote.act(ctx, true, kind, nil)
	if err == nil && len(found) != 1 {
		err = protocol("the action %s gave %d results instead of 1", kind, len(found))
	}
	if err != nil {
		return nil, err
	}
	return found[0], nil
}

func (g *gateway) kernels(ctx context.Context, r asked) (answer, error) {
	found, err := g.remote.act(ctx, true, "kernels", r.body)
	all := make([]json.RawMessage, len(found))
	for i := range found {
		all[i] = found[i]
	}
	if err != nil {
		return answer{}, err
	}
	return page("kernels", all, r.body, func(kernel json.RawMessage) (string, error) {
		var named struct{ Plugin, Name string }
		err := json.Unmarshal(kernel, &named)
		return named.Plugin + "/" + named.Name, err
	})
}

func (g *gateway) dropFlight(ctx context.Context, r asked) (answer, error) {
	var wanted struct {
		Name string `json:"name"`
	}
	if err := json.Unmarshal(r.body, &wanted); err != nil {
		return answer{}, err
	}
	attempts := 0
	err := g.remote.ask(ctx, true, func(ctx context.Context) error {
		attempts++
		_, err := g.remote.act(ctx, false, "drop", []byte(wanted.Name))
		return err
	})
	var remote *strait.RemoteError
	if attempts > 1 && errors.As(err, &remote) && remote.Code == "NOT_FOUND" {
		// The one whose answer was lost has done it.
		err = nil
	}
	return answer{body: nothing{}}, err
}

func (g *gateway) list(ctx context.Context, r asked) (answer, error) {
	flights := []strait.Flight{}
	err := g.remote.ask(g.remote.context(ctx), true, func(ctx context.Context) error {
		flights = flights[:0]
		stream, err := g.remote.ListFlights(ctx, &arrowflight.Criteria{})
		if err != nil {
			return g.remote.failed(err, nil)
		}
		for {
			info, err := stream.Recv()
			if err == io.EOF {
				return nil
			}
			if err != nil {
				return g.remote.failed(err, stream.Trailer())
			}
			all, bytes, _, err := g.described(info)
			var remote *strait.RemoteError
			if errors.As(err, &remote) && remote.Reason == reasonLocal {
				// Its name is told; Fetch says why it cannot be had.
				all, bytes, err = []strait.Place{}, pageBytes, nil
			}
			if err != nil {
				return err
			}
			name := ""
			if path := info.GetFlightDescriptor().GetPath(); len(path) > 0 {
				name = path[0]
			}
			flights = append(flights, strait.Flight{Name: name, Mapping: strait.Mapping{Version: 1, HostID: g.hostID, Bytes: bytes, Writers: "none", Tensors: all}})
		}
	})
	if err != nil {
		return answer{}, err
	}
	return page("flights", flights, r.body, func(flight strait.Flight) (string, error) { return flight.Name, nil })
}

// trailer is what the host says beside the answer to a call.
type trailer struct{ said metadata.MD }

func (g *gateway) trailer() *trailer { return &trailer{} }

func (t *trailer) option() grpc.CallOption { return grpc.Trailer(&t.said) }

// mapped is an OK with a segment.
type mapped struct {
	Name      string         `json:"name,omitempty"`
	Mapping   strait.Mapping `json:"mapping"`
	Lease     uint64         `json:"lease,omitempty"`
	ExpiresMS int64          `json:"expires_ms,omitempty"`
}

// granted is a segment with a lease and a descriptor.
func (g *gateway) granted(s *segment, name string) (answer, error) {
	fd, err := unix.FcntlInt(s.file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return answer{}, fmt.Errorf("strait: a descriptor of a segment: %w", err)
	}
	return answer{body: mapped{name, s.mapping, g.add(s), leaseMS}, fds: []int{fd}}, nil
}

// find is LOOKUP and MAP.
func (g *gateway) find(ctx context.Context, r asked) (answer, error) {
	var wanted struct {
		Name string `json:"name"`
	}
	if err := json.Unmarshal(r.body, &wanted); err != nil {
		return answer{}, err
	}
	for attempts := 0; ; attempts++ {
		all, bytes, parts, err := g.info(ctx, wanted.Name)
		if err != nil {
			return answer{}, err
		}
		if r.op == opLookup {
			return answer{body: mapped{Name: wanted.Name, Mapping: strait.Mapping{Version: 1, HostID: g.hostID, Bytes: bytes, Writers: "none", Tensors: all}}}, nil
		}
		s, err := g.fetch(ctx, all, bytes, parts)
		var remote *strait.RemoteError
		if errors.As(err, &remote) && remote.Reason == "SEGMENT_NOT_FOUND" && attempts < 3 {
			// It was replaced while it was read.
			continue
		}
		if err != nil {
			return answer{}, err
		}
		return g.granted(s, wanted.Name)
	}
}

// create is CREATE and ADOPT.
func (g *gateway) create(ctx context.Context, r asked) (answer, error) {
	var wanted struct {
		Tensors []strait.Place `json:"tensors"`
		Name    string         `json:"name"`
		Replace bool           `json:"replace"`
	}
	if err := json.Unmarshal(r.body, &wanted); err != nil {
		return answer{}, err
	}
	if r.op == opAdopt {
		return answer{}, g.remote.localOnly("Adopt hands a memory file over to a host on this machine; Publish copies a tensor to one that is not")
	}
	all, bytes, err := lay(wanted.Tensors)
	if err != nil {
		return answer{}, err
	}
	s, err := g.newSegment(all, bytes, "anyone")
	if err != nil {
		return answer{}, err
	}
	if _, err := unix.FcntlInt(s.file.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW); err != nil {
		return answer{}, errors.Join(err, s.file.Close())
	}
	return g.granted(s, "")
}

func (g *gateway) publish(ctx context.Context, r asked) (answer, error) {
	var wanted struct {
		Segment string `json:"segment"`
		Name    string `json:"name"`
		Replace bool   `json:"replace"`
	}
	if err := json.Unmarshal(r.body, &wanted); err != nil {
		return answer{}, err
	}
	s, err := g.held(wanted.Segment)
	if err != nil {
		return answer{}, err
	}
	defer s.file.Close()
	if wanted.Name == "" {
		// An upload without a name would be meant.
		return answer{}, &strait.RemoteError{Code: "INVALID_ARGUMENT", Reason: "BAD_NAME", RequestID: "-", Message: "a name of 0 bytes; it has 1 to 200"}
	}
	if _, err := g.put(ctx, s, s.mapping.Tensors, wanted.Name, wanted.Replace); err != nil {
		return answer{}, err
	}
	s.mapping.Writers = "none"
	return answer{body: mapped{Name: wanted.Name, Mapping: s.mapping}}, nil
}

// lease is RELEASE and RENEW: what is here stays until it is released.
func (g *gateway) lease(r asked) (answer, error) {
	var wanted struct {
		Leases []uint64 `json:"leases"`
	}
	if err := json.Unmarshal(r.body, &wanted); err != nil {
		return answer{}, err
	}
	if r.op == opRenew {
		return answer{body: map[string]any{"expires_ms": leaseMS}}, nil
	}
	return answer{body: map[string]any{"released": g.drop(wanted.Leases)}}, nil
}

func (g *gateway) cancel(r asked) (answer, error) {
	var wanted struct {
		Sequence uint32 `json:"sequence"`
		Prepared uint64 `json:"prepared"`
	}
	if err := json.Unmarshal(r.body, &wanted); err != nil {
		return answer{}, err
	}
	g.mu.Lock()
	stop, line := g.running[wanted.Sequence], g.lines[wanted.Prepared]
	g.mu.Unlock()
	if stop != nil && wanted.Sequence != r.sequence {
		stop()
	}
	if line != nil {
		line.cancel()
	}
	return answer{body: map[string]any{"cancelled": stop != nil || line != nil}}, nil
}

// release says that the host need not keep these any more; it is told soon, of many small calls together.
func (g *gateway) release(segments, keys []string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.over.Segments = append(g.over.Segments, segments...)
	g.over.Keys = append(g.over.Keys, keys...)
	if g.isTelled || len(g.over.Segments)+len(g.over.Keys) == 0 || g.context.Err() != nil {
		return
	}
	g.isTelled = true
	g.work.Go(func() {
		select {
		case <-time.After(releaseAfter):
			g.tell(g.context)
		case <-g.context.Done():
		}
	})
}

func (g *gateway) tell(ctx context.Context) {
	g.mu.Lock()
	over := g.over
	g.over, g.isTelled = released{}, false
	g.mu.Unlock()
	if len(over.Segments)+len(over.Keys) == 0 {
		return
	}
	if body, err := json.Marshal(over); err == nil {
		// If the host does not hear of it, they go by themselves.
		_, _ = g.remote.act(ctx, false, "release", body)
	}
}

func newKey() (string, error) {
	var key [16]byte
	_, err := rand.Read(key[:])
	return hex.EncodeToString(key[:]), err
}
