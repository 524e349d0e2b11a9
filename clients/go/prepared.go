package strait

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"slices"

	"strait/internal/shm"
)

// Of one tensor, at the beginning of a payload: eight sizes, those beyond its axes 0.
const sizesBytes = 8 * rankMax

// Brought stands for an input whose elements each call of a Prepared brings. Each and EachOf make it.
type Brought struct {
	dtype DType
	shape []int
}

// Each is an input of that type and shape, at most: what a call brings may be smaller along every axis. A chunk of a Stream
// may have any number of rows.
func Each[T Element](shape ...int) Brought { return EachOf(DTypeOf[T](), shape...) }

// EachOf is Each for element types that Go lacks.
func EachOf(dtype DType, shape ...int) Brought { return Brought{dtype, slices.Clone(shape)} }

func (b Brought) input(_ context.Context, _ *Client, call *invokeRequest) (any, func(bool), error) {
	if call != nil {
		return nil, nil, argumentError("an Each has no elements; it goes into Prepare")
	}
	_, err := byteSize(b.dtype, b.shape)
	if err != nil {
		err = argumentError("%w", err)
	}
	// The wire's empty shape is a list and not null.
	return specInput{b.dtype, append([]int{}, b.shape...)}, nothing, err
}

func (b Brought) tensor(context.Context, *Client, string) (*Tensor, bool, error) {
	return nil, false, argumentError("an Each has no elements; it goes into Prepare")
}

func (b Brought) elements() (Copied, *segment, error) {
	return Copied{}, nil, notBrought("an Each")
}

// Prepared is a kernel that the host has checked, opened and bound once, to be called again and again on small tensors: a
// call takes a fraction of a Client.Call's time. It has a socket of its own, and a thread and memory in the host, until
// Close, or that of its Client, or until the garbage collector finds it.
//
// Any number of goroutines may use it at once; its calls run one after another. Prepare the kernel several times to have
// calls side by side. A call occupies a thread of the operating system while it waits.
type Prepared struct {
	replies
	line *line
	// By it the host is told to end a call.
	number    uint64
	requestID string
	inputs    []preparedPlace

	// Held by the call that is under way, and so are the replies and all that follows. A channel, so that a context can end
	// the wait for it.
	calling  chan struct{}
	sequence uint32
	// The header and the sizes of the inputs; the elements follow.
	head   []byte
	packet [][]byte
}

// zeros are between tensors and behind them.
var zeros [payloadBytesMax]byte

// Prepare makes a kernel ready for many calls. An input is an Each, whose elements every call brings, or anything that goes
// into Client.Call, which is then the same for all calls: it is kept for as long as the Prepared, whatever becomes of its
// name, and must not be written to meanwhile. A Slice is copied into shared memory.
//
// The inputs that a call brings have at most 128 KiB together, and so do its outputs; otherwise Prepare fails with a RemoteError.
//
// ctx is for preparing only. When it ends, preparing is cancelled. Its request id (WithRequestID) is that of all calls.
func (c *Client) Prepare(ctx context.Context, kernel string, inputs Inputs, options ...PrepareOption) (*Prepared, error) {
	return c.prepare(ctx, &prepareRequest{kernelRequest: kernelRequest{Kernel: kernel}}, inputs, options)
}

func (c *Client) prepare(ctx context.Context, asked *prepareRequest, inputs Inputs, options []PrepareOption) (*Prepared, error) {
	for _, option := range options {
		if err := option.prepare(asked); err != nil {
			return nil, err
		}
	}
	switch {
	case asked.Channel != nil && !asked.Stream:
		return nil, argumentError("channel %q takes what comes of a stream; prepare it by PrepareStream", asked.Channel.Name)
	case asked.Ring && asked.Stream:
		return nil, argumentError("chunks do not go through a Ring, which is for Prepare")
	}
	uses, err := c.say(ctx, inputs, &asked.kernelRequest, nil)
	// By then the host has what it keeps.
	defer func() { uses.done(true) }()
	if err != nil {
		return nil, err
	}
	defer runtime.KeepAlive(inputs)
	var reply prepareReply
	came, err := c.conn.request(ctx, opPrepare, asked, beside{}, &reply)
	if err != nil {
		return nil, err
	}
	if err := reply.check(asked, len(came.fds)); err != nil {
		closeAll(came.fds)
		return nil, err
	}
	socket, err := c.conn.newLine(came.fds, &reply)
	if err != nil {
		return nil, err
	}
	return newPrepared(socket, asked.Stream, &reply), nil
}

// check holds the host's word against what was asked, and against itself.
func (r *prepareReply) check(asked *prepareRequest, fds int) error {
	expected := 1
	if asked.Ring {
		expected = 2
	}
	if fds != expected || (r.Ring != nil) != asked.Ring {
		return protocolError("%d descriptors beside the OK to PREPARE, which has %d, and the place of a ring: %t, where %t was asked for",
			fds, expected, r.Ring != nil, asked.Ring)
	}
	brought := 0
	for _, said := range asked.Inputs {
		if _, brings := said.(specInput); brings {
			brought++
		}
	}
	ports := map[string]bool{}
	for _, place := range r.Inputs {
		ports[place.Port] = true
		said, brings := asked.Inputs[place.Port].(specInput)
		if !brings || place.DType != said.DType || !slices.Equal(place.Shape, said.Shape) {
			return protocolError("prepared input %q is %s, which was not asked for", place.Port, spec(place.DType, place.Shape))
		}
	}
	if len(r.Inputs) != brought || len(ports) != brought {
		return protocolError("%d prepared inputs that are not the %d that were asked for", len(r.Inputs), brought)
	}
	if err := checkPlaces(r.Inputs, r.RequestBytes); err != nil {
		return protocolError("prepared inputs: %w", err)
	}
	if err := checkPlaces(r.Outputs, r.ReplyBytes); err != nil {
		return protocolError("prepared outputs: %w", err)
	}
	if layout := ringOf(r.RequestBytes, r.ReplyBytes); asked.Ring && *r.Ring != layout {
		return protocolError("a ring that lies as %v and not as %v", *r.Ring, layout)
	}
	if asked.Channel != nil && len(r.Outputs) != 0 {
		return protocolError("%d prepared outputs of a stream whose outputs go to channel %q", len(r.Outputs), asked.Channel.Name)
	}
	if asked.Stream {
		return checkRows(r.Outputs)
	}
	return nil
}

// checkRows says whether each output of a stream has an axis along which its rows are.
func checkRows(outputs []preparedPlace) error {
	if i := slices.IndexFunc(outputs, func(place preparedPlace) bool { return len(place.Shape) == 0 }); i >= 0 {
		return protocolError("output %q of a stream has no axis, so that it has no rows", outputs[i].Port)
	}
	return nil
}

// checkPlaces says whether tensors lie in a payload of so many bytes as they must: one behind the other, behind their sizes.
func checkPlaces(places []preparedPlace, had int64) error {
	if had < 0 || had > payloadBytesMax {
		return fmt.Errorf("a payload of %d bytes; at most %d are possible", had, payloadBytesMax)
	}
	end := int64(len(places)) * sizesBytes
	for _, place := range places {
		bytes, err := byteSize(place.DType, place.Shape)
		switch {
		case err != nil:
			return fmt.Errorf("%q: %w", place.Port, err)
		case place.Offset != end || place.Length != bytes || bytes > had:
			return fmt.Errorf("%q, %s, has %d bytes at %d of %d; it must have %d at %d",
				place.Port, spec(place.DType, place.Shape), place.Length, place.Offset, had, bytes, end)
		}
		end += (bytes + alignBytes - 1) / alignBytes * alignBytes
	}
	if end != had {
		return fmt.Errorf("they have %d bytes together, not %d", end, had)
	}
	return nil
}

func newPrepared(socket *line, streams bool, reply *prepareReply) *Prepared {
	p := &Prepared{
		replies:   newReplies(socket.conn, reply.Outputs, reply.ReplyBytes, streams),
		line:      socket,
		number:    reply.Prepared,
		requestID: reply.RequestID,
		inputs:    reply.Inputs,
		calling:   make(chan struct{}, 1),
		head:      make([]byte, headerBytes+sizesBytes*len(reply.Inputs)),
	}
	encodeHeader(p.head, header{op: opCall}, 0, int(reply.RequestBytes))
	runtime.AddCleanup(p, func(l *line) { _ = l.drop(closed("forgotten")) }, socket)
	return p
}

// Close ends the Prepared, here and in the host. A call that is under way, and every later one, fails with
// ErrDisconnected. A second Close does nothing.
func (p *Prepared) Close() error {
	_ = p.line.drop(closed("closed here"))
	return nil
}

func closed(how string) error {
	return fmt.Errorf("strait: %w: what was prepared was %s", ErrDisconnected, how)
}

// Inputs are those that a call brings, in the kernel's order, as large as they can be.
func (p *Prepared) Inputs() []Spec { return specs(p.inputs) }

// Outputs are the kernel's, in its order, as large as they can be.
func (p *Prepared) Outputs() []Spec { return specs(p.outputs) }

func specs(places []preparedPlace) []Spec {
	all := make([]Spec, len(places))
	for i, place := range places {
		all[i] = Spec{place.Port, place.DType, slices.Clone(place.Shape)}
	}
	return all
}

// PreparedOption changes one call of a Prepared: Into.
type PreparedOption interface {
	prepared(p *Prepared, outputs []output) error
}

// output is where the elements of an output go.
type output struct {
	bytes []byte
	// They are a []bool.
	truths bool
}

type preparedOption func(p *Prepared, outputs []output) error

func (o preparedOption) prepared(p *Prepared, outputs []output) error { return o(p, outputs) }

// Into receives an output in the caller's own slice and not in fresh memory. The slice must have room for the output at its
// largest, and may be an input's, since that has been sent by then. If the call fails, its elements are undefined. Tensors of
// the Result are views of it.
//
// The Call fails with ErrArgument, before anything is sent, if there is no such output or it does not fit.
func Into[T Element](port string, elements []T) PreparedOption {
	return preparedOption(func(p *Prepared, outputs []output) error {
		i := slices.IndexFunc(p.outputs, func(place preparedPlace) bool { return place.Port == port })
		if i < 0 {
			return argumentError("no output %q; there are %q", port, ports(p.outputs))
		}
		place, bytes := &p.outputs[i], shm.Raw(elements)
		if !holds[T](place.DType) || int64(len(bytes)) < place.Length {
			return argumentError("output %q can be %s; it does not go into %d elements of %s",
				port, spec(place.DType, place.Shape), len(elements), DTypeOf[T]())
		}
		bytes = bytes[:place.Length:place.Length]
		for j := range outputs {
			// One packet is received in all of them, in pieces.
			if shm.Overlap(outputs[j].bytes, bytes) {
				return argumentError("outputs %q and %q cannot both go into one slice", p.outputs[j].Port, port)
			}
		}
		outputs[i] = output{bytes, DTypeOf[T]() == Bool8}
		return nil
	})
}

func ports(places []preparedPlace) []string {
	all := make([]string, len(places))
	for i, place := range places {
		all[i] = place.Port
	}
	return all
}

// Call runs the kernel on the elements of inputs, one for each of p.Inputs: a Slice, Scalar, Raw or tensor. They have the
// element type and the number of axes that were prepared, and are at most as large along each axis; smaller ones take longer.
// The elements are sent straight from the caller's memory.
//
// The Result has Tensors, Notes and the RequestID. Its tensors are on the Go heap, fresh for each call and the
// caller's own, unless Into says where. They need no Release.
//
// When ctx ends, the call is cancelled, and Call returns when the host says that it is over; the error is then both ctx's
// and the host's RemoteError with CANCELLED. A deadline of ctx's is not sent to the host beforehand: see Deadline.
//
// The error is ErrArgument if inputs or options do not fit, and then nothing is sent; a RemoteError if the kernel fails,
// which does not affect later calls; ErrDisconnected if the connection, or the Prepared, has ended; ErrProtocol if the host
// breaks the protocol. After the last two, and if the host does not say that a cancelled call is over, the Prepared has ended.
func (p *Prepared) Call(ctx context.Context, inputs Inputs, options ...PreparedOption) (*Result, error) {
	if err := ended(ctx); err != nil {
		return nil, err
	}
	outputs := make([]output, len(p.outputs))
	for _, option := range options {
		if err := option.prepared(p, outputs); err != nil {
			return nil, err
		}
	}
	brought, drop, err := p.brought(inputs)
	defer drop()
	if err != nil {
		return nil, err
	}
	if err := p.begin(ctx); err != nil {
		return nil, err
	}
	defer func() { <-p.calling }()
	for i := range outputs {
		if outputs[i].bytes == nil {
			outputs[i].bytes = words(int(p.outputs[i].Length))
		}
	}
	stop := p.line.watch(ctx, p.number)
	result, err := p.exchange(brought, outputs)
	stop()
	for _, output := range outputs {
		if output.truths {
			// Whatever was received there: a Go bool has no other bytes.
			for i, b := range output.bytes {
				output.bytes[i] = min(b, 1)
			}
		}
	}
	if err != nil && ctx.Err() != nil {
		return nil, fmt.Errorf("%w: %w", ended(ctx), err)
	}
	return result, err
}

// begin waits for the calls before this one, which holds p.calling then.
func (p *Prepared) begin(ctx context.Context) error {
	select {
	case p.calling <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ended(ctx)
	case <-p.line.done:
		return p.line.end()
	}
}

// words is fresh memory where elements of every type are aligned.
func words(bytes int) []byte { return shm.Raw(make([]uint64, (bytes+7)/8))[:bytes:bytes] }

// brought is the elements that a call brings, in the kernel's order. What it returns ends their use, also when it fails.
func (p *Prepared) brought(inputs Inputs) ([]Copied, func(), error) {
	all := make([]Copied, 0, len(p.inputs))
	var held []*segment
	drop := func() {
		for _, segment := range held {
			segment.drop()
		}
	}
	for i := range p.inputs {
		place := &p.inputs[i]
		input := inputs[place.Port]
		if input == nil {
			return nil, drop, argumentError("input %q is missing; a call brings %q", place.Port, ports(p.inputs))
		}
		elements, segment, err := input.elements()
		if segment != nil {
			held = append(held, segment)
		}
		if err == nil {
			err = place.fits(elements, p.streams)
		}
		if err != nil {
			return nil, drop, fmt.Errorf("input %q: %w", place.Port, err)
		}
		all = append(all, elements)
	}
	if len(inputs) > len(all) {
		for port := range inputs {
			if !slices.Contains(ports(p.inputs), port) {
				return nil, drop, argumentError("input %q is not one that a call brings; those are %q", port, ports(p.inputs))
			}
		}
	}
	return all, drop, nil
}

// fits says whether a call can bring elements; of rows for a stream there may be any number, each as it was prepared.
func (p *preparedPlace) fits(elements Copied, streams bool) error {
	fits := elements.dtype == p.DType && len(elements.shape) == len(p.Shape)
	for axis := 0; fits && axis < len(p.Shape); axis++ {
		if streams {
			fits = axis == 0 || elements.shape[axis] == p.Shape[axis]
		} else {
			fits = elements.shape[axis] <= p.Shape[axis]
		}
	}
	if !fits {
		return argumentError("%s does not fit %s, which was prepared", spec(elements.dtype, elements.shape), spec(p.DType, p.Shape))
	}
	return nil
}

// exchange is one CALL and its reply. But for a failure of the kernel's, an error is the end of what is prepared.
func (p *Prepared) exchange(brought []Copied, outputs []output) (*Result, error) {
	rest := p.answerInto(outputs)
	defer rests.Put(rest)
	// Memory of others is not kept, nor written to.
	defer clear(p.answer)
	result, err := p.call(brought, outputs)
	if err != nil && !errors.As(err, new(*RemoteError)) {
		return nil, p.line.drop(err)
	}
	return result, err
}

func (p *Prepared) call(brought []Copied, outputs []output) (*Result, error) {
	if err := p.ask(opCall, brought); err != nil {
		return nil, err
	}
	n, err := p.line.receive(p.answer)
	if err != nil {
		return nil, err
	}
	_, reply, err := p.received(n, opCall, p.sequence, outputs)
	if err != nil {
		return nil, err
	}
	result := p.result(reply.Notes)
	for i, place := range p.places {
		result.Tensors[i] = p.tensor(place, outputs[i].bytes)
	}
	return result, nil
}

// ask sends a request with what it brings.
func (p *Prepared) ask(op op, brought []Copied) error {
	p.sequence = max(p.sequence+1, 1)
	p.pack(op, brought)
	err := p.line.send(p.packet)
	// Memory of others is not kept.
	clear(p.packet)
	if err != nil {
		return err
	}
	p.conn.calls.Add(1)
	for _, elements := range brought {
		p.conn.copiedBytes.Add(int64(len(elements.bytes)))
	}
	return nil
}

// pack puts the frame of a request together.
func (p *Prepared) pack(op op, brought []Copied) {
	p.head[3] = byte(op)
	binary.LittleEndian.PutUint32(p.head[4:], p.sequence)
	p.packet = append(p.packet[:0], p.head)
	for i, elements := range brought {
		sizes := p.head[headerBytes+sizesBytes*i:]
		for axis, size := range elements.shape {
			binary.LittleEndian.PutUint64(sizes[8*axis:], uint64(size))
		}
		room := (int(p.inputs[i].Length) + alignBytes - 1) / alignBytes * alignBytes
		p.packet = append(p.packet, elements.bytes, zeros[:room-len(elements.bytes)])
	}
}

// result has no tensors yet.
func (p *Prepared) result(notes []Note) *Result {
	return &Result{Notes: notes, RequestID: p.requestID, Tensors: make([]*Tensor, len(p.outputs))}
}
