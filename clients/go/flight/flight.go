// Package flight reads and puts a strait host's flights through Arrow Flight, over a unix socket or
// TCP: for peers on another machine, and for whole record batches. What it reads is copied; on the
// host's own machine Fetch maps the same pages instead.
//
// It is thin: Client embeds arrow-go's own Flight client, all of which can be used.
package flight

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"path/filepath"
	"strings"

	"github.com/apache/arrow-go/v18/arrow"
	"github.com/apache/arrow-go/v18/arrow/array"
	arrowflight "github.com/apache/arrow-go/v18/arrow/flight"
	"github.com/apache/arrow-go/v18/arrow/ipc"
	"github.com/apache/arrow-go/v18/arrow/util"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"strait"
	"strait/internal/grpccode"
)

// ErrFar says that a flight's memory cannot be mapped here: its host is not the client's, or the
// flight is not offered to local peers. Get reads it all the same.
var ErrFar = errors.New("the flight's memory is not on this machine")

const (
	// With HTTP/2's default of 64 KiB a stream runs at less than half the speed.
	windowBytes = 16 << 20
	// Messages of this size are the fastest.
	messageBytes = 512 << 10

	requestIDKey = "x-request-id"
	reasonKey    = "x-strait-reason"
	replaceKey   = "x-strait-replace"
)

// Client is a Flight connection to a host. Any number of goroutines may use it at once.
type Client struct{ arrowflight.Client }

// Dial makes a client of the host at address: unix:///DIRECTORY as for strait.Dial, or
// grpc+tcp://HOST:PORT. It connects with the first request. Without transport credentials among
// options the connection is not encrypted.
//
// The error is strait.ErrArgument for a malformed address.
func Dial(address string, options ...grpc.DialOption) (*Client, error) {
	target, err := target(address)
	if err != nil {
		return nil, err
	}
	defaults := []grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithInitialWindowSize(windowBytes),
		grpc.WithInitialConnWindowSize(windowBytes),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(math.MaxInt32), grpc.MaxCallSendMsgSize(math.MaxInt32)),
	}
	client, err := arrowflight.NewClientWithMiddleware(target, nil, nil, append(defaults, options...)...)
	if err != nil {
		return nil, fmt.Errorf("strait: %w: %w", strait.ErrArgument, err)
	}
	return &Client{client}, nil
}

func target(address string) (string, error) {
	if directory, ok := strings.CutPrefix(address, "unix://"); ok && strings.HasPrefix(directory, "/") {
		return "unix://" + filepath.Join(directory, "flight.sock"), nil
	}
	for _, scheme := range []string{"grpc+tcp://", "grpc://", "tcp://"} {
		if place, ok := strings.CutPrefix(address, scheme); ok && place != "" {
			return "dns:///" + place, nil
		}
	}
	return "", fmt.Errorf("strait: %w: address %q is neither unix:///DIRECTORY nor grpc+tcp://HOST:PORT", strait.ErrArgument, address)
}

// remote makes the host's refusal a strait.RemoteError; errors of the transport stay as they are.
func remote(err error, trailer metadata.MD) error {
	found, ok := status.FromError(err)
	reason := trailer.Get(reasonKey)
	if err == nil || !ok || len(reason) == 0 {
		return err
	}
	e := &strait.RemoteError{Code: grpccode.Names[found.Code()], Reason: reason[0], Message: found.Message()}
	if id := trailer.Get(requestIDKey); len(id) > 0 {
		e.RequestID = id[0]
	}
	return e
}

func path(name string) *arrowflight.FlightDescriptor {
	return &arrowflight.FlightDescriptor{Type: arrowflight.DescriptorPATH, Path: []string{name}}
}

// Info is what Flight says about a flight.
//
// A strait.RemoteError with FLIGHT_NOT_FOUND says that there is no such flight.
func (c *Client) Info(ctx context.Context, name string) (*arrowflight.FlightInfo, error) {
	var trailer metadata.MD
	info, err := c.GetFlightInfo(ctx, path(name), grpc.Trailer(&trailer))
	return info, remote(err, trailer)
}

// List is the flights of this principal.
func (c *Client) List(ctx context.Context) ([]*arrowflight.FlightInfo, error) {
	stream, err := c.ListFlights(ctx, &arrowflight.Criteria{})
	if err != nil {
		return nil, err
	}
	var all []*arrowflight.FlightInfo
	for {
		info, err := stream.Recv()
		if err == io.EOF {
			return all, nil
		}
		if err != nil {
			return nil, remote(err, stream.Trailer())
		}
		all = append(all, info)
	}
}

// Reader reads the record batches of a flight. Next, RecordBatch and Err are arrow-go's; Release ends
// the stream, also before its end.
type Reader struct {
	*arrowflight.Reader
	stream arrowflight.FlightService_DoGetClient
	cancel context.CancelFunc
}

// Err is why Next returned false: nil at the end of the stream.
func (r *Reader) Err() error {
	err := r.Reader.Err()
	if err == nil {
		return nil
	}
	return remote(err, r.stream.Trailer())
}

// Release gives up the stream.
func (r *Reader) Release() {
	r.cancel()
	r.Reader.Release()
}

// Get reads a flight's record batches inline: a row for each index of the leading axis, with further
// axes as fixed-size lists. options are for arrow-go's reader, such as ipc.WithAllocator.
//
// A strait.RemoteError with FLIGHT_NOT_FOUND says that there is no such flight, one with
// INLINE_TOO_LARGE that a row is too long for a message and has to be mapped.
func (c *Client) Get(ctx context.Context, name string, options ...ipc.Option) (*Reader, error) {
	info, err := c.Info(ctx, name)
	if err != nil {
		return nil, err
	}
	if len(info.Endpoint) != 1 {
		return nil, fmt.Errorf("strait: %w: flight %q has %d endpoints", strait.ErrProtocol, name, len(info.Endpoint))
	}
	ctx, cancel := context.WithCancel(ctx)
	stream, err := c.DoGet(ctx, info.Endpoint[0].Ticket)
	if err != nil {
		cancel()
		return nil, err
	}
	reader, err := arrowflight.NewRecordReader(stream, options...)
	if err != nil {
		cancel()
		return nil, remote(err, stream.Trailer())
	}
	return &Reader{reader, stream, cancel}, nil
}

// Put sends record batches, which the host copies once into one segment, and gives them a name;
// replace takes the name from the flight that has it. Columns are of numbers or fixed-size lists of
// numbers, without nulls. It returns what a client on the same machine can map; over TCP that is nothing.
//
// A strait.RemoteError with BAD_TENSOR names the column that is not of such a kind.
func (c *Client) Put(ctx context.Context, name string, records array.RecordReader, replace bool) (strait.Mapping, error) {
	// Ends the stream on every path.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if replace {
		ctx = metadata.AppendToOutgoingContext(ctx, replaceKey, "true")
	}
	stream, err := c.DoPut(ctx)
	if err != nil {
		return strait.Mapping{}, err
	}
	sent := send(stream, name, records)
	// A send that was refused says EOF; the answer says why.
	if sent != nil && !errors.Is(sent, io.EOF) {
		return strait.Mapping{}, sent
	}
	result, err := stream.Recv()
	if err != nil {
		return strait.Mapping{}, remote(err, stream.Trailer())
	}
	if len(result.AppMetadata) == 0 {
		// Over TCP there is nothing to map.
		return strait.Mapping{}, nil
	}
	return mapping(result.AppMetadata)
}

func send(stream arrowflight.FlightService_DoPutClient, name string, records array.RecordReader) error {
	writer := arrowflight.NewRecordWriter(stream, ipc.WithSchema(records.Schema()))
	writer.SetFlightDescriptor(path(name))
	for records.Next() {
		if err := sendParts(writer, records.RecordBatch()); err != nil {
			return errors.Join(err, writer.Close())
		}
	}
	// Without a batch it is this that sends the schema.
	return errors.Join(records.Err(), writer.Close(), stream.CloseSend())
}

// sendParts cuts a batch into messages.
func sendParts(writer *arrowflight.Writer, batch arrow.RecordBatch) error {
	rows := batch.NumRows()
	part := max(rows, 1)
	if bytes := util.TotalRecordSize(batch); bytes > messageBytes && rows > 1 {
		part = max(messageBytes/max(bytes/rows, 1), 1)
	}
	for from := int64(0); ; from += part {
		slice := batch.NewSlice(min(from, rows), min(from+part, rows))
		err := writer.Write(slice)
		slice.Release()
		if err != nil || from+part >= rows {
			return err
		}
	}
}

// Mapping is what a client on the host's machine needs to map a flight.
//
// ErrFar says that the host offers none.
func (c *Client) Mapping(ctx context.Context, name string) (strait.Mapping, error) {
	info, err := c.Info(ctx, name)
	if err != nil {
		return strait.Mapping{}, err
	}
	for _, endpoint := range info.Endpoint {
		if len(endpoint.AppMetadata) > 0 {
			return mapping(endpoint.AppMetadata)
		}
	}
	return strait.Mapping{}, fmt.Errorf("strait: %w: flight %q", ErrFar, name)
}

func mapping(text []byte) (strait.Mapping, error) {
	var m strait.Mapping
	if err := json.Unmarshal(text, &m); err != nil {
		return m, fmt.Errorf("strait: %w: a malformed mapping: %w", strait.ErrProtocol, err)
	}
	return m, nil
}

// Fetch maps a flight that was found through Flight: the same pages as everybody's, no copy. local is
// a client of the flight's host.
//
// The error is ErrFar if local's host is not the flight's.
func (c *Client) Fetch(ctx context.Context, local *strait.Client, name string) (*strait.Tensor, error) {
	m, err := c.Mapping(ctx, name)
	if err != nil {
		return nil, err
	}
	if host := local.Welcome().HostID; m.HostID != host {
		return nil, fmt.Errorf("strait: %w: flight %q is on host %s (%s), the local client's is %s", ErrFar, name, m.HostID, m.Socket, host)
	}
	return local.Fetch(ctx, name)
}
