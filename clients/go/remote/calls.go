package remote

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"os"
	"sync"
	"time"

	arrowflight "github.com/apache/arrow-go/v18/arrow/flight"
	"golang.org/x/sys/unix"

	"strait"
)

// uploads has the inputs that are segments of this process uploaded, and named as the host knows them then.
func (g *gateway) uploads(ctx context.Context, said map[string]json.RawMessage, isCall bool) (segments []string, err error) {
	var inputs map[string]json.RawMessage
	if err := json.Unmarshal(said["inputs"], &inputs); err != nil {
		return nil, err
	}
	since := map[string]time.Time{}
	for port, text := range inputs {
		var input struct {
			Segment string `json:"segment"`
			Tensor  string `json:"tensor"`
		}
		// A flight's name is a string.
		if json.Unmarshal(text, &input) != nil || input.Segment == "" {
			continue
		}
		s, place, err := g.tensor(input.Segment, input.Tensor)
		if err != nil {
			return segments, err
		}
		if place.Length == 0 && isCall {
			// In the message itself: arrow-go has no lists of no elements.
			inline := map[string]any{"inline": map[string]any{"dtype": place.DType, "shape": append([]int{}, place.Shape...), "offset": 0, "length": 0}}
			inputs[port], err = json.Marshal(inline)
			if err = errors.Join(err, s.file.Close()); err != nil {
				return segments, err
			}
			continue
		}
		id, err := g.put(ctx, s, []strait.Place{place}, "", false)
		if err = errors.Join(err, s.file.Close()); err != nil {
			return segments, err
		}
		segments = append(segments, id)
		since[id] = time.Now()
		if inputs[port], err = json.Marshal(map[string]string{"segment": id}); err != nil {
			return segments, err
		}
	}
	for id, at := range since {
		if time.Since(at) > renewAfter {
			if err := g.renew(ctx, id); err != nil {
				return segments, err
			}
		}
	}
	said["inputs"], err = json.Marshal(inputs)
	return segments, err
}

// tensor is one of a segment of this process. Whoever has it closes the segment's file.
func (g *gateway) tensor(id, tensor string) (*segment, strait.Place, error) {
	s, err := g.held(id)
	if err != nil {
		return nil, strait.Place{}, err
	}
	for _, place := range s.mapping.Tensors {
		if tensor == "" || place.Name == tensor {
			return s, place, nil
		}
	}
	return nil, strait.Place{}, errors.Join(argument("segment %s has no tensor %q", id, tensor), s.file.Close())
}

// renew has the host keep an upload for longer.
func (g *gateway) renew(ctx context.Context, id string) error {
	ticket, err := json.Marshal(map[string]string{"segment": id})
	if err != nil {
		return err
	}
	_, err = g.remote.RenewFlightEndpoint(g.remote.context(ctx), &arrowflight.RenewFlightEndpointRequest{
		Endpoint: &arrowflight.FlightEndpoint{Ticket: &arrowflight.Ticket{Ticket: ticket}}})
	return g.remote.failed(err, nil)
}

func (g *gateway) invoke(ctx context.Context, r asked, requestID string) (answer, error) {
	var said map[string]json.RawMessage
	if err := json.Unmarshal(r.body, &said); err != nil {
		return answer{}, err
	}
	var wanted struct {
		DeadlineMS int64  `json:"deadline_ms"`
		Map        *bool  `json:"map"`
		Key        string `json:"idempotency_key"`
	}
	if err := json.Unmarshal(r.body, &wanted); err != nil {
		return answer{}, err
	}
	segments, err := g.uploads(ctx, said, true)
	var keys []string
	defer func() { g.release(segments, keys) }()
	if err != nil {
		return answer{}, err
	}
	delete(said, "lease_ms")
	if wanted.Key == "" {
		key, err := newKey()
		if err != nil {
			return answer{}, err
		}
		// Whoever has the answer asks for no repeat.
		keys = []string{key}
		said["idempotency_key"], _ = json.Marshal(key)
	}
	text, err := json.Marshal(said)
	if err != nil {
		return answer{}, err
	}
	frame := header(opInvoke, r.sequence, r.trace, len(text), len(r.payload))
	frame = append(append(frame, text...), r.payload...)
	deadline := time.Duration(wanted.DeadlineMS) * time.Millisecond
	if deadline == 0 {
		most, _ := g.welcome["deadline_ms_default"].(float64)
		deadline = time.Duration(most) * time.Millisecond
	}
	timed, stop := context.WithTimeout(ctx, deadline+slack)
	defer stop()
	results, err := g.remote.act(timed, true, "invoke", frame, headers(requestID)...)
	if err != nil {
		return answer{}, err
	}
	if len(results) != 1 || len(results[0]) < headerBytes {
		return answer{}, protocol("the action invoke gave %d results instead of 1", len(results))
	}
	bodyBytes := int(binary.LittleEndian.Uint32(results[0][8:]))
	if headerBytes+bodyBytes > len(results[0]) {
		return answer{}, protocol("the action invoke was answered by a frame that is cut")
	}
	var reply map[string]json.RawMessage
	if err := json.Unmarshal(results[0][headerBytes:headerBytes+bodyBytes], &reply); err != nil {
		return answer{}, protocol("the action invoke: %w", err)
	}
	given := answer{body: reply, payload: results[0][headerBytes+bodyBytes:]}
	left, err := g.results(ctx, reply, &given, wanted.Map == nil || *wanted.Map)
	segments = append(segments, left...)
	if err != nil {
		closeAll(given.fds)
		return answer{}, err
	}
	return given, nil
}

func headers(requestID string) []string {
	if requestID == "" {
		return nil
	}
	return []string{requestIDKey, requestID}
}

// results reads what did not come in the answer, if it is wanted, and says which segments the host need not keep any more.
func (g *gateway) results(ctx context.Context, reply map[string]json.RawMessage, given *answer, isMapped bool) (left []string, err error) {
	var entries []map[string]json.RawMessage
	if err := json.Unmarshal(reply["results"], &entries); err != nil {
		return nil, protocol("the results of a call: %w", err)
	}
	for _, entry := range entries {
		if entry["mapping"] == nil || string(entry["mapping"]) == "null" {
			continue
		}
		var result struct {
			Mapping strait.Mapping `json:"mapping"`
			Name    string         `json:"name"`
		}
		for key, into := range map[string]any{"mapping": &result.Mapping, "name": &result.Name} {
			if text := entry[key]; text != nil {
				if err := json.Unmarshal(text, into); err != nil {
					return left, protocol("a result of a call: %w", err)
				}
			}
		}
		if result.Name == "" {
			left = append(left, result.Mapping.Segment)
		}
		if !isMapped {
			continue
		}
		s, err := g.result(ctx, result.Mapping, result.Name)
		if err != nil {
			return left, err
		}
		granted, err := g.granted(s, "")
		if err != nil {
			return left, err
		}
		at := len(given.fds)
		given.fds = append(given.fds, granted.fds...)
		told := granted.body.(mapped)
		for key, value := range map[string]any{"mapping": told.Mapping, "lease": told.Lease, "expires_ms": told.ExpiresMS, "fd": at} {
			if entry[key], err = json.Marshal(value); err != nil {
				return left, err
			}
		}
	}
	reply["results"], err = json.Marshal(entries)
	return left, err
}

func (g *gateway) result(ctx context.Context, mapping strait.Mapping, name string) (*segment, error) {
	all := make([]strait.Place, len(mapping.Tensors))
	for i, place := range mapping.Tensors {
		all[i].Spec = place.Spec
	}
	all, bytes, err := lay(all)
	if err != nil {
		return nil, err
	}
	if len(all) == 0 {
		return nil, protocol("a result without tensors")
	}
	rows := rowsOf(all[0].Spec)
	count := min(max(int(all[0].Length/partBytes), 1), partsMax, max(rows, 1))
	parts := make([]part, count)
	for i := range parts {
		wanted := part{first: rows * i / count, last: rows * (i + 1) / count}
		ticket := map[string]any{"segment": mapping.Segment, "rows": [2]int{wanted.first, wanted.last}}
		if name != "" {
			ticket["name"] = name
		}
		if wanted.ticket, err = json.Marshal(ticket); err != nil {
			return nil, err
		}
		parts[i] = wanted
	}
	return g.fetch(ctx, all, bytes, parts)
}

func (g *gateway) prepare(ctx context.Context, r asked, requestID string) (answer, error) {
	var said map[string]json.RawMessage
	if err := json.Unmarshal(r.body, &said); err != nil {
		return answer{}, err
	}
	if string(said["ring"]) == "true" {
		return answer{}, g.remote.localOnly("a Ring is memory that client and host share; Prepare without it")
	}
	segments, err := g.uploads(ctx, said, false)
	// What is prepared holds them.
	defer func() { g.release(segments, nil) }()
	if err != nil {
		return answer{}, err
	}
	text, err := json.Marshal(said)
	if err != nil {
		return answer{}, err
	}
	return g.line(ctx, "prepare", text, requestID)
}

// line is a socket here whose frames an exchange brings to the host: of what is prepared, or of a channel's reader.
type line struct {
	stream  arrowflight.FlightService_DoExchangeClient
	stop    context.CancelFunc
	sending sync.Mutex
	// This side's messages have ended.
	isClosed bool
}

// The host ends an exchange of which nothing came for server.stall_ms.
const aliveAfter = 10 * time.Second

func (l *line) send(frame []byte) error {
	l.sending.Lock()
	defer l.sending.Unlock()
	if l.isClosed {
		return io.EOF
	}
	return l.stream.Send(&arrowflight.FlightData{AppMetadata: frame})
}

func (l *line) closeSend() error {
	l.sending.Lock()
	defer l.sending.Unlock()
	l.isClosed = true
	return l.stream.CloseSend()
}

// cancel ends in the host what is under way.
func (l *line) cancel() {
	// Whether anybody is there is seen by who receives.
	_ = l.send(header(opCancel, 0, nil, 0, 0))
}

func (g *gateway) line(ctx context.Context, key string, body json.RawMessage, requestID string) (answer, error) {
	command, err := json.Marshal(map[string]json.RawMessage{key: body})
	if err != nil {
		return answer{}, err
	}
	lasting, stop := context.WithCancel(g.context)
	// Until it is there it ends with the request.
	tied := context.AfterFunc(ctx, stop)
	l := &line{stop: stop}
	fail := func(err error) (answer, error) {
		stop()
		return answer{}, err
	}
	if l.stream, err = g.remote.DoExchange(g.remote.context(lasting, headers(requestID)...)); err != nil {
		return fail(g.remote.failed(err, nil))
	}
	descriptor := &arrowflight.FlightDescriptor{Type: arrowflight.DescriptorCMD, Cmd: command}
	// If it is refused, the answer says why.
	_ = l.stream.Send(&arrowflight.FlightData{FlightDescriptor: descriptor})
	first, err := l.stream.Recv()
	if err != nil {
		return fail(g.remote.failed(err, l.stream.Trailer()))
	}
	frame := first.AppMetadata
	if len(frame) < headerBytes || frame[3] != opOK {
		return fail(protocol("an exchange of frames that begins with no OK"))
	}
	var told map[string]json.RawMessage
	if err := json.Unmarshal(frame[headerBytes:], &told); err != nil {
		return fail(protocol("the first frame of an exchange: %w", err))
	}
	ours, theirs, err := pair()
	if err != nil {
		return fail(err)
	}
	file, err := theirs.File()
	err = errors.Join(err, theirs.Close())
	if err != nil {
		return fail(errors.Join(err, ours.Close()))
	}
	defer file.Close()
	fd, err := unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fail(errors.Join(err, ours.Close()))
	}
	if !tied() {
		_ = unix.Close(fd)
		return fail(errors.Join(context.Canceled, ours.Close()))
	}
	g.mu.Lock()
	g.lastLine++
	number := g.lastLine
	g.lines[number] = l
	g.mu.Unlock()
	if key == "prepare" {
		told["prepared"], _ = json.Marshal(number)
	}
	g.work.Go(func() {
		for isRead := true; ; {
			data, err := l.stream.Recv()
			if err != nil {
				break
			}
			if frame := data.AppMetadata; len(frame) == headerBytes && frame[3] == opShutdown {
				// The host waits for this side's end.
				_ = l.closeSend()
				_ = ours.CloseWrite()
				isRead = false
			}
			if isRead {
				// If nobody reads any more, what was sent last still has to get to the host, which ends it then.
				_, err = ours.Write(data.AppMetadata)
				isRead = err == nil
			}
		}
		stop()
		g.mu.Lock()
		delete(g.lines, number)
		g.mu.Unlock()
		_ = ours.Close()
	})
	g.work.Go(func() {
		packet := make([]byte, frameBytesMax)
		for {
			_ = ours.SetReadDeadline(time.Now().Add(aliveAfter))
			n, err := ours.Read(packet)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				n, err = 0, nil
			} else if n == 0 {
				break
			}
			if err != nil || l.send(append([]byte(nil), packet[:n]...)) != nil {
				break
			}
		}
		_ = l.closeSend()
	})
	return answer{body: told, fds: []int{fd}}, nil
}
