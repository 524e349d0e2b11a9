package remote

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/apache/arrow-go/v18/arrow"
	"github.com/apache/arrow-go/v18/arrow/array"
	arrowflight "github.com/apache/arrow-go/v18/arrow/flight"
	"github.com/apache/arrow-go/v18/arrow/ipc"
	"golang.org/x/sys/unix"

	"strait"
	"strait/internal/shm"
)

const (
	// Messages of this size are the fastest.
	messageBytes = 512 << 10
	// A tensor is read in parts from this size on, all at once, in at most so many.
	partBytes, partsMax = 32 << 20, 4
	// What was uploaded is renewed when it is older: the host keeps it for a minute.
	renewAfter = 15 * time.Second
)

// segment is a memory file of this process, as a host would have it.
type segment struct {
	mapping strait.Mapping
	file    *os.File
	leases  int
}

// newSegment is a memory file for tensors that lie there so.
func (g *gateway) newSegment(all []strait.Place, bytes int64, writers string) (*segment, error) {
	var id [16]byte
	if _, err := rand.Read(id[:]); err != nil {
		return nil, err
	}
	file, err := shm.NewFile("strait-far")
	if err != nil {
		return nil, err
	}
	if err := errors.Join(file.Truncate(bytes), shm.Allocate(int(file.Fd()), bytes)); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return &segment{file: file, mapping: strait.Mapping{
		Version: 1, HostID: g.hostID, Segment: hex.EncodeToString(id[:]), Generation: 1, Bytes: bytes, Writers: writers, Tensors: all}}, nil
}

// lend calls use with a segment's bytes.
func (s *segment) lend(write bool, use func(bytes []byte) error) error {
	pages, err := shm.Map(int(s.file.Fd()), s.mapping.Bytes, write)
	if err != nil {
		return err
	}
	err = use(pages.Bytes())
	return errors.Join(err, pages.Unmap())
}

// add keeps a segment under a new lease, for whoever the answer goes to.
func (g *gateway) add(s *segment) (lease uint64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.segments[s.mapping.Segment] = s
	g.lastLease++
	g.leases[g.lastLease] = s
	s.leases++
	return g.lastLease
}

func (g *gateway) drop(leases []uint64) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	dropped := 0
	for _, lease := range leases {
		s := g.leases[lease]
		if s == nil {
			continue
		}
		delete(g.leases, lease)
		dropped++
		if s.leases--; s.leases == 0 {
			delete(g.segments, s.mapping.Segment)
			// Whoever uses it has a descriptor of its own.
			_ = s.file.Close()
		}
	}
	return dropped
}

// held is a segment by its id, as a copy that has a descriptor of its own.
func (g *gateway) held(id string) (*segment, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := g.segments[id]
	if s == nil {
		return nil, &strait.RemoteError{Code: "NOT_FOUND", Reason: "SEGMENT_NOT_FOUND", RequestID: "-", Message: "there is no segment " + id + " of this client"}
	}
	fd, err := unix.FcntlInt(s.file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("strait: a descriptor of a segment: %w", err)
	}
	return &segment{mapping: s.mapping, file: os.NewFile(uintptr(fd), "strait-far")}, nil
}

// put sends tensors of a segment, as one table: a flight, or for an empty name what calls name by the id that it answers.
func (g *gateway) put(ctx context.Context, s *segment, all []strait.Place, name string, replace bool) (string, error) {
	if len(all) == 0 {
		return "", argument("a flight without tensors")
	}
	rows := rowsOf(all[0].Spec)
	var bytes int64
	fields := make([]arrow.Field, len(all))
	for i, place := range all {
		if rowsOf(place.Spec) != rows || (len(place.Shape) == 0) != (len(all[0].Shape) == 0) {
			return "", g.remote.localOnly("tensors %q and %q are not equally long, which are put together on the host's machine only; put each by itself",
				all[0].Name, place.Name)
		}
		if slices.Contains(place.Shape[min(1, len(place.Shape)):], 0) {
			return "", g.remote.localOnly("tensor %q has the shape %v, whose rows have no elements, for which arrow-go has no type", place.Name, place.Shape)
		}
		var err error
		if fields[i], err = field(place.Spec); err != nil {
			return "", err
		}
		bytes += place.Length
	}
	schema := arrow.NewSchema(fields, nil)
	descriptor := &arrowflight.FlightDescriptor{Type: arrowflight.DescriptorCMD, Cmd: []byte("unnamed")}
	headers := []string{"x-strait-rows", strconv.Itoa(rows)}
	if name != "" {
		descriptor = &arrowflight.FlightDescriptor{Type: arrowflight.DescriptorPATH, Path: []string{name}}
	}
	if replace {
		headers = append(headers, "x-strait-replace", "true")
	}
	var answer []byte
	err := s.lend(false, func(memory []byte) error {
		return g.remote.ask(g.remote.context(ctx, headers...), name == "" || replace, func(ctx context.Context) (err error) {
			answer, err = g.send(ctx, descriptor, schema, all, memory, rows, bytes)
			return err
		})
	})
	if err != nil {
		return "", err
	}
	g.copied.Add(bytes)
	if name != "" {
		return "", nil
	}
	var kept struct {
		Segment string `json:"segment"`
	}
	if err := json.Unmarshal(answer, &kept); err != nil || kept.Segment == "" {
		return "", protocol("an upload without a name was answered by %q", answer)
	}
	return kept.Segment, nil
}

func (g *gateway) send(ctx context.Context, descriptor *arrowflight.FlightDescriptor, schema *arrow.Schema, all []strait.Place, memory []byte, rows int, bytes int64) ([]byte, error) {
	// Ends the stream on every path.
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	stream, err := g.remote.DoPut(ctx)
	if err != nil {
		return nil, g.remote.failed(err, nil)
	}
	writer := arrowflight.NewRecordWriter(stream, ipc.WithSchema(schema))
	writer.SetFlightDescriptor(descriptor)
	step := max(1, int(messageBytes/max(bytes/int64(max(rows, 1)), 1)))
	var sent error
	for first := 0; first < rows && sent == nil; first += step {
		sent = writer.Write(batch(schema, all, memory, first, min(rows, first+step)))
	}
	sent = errors.Join(sent, writer.Close(), stream.CloseSend())
	// A send that was refused says EOF; the answer says why.
	result, err := stream.Recv()
	if err != nil {
		return nil, g.remote.failed(err, stream.Trailer())
	}
	if sent != nil {
		return nil, sent
	}
	return result.AppMetadata, nil
}

// part is rows that come by a ticket of their own.
type part struct {
	ticket      []byte
	first, last int
}

// fetch reads tensors, whose rows come by these parts, into a segment.
func (g *gateway) fetch(ctx context.Context, all []strait.Place, bytes int64, parts []part) (*segment, error) {
	s, err := g.newSegment(all, bytes, "none")
	if err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(all, func(place strait.Place) bool { return place.Length > 0 }) {
		parts = nil
	}
	err = s.lend(true, func(memory []byte) error {
		ctx, stop := context.WithCancel(ctx)
		defer stop()
		failures := make([]error, len(parts))
		var all sync.WaitGroup
		for i := range parts {
			all.Go(func() {
				failures[i] = g.remote.ask(g.remote.context(ctx), true, func(ctx context.Context) error { return g.read(ctx, s, memory, parts[i]) })
				if failures[i] != nil {
					stop()
				}
			})
		}
		all.Wait()
		// The others were cancelled because of one.
		for _, err := range failures {
			if err != nil && !errors.Is(err, context.Canceled) {
				return err
			}
		}
		return errors.Join(failures...)
	})
	if err == nil {
		err = shm.SealWrite(int(s.file.Fd()))
		// Linux may be moving one of the pages just now, which it takes for somebody who writes.
		for tries := 0; errors.Is(err, unix.EBUSY) && tries < 100; tries++ {
			time.Sleep(10 * time.Millisecond)
			err = shm.SealWrite(int(s.file.Fd()))
		}
	}
	if err != nil {
		return nil, errors.Join(err, s.file.Close())
	}
	for _, place := range all {
		g.copied.Add(place.Length)
	}
	return s, nil
}

func (g *gateway) read(ctx context.Context, s *segment, memory []byte, wanted part) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	stream, err := g.remote.DoGet(ctx, &arrowflight.Ticket{Ticket: wanted.ticket})
	if err != nil {
		return g.remote.failed(err, nil)
	}
	reader, err := arrowflight.NewRecordReader(stream)
	if err != nil {
		return g.refused(err, stream)
	}
	defer reader.Release()
	at, ends := make([]int64, len(s.mapping.Tensors)), make([]int64, len(s.mapping.Tensors))
	for i, place := range s.mapping.Tensors {
		rows := int64(max(rowsOf(place.Spec), 1))
		at[i], ends[i] = place.Offset+place.Length/rows*int64(wanted.first), place.Offset+place.Length/rows*int64(wanted.last)
	}
	for reader.Next() {
		if err := take(reader.RecordBatch(), memory, at, ends); err != nil {
			return err
		}
	}
	if err := reader.Err(); err != nil {
		return g.refused(err, stream)
	}
	for i := range at {
		if at[i] != ends[i] {
			return protocol("tensor %q ended %d bytes too early", s.mapping.Tensors[i].Name, ends[i]-at[i])
		}
	}
	return nil
}

// refused is the host's word, or else the reader's.
func (g *gateway) refused(err error, stream arrowflight.FlightService_DoGetClient) error {
	// What ended the stream; arrow-go wraps it in words of its own.
	if _, last := stream.Recv(); last != nil && last != io.EOF {
		return g.remote.failed(last, stream.Trailer())
	}
	if len(stream.Trailer().Get(reasonKey)) > 0 {
		return g.remote.failed(err, stream.Trailer())
	}
	return protocol("%w", err)
}

func take(batch arrow.RecordBatch, memory []byte, at, ends []int64) error {
	if int(batch.NumCols()) != len(at) {
		return protocol("a batch of %d columns, where %d tensors were announced", batch.NumCols(), len(at))
	}
	for i, column := range batch.Columns() {
		bytes, err := elements(column.Data())
		if err != nil {
			return err
		}
		if at[i]+int64(len(bytes)) > ends[i] {
			return protocol("column %q has more rows than were announced", batch.ColumnName(i))
		}
		copy(memory[at[i]:], bytes)
		at[i] += int64(len(bytes))
	}
	return nil
}

var _ array.RecordReader = (*arrowflight.Reader)(nil)

// info is what the host says of a flight, and how its rows are read.
func (g *gateway) info(ctx context.Context, name string) ([]strait.Place, int64, []part, error) {
	var info *arrowflight.FlightInfo
	headers := []string{"x-strait-endpoints", strconv.Itoa(partsMax)}
	err := g.remote.ask(g.remote.context(ctx, headers...), true, func(ctx context.Context) error {
		trailer := g.trailer()
		var err error
		info, err = g.remote.GetFlightInfo(ctx, &arrowflight.FlightDescriptor{Type: arrowflight.DescriptorPATH, Path: []string{name}}, trailer.option())
		return g.remote.failed(err, trailer.said)
	})
	if err != nil {
		return nil, 0, nil, err
	}
	all, bytes, rows, err := g.described(info)
	if err != nil {
		return nil, 0, nil, err
	}
	var parts []part
	for _, endpoint := range info.Endpoint {
		wanted := part{endpoint.Ticket.GetTicket(), 0, rows}
		if len(info.Endpoint) > 1 {
			var ticket struct {
				Rows [2]int `json:"rows"`
			}
			if err := json.Unmarshal(wanted.ticket, &ticket); err != nil {
				return nil, 0, nil, protocol("a ticket of several: %w", err)
			}
			wanted.first, wanted.last = ticket.Rows[0], ticket.Rows[1]
			if wanted.first < 0 || wanted.last < wanted.first || wanted.last > rows {
				return nil, 0, nil, protocol("a ticket of the rows %v, where there are %d", ticket.Rows, rows)
			}
		}
		parts = append(parts, wanted)
	}
	return all, bytes, parts, nil
}

func (g *gateway) described(info *arrowflight.FlightInfo) ([]strait.Place, int64, int, error) {
	schema, err := arrowflight.DeserializeSchema(info.Schema, nil)
	if err != nil && strings.Contains(err.Error(), "invalid size") {
		return nil, 0, 0, g.remote.localOnly("a flight with a tensor whose rows have no elements, for which arrow-go has no type")
	}
	if err != nil {
		return nil, 0, 0, protocol("the schema of a flight: %w", err)
	}
	rows := max(info.TotalRecords, 0)
	all, bytes, err := places(schema, rows)
	return all, bytes, int(rows), err
}
