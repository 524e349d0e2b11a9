package strait

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"time"
)

// Input is what goes into a kernel or under a name: a *Tensor or TensorOf (no copy, but for a small result), a
// Name, an *Adopted, or a Slice, Scalar or Raw (one copy).
type Input interface {
	// input is how the call names it, and what to do once that is answered or given up. What is small goes along.
	// Without a call it is for Prepare: nothing goes along, and the host keeps it for longer than that.
	input(ctx context.Context, c *Client, call *invokeRequest) (any, func(answered bool), error)
	// tensor is what PUBLISH can name, and whether the caller is to release it.
	tensor(ctx context.Context, c *Client, name string) (*Tensor, bool, error)
	// elements is what a call of a Prepared brings. Unless it is nil, the segment they are in is to be dropped.
	elements() (Copied, *segment, error)
}

// Inputs of a kernel by port.
type Inputs map[string]Input

// Name is a flight as an input: "x", or "x#tensor" if it has several.
type Name string

func (n Name) input(context.Context, *Client, *invokeRequest) (any, func(bool), error) {
	return string(n), nothing, checkText("a flight's name", string(n))
}

func (n Name) tensor(context.Context, *Client, string) (*Tensor, bool, error) {
	return nil, false, argumentError("%q is a flight already; Fetch it and publish that", string(n))
}

func (n Name) elements() (Copied, *segment, error) {
	return Copied{}, nil, notBrought("the flight %q", string(n))
}

// notBrought is for what is no elements.
func notBrought(format string, arguments ...any) error {
	return argumentError("%s does not go into a call of what is prepared, which brings elements: a Slice, Scalar, Raw or Tensor. "+
		"What is the same for all calls goes into Prepare", fmt.Sprintf(format, arguments...))
}

// nothing is to be done for an input that is only named.
func nothing(bool) {}

func (t *Tensor) input(ctx context.Context, c *Client, call *invokeRequest) (any, func(bool), error) {
	h, err := t.begin()
	if err != nil {
		return nil, nil, err
	}
	done := func(bool) { h.segment.drop() }
	if err := c.usable(h); err != nil {
		done(false)
		return nil, nil, err
	}
	if h.segment.lease == 0 {
		defer done(false)
		return h.copied().input(ctx, c, call)
	}
	asked := segmentInput{Segment: h.segment.mapping.Segment}
	if len(h.segment.mapping.Tensors) > 1 {
		asked.Tensor = h.place.Name
	}
	return asked, done, nil
}

func (t *Tensor) tensor(ctx context.Context, c *Client, _ string) (*Tensor, bool, error) {
	h, err := t.begin()
	if err != nil {
		return nil, false, err
	}
	defer h.segment.drop()
	if h.segment.lease != 0 {
		return t, false, nil
	}
	if err := c.usable(h); err != nil {
		return nil, false, err
	}
	return h.copied().tensor(ctx, c, h.place.Name)
}

func (t *Tensor) elements() (Copied, *segment, error) {
	h, err := t.begin()
	if err != nil {
		return Copied{}, nil, err
	}
	return h.copied(), h.segment, nil
}

// copied is the elements of a tensor, for a copy.
func (h *handle) copied() Copied {
	return Copied{dtype: h.place.DType, shape: h.place.Shape, bytes: h.segment.bytes(h)}
}

func (a *Adopted) input(_ context.Context, c *Client, _ *invokeRequest) (any, func(bool), error) {
	switch {
	case a.released.Load():
		return nil, nil, fmt.Errorf("strait: %w: an adopted file", ErrReleased)
	case a.conn != c.conn:
		return nil, nil, argumentError("an adopted file belongs to another client")
	}
	return segmentInput{Segment: a.mapping.Segment}, nothing, a.conn.leaseError(a.lease)
}

func (a *Adopted) tensor(context.Context, *Client, string) (*Tensor, bool, error) {
	return nil, false, argumentError("an adopted file gets its name by Adopt")
}

func (a *Adopted) elements() (Copied, *segment, error) {
	return Copied{}, nil, notBrought("an adopted file")
}

// CallOption changes one call: Param, PublishAs, Replace, Seal, Deadline, LeaseFor, WithoutResults,
// InlineBytes, Limits, Threads, Verify, IdempotencyKey.
type CallOption interface {
	call(*invokeRequest) error
}

// PrepareOption changes one Prepare or PrepareStream: Param, Deadline, Limits; Ring for Prepare, ChannelOptions for PrepareStream.
type PrepareOption interface {
	prepare(*prepareRequest) error
}

// KernelOption changes one Call or Prepare: Param, Deadline, Limits.
type KernelOption interface {
	CallOption
	PrepareOption
}

// PublishOption changes one Publish or Adopt: Replace.
type PublishOption interface {
	publish(*publishRequest)
}

// FetchOption changes one Fetch or FetchAll: LeaseFor.
type FetchOption interface {
	fetch(*mapRequest)
}

type callOption func(*invokeRequest) error

func (o callOption) call(r *invokeRequest) error { return o(r) }

type kernelOption func(*kernelRequest) error

func (o kernelOption) call(r *invokeRequest) error     { return o(&r.kernelRequest) }
func (o kernelOption) prepare(r *prepareRequest) error { return o(&r.kernelRequest) }

func plainOption(set func(*invokeRequest)) CallOption {
	return callOption(func(r *invokeRequest) error {
		set(r)
		return nil
	})
}

// PublishAs gives an output a name.
func PublishAs(port, name string) CallOption {
	return callOption(func(r *invokeRequest) error {
		if r.Publish == nil {
			r.Publish = map[string]string{}
		}
		r.Publish[port] = name
		return checkText("a flight's name", name)
	})
}

// Replacing is what Replace returns: an option of Call, Publish and Adopt.
type Replacing struct{}

func (Replacing) call(r *invokeRequest) error { r.Replace = true; return nil }
func (Replacing) publish(r *publishRequest)   { r.Replace = true }

// Replace takes a name from the flight that has it.
func Replace() Replacing { return Replacing{} }

// Leasing is what LeaseFor returns: an option of Call, Fetch and FetchAll.
type Leasing time.Duration

func (l Leasing) call(r *invokeRequest) error { r.LeaseMS = milliseconds(time.Duration(l)); return nil }
func (l Leasing) fetch(r *mapRequest)         { r.LeaseMS = milliseconds(time.Duration(l)) }

// LeaseFor sets the lifetime of the leases that come with the outputs or the flight.
func LeaseFor(life time.Duration) Leasing { return Leasing(life) }

// Seal has the outputs sealed permanently, so that not even the host can write to them again. Each time
// they cost the host new memory.
func Seal() CallOption { return plainOption(func(r *invokeRequest) { r.Seal = true }) }

// Deadline ends the kernel after this time, counted by the host from when it receives the call, including the wait for
// a worker. By default it is the context's deadline, and without one the host's default. The
// Call fails with ErrArgument unless after is more than 0. With Prepare it applies to each call, and no context's deadline
// takes its place.
func Deadline(after time.Duration) KernelOption {
	return kernelOption(func(r *kernelRequest) error {
		if after <= 0 {
			return argumentError("a deadline of %s; it must be more than 0, or left out for the host's default", after)
		}
		r.DeadlineMS = milliseconds(after)
		return nil
	})
}

// WithoutResults maps no outputs: every one of them must be published.
func WithoutResults() CallOption {
	return plainOption(func(r *invokeRequest) { r.Map, r.InlineBytes = new(bool), 0 })
}

// InlineBytes sets the size of the largest output that comes in the reply, which is a copy on this side but the
// quicker way for a small one. By default, and at most, it is Welcome.InlineBytes. With 0 all outputs are segments:
// for one that is to be published or go into many calls without a copy. Outputs of a call with PublishAs or Seal
// always are. The Call fails with ErrArgument if most is less than 0.
func InlineBytes(most int64) CallOption {
	return callOption(func(r *invokeRequest) error {
		if most < 0 {
			return argumentError("outputs of at most %d bytes in the reply; 0 asks for none", most)
		}
		r.InlineBytes = most
		return nil
	})
}

// Limits of one call, or of each prepared one, each lower than the host's own; 0 keeps the host's.
type Limits struct {
	GuestBytes  int64 `json:"guest_bytes,omitempty"`
	WindowBytes int64 `json:"window_bytes,omitempty"`
	ResultBytes int64 `json:"result_bytes,omitempty"`
	LogBytes    int64 `json:"log_bytes,omitempty"`
}

func (l Limits) call(r *invokeRequest) error     { r.Limits = &l; return nil }
func (l Limits) prepare(r *prepareRequest) error { r.Limits = &l; return nil }

// Threads cuts the rows of a call into n slices, 1 to 64, if the kernel can be cut; without it into as many as are
// worth it. The results are the same for any number. Result.Slices tells how many there were.
func Threads(n int) CallOption {
	return callOption(func(r *invokeRequest) error {
		if n < 1 || n > 64 {
			return argumentError("%d threads; ask for 1 to 64", n)
		}
		r.Threads = n
		return nil
	})
}

// Verify asks the host which pages the kernel saw: Result.Pages.
func Verify() CallOption { return plainOption(func(r *invokeRequest) { r.Verify = true }) }

// IdempotencyKey lets a repeat of the call within a minute have the same results without another
// run. It has the form of a request id. A RemoteError with IDEMPOTENCY_KEY_REUSED says that the key
// came with a different request before: each call that may be repeated needs a key of its own.
func IdempotencyKey(key string) CallOption {
	return callOption(func(r *invokeRequest) error {
		if !isID(key) {
			return argumentError("idempotency key %q; it needs 1 to 64 characters from A-Z a-z 0-9 . _ : -", key)
		}
		r.IdempotencyKey = key
		return nil
	})
}

// Note is a kernel's note on a call.
type Note struct {
	Key  string `json:"key"`
	Text string `json:"text"`
}

// PortPages says which memory file a kernel saw at a port.
type PortPages struct {
	Port   string `json:"port"`
	Device uint64 `json:"device"`
	Inode  uint64 `json:"inode"`
}

// Timing is where a call's time went, on the host's side.
type Timing struct {
	Queue, Instantiate, Open, Reserve, MoveIn, Run, MoveOut, Total time.Duration
}

// Result is what a kernel gave back.
type Result struct {
	// Tensors are the outputs in the kernel's order, named as their ports. Empty for WithoutResults.
	Tensors []*Tensor
	// Published is the outputs that got a name.
	Published []Flight
	Notes     []Note
	// CopiedBytes of this call's tensors, by the host: into and out of the kernel's memory, for those that were not
	// moved there.
	CopiedBytes int64
	// Pages is empty without Verify.
	Pages []PortPages
	// MinorFaults of the host's process meanwhile.
	MinorFaults int64
	// Slices of its rows that it ran in; 0: it ran whole.
	Slices int64
	Timing Timing
	// Stages of a pipeline, in order.
	Stages []Stage
	// RequestID names this call in the host's log.
	RequestID string
}

// Tensor is the output of a port. If there is none, the tensor it returns fails wherever it is used.
func (r *Result) Tensor(port string) *Tensor { return ofPort(r.Tensors, port) }

// ofPort is the tensor of a port, or one that fails wherever it is used.
func ofPort(tensors []*Tensor, port string) *Tensor {
	ports := make([]string, 0, len(tensors))
	for _, t := range tensors {
		if t.Name() == port {
			return t
		}
		ports = append(ports, t.Name())
	}
	return missingTensor(argumentError("no output %q; there are %q", port, ports))
}

// Release gives all outputs back. To keep one of them, release the others one by one instead.
func (r *Result) Release() {
	if r != nil {
		releaseAll(r.Tensors)
	}
}

// Call runs a kernel ("zscore", or "plugin/zscore" if two plugins have one), or a pipeline ("clip(lo=0) | cast(to=int8)"), and
// waits for its results, which are to be released.
//
// When ctx ends, the kernel is cancelled, even while it waits for a worker; the error is then both ctx's and
// the host's RemoteError with CANCELLED. Nothing is sent if ctx is already over. Call returns when the kernel
// is over, so that inputs can be written again, or soon if the host does not answer at all. Results that
// arrived nevertheless are returned.
//
// The error is a RemoteError if the host refuses or the kernel fails; ErrLeaseExpired or ErrReleased
// if an input can no longer be used; ErrDisconnected if the connection ended.
func (c *Client) Call(ctx context.Context, kernel string, inputs Inputs, options ...CallOption) (*Result, error) {
	return c.invoke(ctx, &invokeRequest{kernelRequest: kernelRequest{Kernel: kernel}}, inputs, options)
}

// invoke runs what is asked.
func (c *Client) invoke(ctx context.Context, asked *invokeRequest, inputs Inputs, options []CallOption) (*Result, error) {
	asked.LeaseMS, asked.InlineBytes = milliseconds(c.lease), c.welcome.InlineBytes
	for _, option := range options {
		if err := option.call(asked); err != nil {
			return nil, err
		}
	}
	uses, err := c.say(ctx, inputs, &asked.kernelRequest, asked)
	answered := false
	defer func() { uses.done(answered) }()
	if err != nil {
		return nil, err
	}
	// A forgotten input must not be found before its kernel ran.
	defer runtime.KeepAlive(inputs)
	if deadline, limited := ctx.Deadline(); limited && asked.DeadlineMS == 0 {
		// The host's clock ends it even if this process does not live to cancel it.
		asked.DeadlineMS = max(milliseconds(time.Until(deadline)), 1)
		if c.welcome.DeadlineMSMax > 0 {
			asked.DeadlineMS = min(asked.DeadlineMS, c.welcome.DeadlineMSMax)
		}
	}
	c.conn.calls.Add(1)
	var reply invokeReply
	came, err := c.conn.request(ctx, opInvoke, asked, beside{payload: asked.payload}, &reply)
	answered = err == nil || errors.As(err, new(*RemoteError))
	if err != nil {
		return nil, err
	}
	return c.results(&reply, came)
}

// uses is what is to be done once the inputs of a request were used.
type uses []func(answered bool)

func (u uses) done(answered bool) {
	for _, done := range u {
		done(answered)
	}
}

// say puts the kernel's inputs into what is asked; call is nil for Prepare. What it returns is to be done, also when it fails.
func (c *Client) say(ctx context.Context, inputs Inputs, asked *kernelRequest, call *invokeRequest) (uses, error) {
	if err := checkText("a kernel's name", asked.Kernel); err != nil {
		return nil, err
	}
	asked.Inputs = make(map[string]any, len(inputs))
	var all uses
	for port, input := range inputs {
		if input == nil {
			return all, argumentError("input %q is nil", port)
		}
		said, done, err := input.input(ctx, c, call)
		if err != nil {
			return all, fmt.Errorf("input %q: %w", port, err)
		}
		all = append(all, done)
		asked.Inputs[port] = said
	}
	return all, nil
}

// results takes over the descriptors, the payload and the leases of a reply to INVOKE.
func (c *Client) results(reply *invokeReply, came beside) (*Result, error) {
	r := &Result{
		Notes:       reply.Notes,
		CopiedBytes: reply.CopiedBytes,
		Pages:       reply.Pages,
		MinorFaults: reply.MinorFaults,
		Slices:      reply.Slices,
		Timing: Timing{
			Queue:       seconds(reply.Seconds.Queue),
			Instantiate: seconds(reply.Seconds.Instantiate),
			Open:        seconds(reply.Seconds.Open),
			Reserve:     seconds(reply.Seconds.Reserve),
			MoveIn:      seconds(reply.Seconds.MoveIn),
			Run:         seconds(reply.Seconds.Run),
			MoveOut:     seconds(reply.Seconds.MoveOut),
			Total:       seconds(reply.Seconds.Total),
		},
		Stages:    stages(reply.Stages),
		RequestID: reply.RequestID,
	}
	var failed error
	for i := range reply.Results {
		result := &reply.Results[i]
		if failed == nil {
			failed = result.check(came.fds)
		}
		if failed != nil {
			if result.Lease != 0 {
				c.conn.later([]uint64{result.Lease}, nil)
			}
			continue
		}
		if result.Name != "" {
			r.Published = append(r.Published, Flight{result.Name, *result.Mapping})
		}
		var tensors []*Tensor
		tensors, failed = c.conn.output(result, came)
		r.Tensors = append(r.Tensors, tensors...)
	}
	closeAll(slices.DeleteFunc(came.fds, func(fd int) bool { return fd < 0 }))
	if failed != nil {
		r.Release()
		return nil, failed
	}
	return r, nil
}

// check says whether an output came in one way, with what belongs to that.
func (r *resultEntry) check(fds []int) error {
	switch {
	case r.Mapping == nil && r.Inline == nil:
		return protocolError("output %q has neither a mapping nor bytes in the payload", r.Port)
	case r.Mapping != nil && r.Inline != nil:
		return protocolError("output %q has both a mapping and bytes in the payload", r.Port)
	case r.Inline != nil && (r.Lease != 0 || r.Name != "" || r.FD != nil):
		return protocolError("output %q has bytes in the payload, which need no lease, name or descriptor", r.Port)
	case r.Lease != 0 && (r.FD == nil || *r.FD < 0 || *r.FD >= len(fds) || fds[*r.FD] < 0):
		return protocolError("output %q has a lease but no descriptor of its own", r.Port)
	}
	return nil
}

// output makes the tensor of an output that was checked; none of one that was only published. What it takes of the
// descriptors is -1 afterwards.
func (c *conn) output(result *resultEntry, came beside) ([]*Tensor, error) {
	switch {
	case result.Inline != nil:
		return c.unframe(result.Port, result.Inline, came.payload)
	case result.Lease == 0:
		return nil, nil
	}
	fd := came.fds[*result.FD]
	came.fds[*result.FD] = -1
	tensors, err := c.open(&mappedReply{*result.Mapping, result.Lease, result.ExpiresMS}, fd, false)
	if err == nil && (len(tensors) != 1 || tensors[0].Name() != result.Port) {
		err = protocolError("output %q is a segment with %d tensors and not the one of that name", result.Port, len(tensors))
	}
	return tensors, err
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }
