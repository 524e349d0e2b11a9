package strait

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"strait/internal/driver"
)

// Version of this client, as the host's log shows it.
const Version = "0.1.0"

// Client is a connection to a host. Any number of goroutines may use it at once.
//
// It does not reconnect: leases and unpublished tensors end with their connection, so a silent new
// one would not have what the caller had.
type Client struct {
	conn    *conn
	welcome Welcome
	lease   time.Duration
	copies  copies
}

// Welcome is what the host said when the client connected.
type Welcome struct {
	HostID      string `json:"host_id"`
	HostVersion string `json:"host_version"`
	Session     string `json:"session"`
	// Principal is whose flights this client sees: uid:1000.
	Principal string `json:"principal"`
	Directory string `json:"directory"`
	// Flight is where the host serves Arrow Flight.
	Flight string `json:"flight"`
	// MoveMinBytes is the size from which tensors are moved into a kernel and not copied.
	MoveMinBytes int64 `json:"move_min_bytes"`
	// InlineBytes is the size up to which a Slice, and a result, travels in the frame of a call and has no
	// segment; 0: none does.
	InlineBytes       int64 `json:"inline_bytes"`
	LeaseMSDefault    int64 `json:"lease_ms_default"`
	LeaseMSMax        int64 `json:"lease_ms_max"`
	DeadlineMSDefault int64 `json:"deadline_ms_default"`
	DeadlineMSMax     int64 `json:"deadline_ms_max"`
}

type dialOptions struct {
	renew     bool
	lease     time.Duration
	name      string
	log       *slog.Logger
	copyBytes int64
	spin      time.Duration
	// What is known of the host's own end, once the connection is over.
	epitaph func() string
	// For a host that is not on this machine.
	far driver.Options
}

func defaultOptions() dialOptions {
	return dialOptions{renew: true, name: "strait-go/" + Version, log: slog.Default(), copyBytes: 256 << 20,
		epitaph: func() string { return "" }, far: driver.Options{Retry: retryDefault}}
}

// DialOption changes how a client behaves.
type DialOption func(*dialOptions)

// WithoutRenewal leaves leases alone: each ends when it expires, unless Tensor.Renew is called in
// time. By default they are renewed in the background at half their lifetime.
func WithoutRenewal() DialOption { return func(o *dialOptions) { o.renew = false } }

// WithLease asks for leases of this lifetime instead of the host's default.
func WithLease(life time.Duration) DialOption { return func(o *dialOptions) { o.lease = life } }

// WithName sets the name by which the host's log knows this client.
func WithName(name string) DialOption { return func(o *dialOptions) { o.name = name } }

// WithLogger sets where the client logs what no caller is told: a tensor forgotten without Release,
// a lease that was not renewed. The default is slog.Default.
func WithLogger(log *slog.Logger) DialOption { return func(o *dialOptions) { o.log = log } }

// WithCopyCache sets how many bytes of segments are kept for inputs that have to be copied (Slice),
// so that a repeated call finds warm memory; 0 keeps none. The default is 256 MiB.
func WithCopyCache(bytes int64) DialOption { return func(o *dialOptions) { o.copyBytes = bytes } }

// WithSpin has calls of what is prepared look for their reply for that long, at most 50 ms, before they sleep: a processor is kept
// busy, and a wake-up saved. The default is not to look.
func WithSpin(spin time.Duration) DialOption {
	return func(o *dialOptions) { o.spin = min(max(spin, 0), spinMax) }
}

// Dial connects to the host whose directory address names (unix:///run/strait), or for an empty
// address to the one that Directory finds. ctx is for dialling only.
//
// The error is ErrNoHost if nobody answers, ErrArgument for a malformed address, a RemoteError
// if the host speaks another version.
func Dial(ctx context.Context, address string, options ...DialOption) (*Client, error) {
	directory, err := Directory(address)
	if err != nil {
		return nil, err
	}
	var dialer net.Dialer
	path := filepath.Join(directory, dataSocket)
	socket, err := dialer.DialContext(ctx, "unixpacket", path)
	if err != nil {
		if ctx.Err() != nil {
			return nil, ended(ctx)
		}
		return nil, fmt.Errorf("strait: %w at %s: %w; start one with `strait serve`", ErrNoHost, path, err)
	}
	return greet(ctx, socket.(*net.UnixConn), options)
}

func greet(ctx context.Context, socket *net.UnixConn, options []DialOption) (*Client, error) {
	o := defaultOptions()
	for _, option := range options {
		option(&o)
	}
	conn, err := newConn(socket, &o)
	if err != nil {
		return nil, err
	}
	c := &Client{conn: conn, lease: o.lease}
	c.copies.bytesMax = o.copyBytes
	hello := &helloRequest{Protocol: protocolVersion, Client: o.name}
	if err := c.conn.ask(ctx, opHello, hello, &c.welcome); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// Close ends the connection. Requests under way fail with ErrDisconnected, kernels are cancelled and
// names stay. Slices of mapped tensors stay valid until their Release.
func (c *Client) Close() error {
	c.copies.clear()
	c.conn.finish(fmt.Errorf("strait: %w: it was closed here", ErrDisconnected))
	return nil
}

// Welcome is what the host said when the client connected.
func (c *Client) Welcome() Welcome { return c.welcome }

// Draining says when the host ends, once it has announced that; it takes no more calls then.
func (c *Client) Draining() (time.Time, bool) {
	c.conn.mu.Lock()
	defer c.conn.mu.Unlock()
	return c.conn.drain, !c.conn.drain.IsZero()
}

// Ping asks whether the host is there.
func (c *Client) Ping(ctx context.Context) error {
	return c.conn.ask(ctx, opPing, &emptyRequest{}, nil)
}

// Create makes tensors to fill in one segment: for tensors of an element type that Go lacks, or
// several that are to be published under one name. All must have the same leading size.
func (c *Client) Create(ctx context.Context, specs ...Spec) ([]*Tensor, error) {
	if len(specs) == 0 {
		return nil, argumentError("Create without a tensor to make")
	}
	// The wire's empty shape is a list and not null.
	asked := make([]Spec, len(specs))
	for i, spec := range specs {
		if _, err := byteSize(spec.DType, spec.Shape); err != nil {
			return nil, argumentError("tensor %q: %w", spec.Name, err)
		}
		if err := checkText("a tensor's name", spec.Name); err != nil {
			return nil, err
		}
		asked[i] = Spec{spec.Name, spec.DType, append([]int{}, spec.Shape...)}
	}
	var made mappedReply
	came, err := c.conn.request(ctx, opCreate, &createRequest{Tensors: asked, LeaseMS: milliseconds(c.lease)}, beside{}, &made)
	if err != nil {
		return nil, err
	}
	tensors, err := c.open(&made, came.fds, true)
	if err == nil && !slices.EqualFunc(asked, made.Mapping.Tensors, Spec.is) {
		releaseAll(tensors)
		return nil, protocolError("a segment with %d tensors that are not the %d that were asked for", len(tensors), len(specs))
	}
	return tensors, err
}

func (s Spec) is(place Place) bool {
	return s.Name == place.Name && s.DType == place.DType && slices.Equal(s.Shape, place.Shape)
}

// open is conn.open for a reply that must have one descriptor.
func (c *Client) open(reply *mappedReply, fds []int, write bool) ([]*Tensor, error) {
	err := reply.checkLease()
	if err == nil && len(fds) != 1 {
		err = protocolError("%d descriptors beside a reply that has one", len(fds))
	}
	if err != nil {
		closeAll(fds)
		c.conn.later([]uint64{reply.Lease}, nil)
		return nil, err
	}
	return c.conn.open(reply, fds[0], write)
}

func releaseAll(tensors []*Tensor) {
	for _, t := range tensors {
		t.Release()
	}
}

// Fetch maps a flight of one tensor, or one tensor of it ("flight#tensor"), read-only. Nothing is
// copied: the slice that As lends is over the same pages for everyone.
//
// A RemoteError with FLIGHT_NOT_FOUND says that there is no such flight.
func (c *Client) Fetch(ctx context.Context, name string, options ...FetchOption) (*Tensor, error) {
	flight, tensor, named := strings.Cut(name, "#")
	tensors, err := c.FetchAll(ctx, flight, options...)
	if err != nil {
		return nil, err
	}
	if !named && len(tensors) == 1 {
		return tensors[0], nil
	}
	var found *Tensor
	names := make([]string, 0, len(tensors))
	for _, t := range tensors {
		names = append(names, t.Name())
		if named && t.Name() == tensor && found == nil {
			found = t
		} else {
			t.Release()
		}
	}
	if found != nil {
		return found, nil
	}
	return nil, argumentError("flight %q has the tensors %q; name one of them as \"%s#TENSOR\"", flight, names, flight)
}

// FetchAll maps all tensors of a flight, read-only, in their order. Each has to be released.
func (c *Client) FetchAll(ctx context.Context, name string, options ...FetchOption) ([]*Tensor, error) {
	asked := mapRequest{Name: name, LeaseMS: milliseconds(c.lease)}
	for _, option := range options {
		option.fetch(&asked)
	}
	if err := checkText("a flight's name", name); err != nil {
		return nil, err
	}
	var mapped mappedReply
	came, err := c.conn.request(ctx, opMap, &asked, beside{}, &mapped)
	if err != nil {
		return nil, err
	}
	return c.open(&mapped, came.fds, false)
}

// Flight is a name and what it stands for.
type Flight struct {
	Name    string  `json:"name"`
	Mapping Mapping `json:"mapping"`
}

// Publish makes a tensor a flight: others find it by that name, and it outlives this client.
// A tensor that was made to be filled becomes read-only, at the same address, even if the host
// refuses the name. A Slice is copied. The other tensors of its segment become part of the flight.
//
// A RemoteError with NAME_TAKEN says that another flight has the name; see Replace.
func (c *Client) Publish(ctx context.Context, name string, t Input, options ...PublishOption) (Flight, error) {
	asked := publishRequest{Name: name}
	for _, option := range options {
		option.publish(&asked)
	}
	if err := checkText("a flight's name", name); err != nil {
		return Flight{}, err
	}
	tensor, owned, err := t.tensor(ctx, c, name)
	if err != nil {
		return Flight{}, err
	}
	if owned {
		defer tensor.Release()
	}
	h, err := tensor.begin()
	if err != nil {
		return Flight{}, err
	}
	defer h.segment.drop()
	if err := c.usable(h); err != nil {
		return Flight{}, err
	}
	if err := h.segment.freeze(); err != nil {
		return Flight{}, err
	}
	asked.Segment = h.segment.mapping.Segment
	var published mappedReply
	if err := c.conn.ask(ctx, opPublish, &asked, &published); err != nil {
		return Flight{}, err
	}
	return Flight{name, published.Mapping}, nil
}

// usable says whether the host would take a tensor of this client.
func (c *Client) usable(h *handle) error {
	if h.segment.conn != c.conn {
		return argumentError("tensor %q belongs to another client; publish it there and use its name", h.place.Name)
	}
	return c.conn.leaseError(h.segment.lease)
}

// Adopted is a memory file of the caller's own that the host took over.
type Adopted struct {
	conn     *conn
	lease    uint64
	mapping  Mapping
	released atomic.Bool
}

// Adopt hands over a memory file (memfd_create) that is sealed as the protocol asks: against
// shrinking and growing, and against writing or future writing. Each place starts on a multiple of
// 65536 and has no holes. With a name it is published; that needs the seal against writing.
// The file may be closed afterwards.
//
// A RemoteError with BAD_SEGMENT has the reason why the host does not take it.
func (c *Client) Adopt(ctx context.Context, file *os.File, places []Place, name string, options ...PublishOption) (*Adopted, error) {
	named := publishRequest{Name: name}
	for _, option := range options {
		option.publish(&named)
	}
	if err := checkText("a flight's name", name); err != nil {
		return nil, err
	}
	asked := adoptRequest{Name: name, Replace: named.Replace, LeaseMS: milliseconds(c.lease)}
	for _, place := range places {
		place.Shape = append([]int{}, place.Shape...)
		asked.Tensors = append(asked.Tensors, place)
	}
	var adopted mappedReply
	raw, err := file.SyscallConn()
	if err != nil {
		return nil, argumentError("a file without a descriptor: %w", err)
	}
	var requestErr error
	err = raw.Control(func(fd uintptr) {
		var came beside
		came, requestErr = c.conn.request(ctx, opAdopt, &asked, beside{fds: []int{int(fd)}}, &adopted)
		closeAll(came.fds)
	})
	if err := errors.Join(err, requestErr); err != nil {
		return nil, err
	}
	if err := adopted.checkLease(); err != nil {
		return nil, err
	}
	c.conn.hold(adopted.Lease, duration(adopted.ExpiresMS))
	return &Adopted{conn: c.conn, lease: adopted.Lease, mapping: adopted.Mapping}, nil
}

// Mapping is what the host said about the file.
func (a *Adopted) Mapping() Mapping { return a.mapping }

// Release gives the lease back; a published file lives on. A second Release does nothing.
func (a *Adopted) Release() {
	if !a.released.Swap(true) {
		a.conn.release(a.lease)
	}
}

// Lookup is what a flight is, without mapping it.
func (c *Client) Lookup(ctx context.Context, name string) (Flight, error) {
	if err := checkText("a flight's name", name); err != nil {
		return Flight{}, err
	}
	var found mappedReply
	err := c.conn.ask(ctx, opLookup, &nameRequest{Name: name}, &found)
	return Flight{name, found.Mapping}, err
}

// List is the flights of this principal, sorted by name. One that comes or goes meanwhile may or
// may not be among them.
func (c *Client) List(ctx context.Context) ([]Flight, error) {
	var all []Flight
	asked := listRequest{}
	for {
		var page listReply
		if err := c.conn.ask(ctx, opList, &asked, &page); err != nil {
			return nil, err
		}
		all = append(all, page.Flights...)
		if !page.More {
			return all, nil
		}
		if len(page.Flights) == 0 || page.Flights[len(page.Flights)-1].Name <= asked.After {
			return nil, protocolError("a page of flights behind %q that says there are more and goes no further", asked.After)
		}
		asked.After = page.Flights[len(page.Flights)-1].Name
	}
}

// Delete removes a flight's name; its memory is freed when the last lease ends.
//
// A RemoteError with FLIGHT_NOT_FOUND says that there is no such flight.
func (c *Client) Delete(ctx context.Context, name string) error {
	if err := checkText("a flight's name", name); err != nil {
		return err
	}
	return c.conn.ask(ctx, opDrop, &nameRequest{Name: name}, nil)
}

// checkText refuses what JSON would silently change.
func checkText(what, text string) error {
	if !utf8.ValidString(text) {
		return argumentError("%s that is not UTF-8: %q", what, text)
	}
	return nil
}

// Kernel is one that the host has, with its documentation.
type Kernel struct {
	Name    string `json:"name"`
	Plugin  string `json:"plugin"`
	Version string `json:"version"`
	// Doc begins with a sentence on a line of its own.
	Doc        string      `json:"doc"`
	Inputs     []Port      `json:"inputs"`
	Outputs    []Port      `json:"outputs"`
	Parameters []Parameter `json:"parameters"`
	// Signature says which axes are equal, such as "(n),(k)->(m)"; empty: no rule.
	Signature string `json:"signature"`
	// SplitAxis is the axis along which the host may split the work; nil: none.
	SplitAxis *int `json:"split_axis"`
	// Combine is how the results of slices are put together: "none", "concatenate" or "tree".
	Combine string `json:"combine"`
	// BlockTree is set if Combine is "tree".
	BlockTree *BlockTree `json:"block_tree"`
	Streaming bool       `json:"streaming"`
	InPlace   bool       `json:"in_place"`
}

// BlockTree says how a reduction gives the same bits for any slicing: kernel Partials gives one row for each
// BlockRows rows, counted from row 0, and kernel Merge makes the result from all those rows.
type BlockTree struct {
	BlockRows uint64 `json:"block_rows"`
	Partials  string `json:"partials"`
	Merge     string `json:"merge"`
}

// Port is an input or an output of a kernel.
type Port struct {
	Name    string  `json:"name"`
	DTypes  []DType `json:"dtypes"`
	RankMin int     `json:"rank_min"`
	RankMax int     `json:"rank_max"`
	// Role is "data" or "mask".
	Role string `json:"role"`
	// Whole is an input that comes whole with every chunk and slice.
	Whole bool   `json:"whole"`
	Doc   string `json:"doc"`
}

// Parameter of a kernel.
type Parameter struct {
	Name string `json:"name"`
	// Kind is boolean, integer, real (rounded to float64), number (an integer or a float, as it was
	// written), axis (0-based, row-major), text, integers or reals (lists).
	Kind string `json:"kind"`
	// Default is nil if the caller must give the parameter. Its numbers are json.Number, so that
	// integers beyond 2^53 are exact; Param takes it as it is.
	Default any `json:"default"`
	// Minimum and Maximum are inclusive and exact; empty: there is none.
	Minimum json.Number `json:"minimum"`
	Maximum json.Number `json:"maximum"`
	// Choices are the allowed strings; empty allows any.
	Choices []string `json:"choices"`
	Doc     string   `json:"doc"`
}

// UnmarshalJSON reads the default's numbers as they are written, not as float64.
func (p *Parameter) UnmarshalJSON(text []byte) error {
	type plain Parameter
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.UseNumber()
	return decoder.Decode((*plain)(p))
}

// Kernels is what can be called, sorted by plugin and name.
func (c *Client) Kernels(ctx context.Context) ([]Kernel, error) {
	var all []Kernel
	asked := kernelsRequest{}
	for {
		var page kernelsReply
		if err := c.conn.ask(ctx, opKernels, &asked, &page); err != nil {
			return nil, err
		}
		all = append(all, page.Kernels...)
		if !page.More {
			return all, nil
		}
		before := asked.After
		if len(page.Kernels) > 0 {
			last := page.Kernels[len(page.Kernels)-1]
			asked.After = last.Plugin + "/" + last.Name
		}
		if asked.After == before {
			return nil, protocolError("a page of kernels behind %q that says there are more and goes no further", before)
		}
	}
}
