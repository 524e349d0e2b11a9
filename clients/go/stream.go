package strait

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"math"
)

// Stream is a kernel that is given tensors in chunks of rows. It keeps its state from the first chunk to the
// last, and all its output rows are bit for bit those of one Client.Call on all rows, however they were cut. Which of
// them come with which chunk is up to the kernel.
//
// It has a socket, a thread and memory as a Prepared has, until Close, or that of its Client, or until the garbage collector
// finds it. Chunks from several goroutines go one after another, in no order that anyone has promised.
//
// An error ends it, unless nothing was sent: because of ErrArgument, ErrReleased or a context that was over. Prepare another
// one then.
type Stream struct {
	prepared *Prepared
	// What comes of it goes to a channel, which ends with the last chunk.
	channel bool
	// One frame's rows are received here.
	room []output
}

// Stream runs a kernel on chunks of rows and yields the output of each: perhaps no rows. After the last chunk it yields the
// rest, with the kernel's Notes. An error is the last thing that it yields. The loop may be left at any time: then the kernel ends.
//
// inputs are as those of PrepareStream, chunks as those of Stream.Chunk.
func (c *Client) Stream(ctx context.Context, kernel string, inputs Inputs, chunks iter.Seq[Inputs], options ...PrepareOption) iter.Seq2[*Result, error] {
	return func(yield func(*Result, error) bool) {
		s, err := c.PrepareStream(ctx, kernel, inputs, options...)
		if err != nil {
			yield(nil, err)
			return
		}
		defer s.Close()
		for chunk := range chunks {
			rows, err := s.Chunk(ctx, chunk)
			if !yield(rows, err) || err != nil {
				return
			}
		}
		yield(s.Last(ctx, nil))
	}
}

// PrepareStream makes a kernel ready for tensors that come in chunks. An input that comes in chunks is an Each, whose first
// size is the largest number of rows that the kernel gets at a time; longer chunks are cut. An input that the kernel takes whole
// is anything that goes into Client.Call. The rest is as with Client.Prepare, 128 KiB included. With ChannelOptions somebody else gets what
// comes of the chunks.
func (c *Client) PrepareStream(ctx context.Context, kernel string, inputs Inputs, options ...PrepareOption) (*Stream, error) {
	for port, input := range inputs {
		if each, chunked := input.(Brought); chunked && (len(each.shape) == 0 || each.shape[0] < 1) {
			return nil, argumentError("input %q, %s, comes in chunks: its first size is the most rows of one, at least 1",
				port, spec(each.dtype, each.shape))
		}
	}
	asked := &prepareRequest{kernelRequest: kernelRequest{Kernel: kernel}, Stream: true}
	prepared, err := c.prepare(ctx, asked, inputs, options)
	if err != nil {
		return nil, err
	}
	s := &Stream{prepared, asked.Channel != nil, make([]output, len(prepared.outputs))}
	for i, place := range prepared.outputs {
		s.room[i].bytes = words(int(place.Length))
	}
	return s, nil
}

// Close ends the stream, here and in the host, as Prepared.Close does.
func (s *Stream) Close() error { return s.prepared.Close() }

// Inputs are those that come in chunks, in the kernel's order; their shapes begin with the most rows that it gets at a time.
func (s *Stream) Inputs() []Spec { return s.prepared.Inputs() }

// Outputs are the kernel's, in its order; they begin with the most rows of one frame, of which a chunk may bring several. There
// are none if they go to a channel.
func (s *Stream) Outputs() []Spec { return s.prepared.Outputs() }

// Chunk gives the kernel the next rows, perhaps none, of each of s.Inputs, and returns the output. All sizes but the
// first are those that were prepared. A chunk with more rows than were prepared is sent in several pieces.
//
// The Result is as that of Prepared.Call, in fresh memory. When ctx ends, the stream does.
//
// The error is ErrArgument if inputs do not fit, and nothing is sent then; a RemoteError if the kernel fails, whose Details
// have the number of the piece as "chunk"; ErrDisconnected if the stream or the connection has ended; ErrProtocol if the
// host breaks the protocol.
func (s *Stream) Chunk(ctx context.Context, inputs Inputs) (*Result, error) {
	return s.send(ctx, opChunk, inputs)
}

// Last gives the kernel the last rows, as Chunk does, or none if inputs are empty, and returns the rest and the kernel's
// Notes. The next Chunk begins another stream, of which the kernel knows nothing yet. With ChannelOptions Last returns when the
// consumer has acknowledged the end, and the Stream is closed then.
func (s *Stream) Last(ctx context.Context, inputs Inputs) (*Result, error) {
	if len(inputs) == 0 {
		inputs = Inputs{}
		for _, place := range s.prepared.inputs {
			inputs[place.Port] = Raw(place.DType, nil, withRows(place.Shape, 0)...)
		}
	}
	return s.send(ctx, opLast, inputs)
}

func (s *Stream) send(ctx context.Context, op op, inputs Inputs) (*Result, error) {
	if err := ended(ctx); err != nil {
		return nil, err
	}
	p := s.prepared
	brought, drop, err := p.brought(inputs)
	defer drop()
	if err != nil {
		return nil, err
	}
	if err := p.begin(ctx); err != nil {
		return nil, err
	}
	defer func() { <-p.calling }()
	stop := p.line.watch(ctx, p.number)
	result, err := s.pieces(ctx, op, brought)
	stop()
	if err == nil {
		if s.channel && op == opLast {
			_ = p.line.drop(closed("over with its last chunk, as the channel is"))
		}
		return result, nil
	}
	if remote := (*RemoteError)(nil); errors.As(err, &remote) {
		// Whatever comes later did not fail in this way.
		_ = p.line.drop(closed(fmt.Sprintf("a stream, which failed: %s", remote.Message)))
	} else {
		err = p.line.drop(err)
	}
	if ctx.Err() != nil {
		err = fmt.Errorf("%w: %w", ended(ctx), err)
	}
	return nil, err
}

// pieces sends a chunk, cut to the rows that were prepared, and gathers what comes of it.
func (s *Stream) pieces(ctx context.Context, op op, brought []Copied) (*Result, error) {
	p := s.prepared
	rest := p.answerInto(s.room)
	defer rests.Put(rest)
	defer clear(p.answer)
	all := make([]rows, len(p.outputs))
	for {
		piece, more := p.cut(brought)
		asked := op
		if more {
			asked = opChunk
		}
		if err := p.ask(asked, piece); err != nil {
			return nil, err
		}
		notes, err := s.gather(all)
		if err != nil {
			return nil, err
		}
		if !more {
			result := p.result(notes)
			for i := range all {
				result.Tensors[i] = p.tensor(all[i].place(&p.outputs[i]), all[i].bytes)
			}
			return result, nil
		}
		if ctx.Err() != nil {
			return nil, closed("a stream, which was left in the middle of a chunk")
		}
	}
}

// cut takes as many rows as were prepared off the front of brought. More are left if it says so.
func (p *Prepared) cut(brought []Copied) (piece []Copied, more bool) {
	piece = make([]Copied, len(brought))
	for i, all := range brought {
		had := all.shape[0]
		count := min(had, p.inputs[i].Shape[0])
		bytes := 0
		if had > 0 {
			bytes = len(all.bytes) / had * count
		}
		piece[i] = Copied{dtype: all.dtype, shape: withRows(all.shape, count), bytes: all.bytes[:bytes]}
		brought[i] = Copied{dtype: all.dtype, shape: withRows(all.shape, had-count), bytes: all.bytes[bytes:]}
		more = more || had > count
	}
	return piece, more
}

func withRows(shape []int, count int) []int {
	return append([]int{count}, shape[1:]...)
}

// gather receives the answers to one piece and appends their rows to all.
func (s *Stream) gather(all []rows) ([]Note, error) {
	p := s.prepared
	for {
		n, err := p.line.receive(p.answer)
		if err != nil {
			return nil, err
		}
		op, reply, err := p.received(n, op(p.head[3]), p.sequence, s.room)
		if err != nil {
			return nil, err
		}
		for i, place := range p.places {
			if err := all[i].append(place, s.room[i].bytes[:place.Length]); err != nil {
				return nil, err
			}
		}
		if op == opOK {
			return reply.Notes, nil
		}
	}
}

// rows are those of one output, in memory of their own.
type rows struct {
	count int
	bytes []byte
}

func (r *rows) append(place Place, more []byte) error {
	count := place.Shape[0]
	// Rows of nothing need no memory, however many they are.
	if count > math.MaxInt-r.count {
		return protocolError("output %q has more rows than can be counted", place.Name)
	}
	r.count += count
	had, need := len(r.bytes), len(r.bytes)+len(more)
	if need > cap(r.bytes) {
		// One frame is all there is, as a rule.
		grown := words(max(need, 2*cap(r.bytes)))
		copy(grown, r.bytes)
		r.bytes = grown
	}
	r.bytes = r.bytes[:need]
	copy(r.bytes[had:], more)
	return nil
}

func (r *rows) place(prepared *preparedPlace) Place {
	return Place{Spec{prepared.Port, prepared.DType, withRows(prepared.Shape, r.count)}, 0, int64(len(r.bytes))}
}
