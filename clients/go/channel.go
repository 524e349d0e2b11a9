package strait

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"runtime"
	"sync/atomic"
	"time"
)

// ChannelOptions is an option of PrepareStream and Stream: what comes of the chunks goes to whoever reads the channel of that
// name, in this process or another one, and the chunks' own Results have no tensors. The channel is there until the stream
// ends; its name is among the principal's channels, which are not its flights.
type ChannelOptions struct {
	Name string
	// Batches that the host keeps until they are acknowledged, 1 to 1024; 0 stands for 8. While it keeps so many, Chunk
	// waits: nothing is dropped.
	Batches int
	// Wait is how long Chunk waits without an acknowledgement before the stream fails with DEADLINE; 0 stands for the host's
	// server.stall_ms.
	Wait time.Duration
	// Resume is how long a consumer that left has to come back, or another one in its place. With 0 the next chunk after it
	// left fails with CONSUMER_LOST.
	Resume time.Duration
}

func (o ChannelOptions) prepare(r *prepareRequest) error {
	if o.Batches < 0 || o.Wait < 0 || o.Resume < 0 {
		return argumentError("channel %q with %d batches, a wait of %s and %s to resume; none can be negative", o.Name, o.Batches, o.Wait, o.Resume)
	}
	r.Channel = &channelRequest{o.Name, o.Batches, milliseconds(o.Wait), milliseconds(o.Resume)}
	return checkText("a channel's name", o.Name)
}

// Channel reads what comes of a stream that somebody else feeds: batches of rows, in their order.
//
// A batch is acknowledged when the next one is asked for, or by Acknowledge. The host keeps it until then, and sends it again
// to whoever reads the channel after this one: at least once, never out of order, and numbered.
//
// It has a socket of its own until its end, Close, the end of its Client, or until the garbage collector finds it. One
// goroutine reads; others may Close it.
type Channel struct {
	replies
	packets *packets
	kernel  string

	// Held by whoever reads, and so is all that follows. A channel, so that a context can end the wait for it.
	reading chan struct{}
	// Of the batch that was received last.
	number uint64
	// It is to be acknowledged.
	owed bool
	// What the kernel had to say: the end came.
	last *[]Note
	// The next batch is received here.
	room []output

	// last, once it is acknowledged. Read by anybody.
	notes atomic.Pointer[[]Note]
}

// Batch is rows of a channel's outputs, in memory of the Go heap of its own. They need no Release.
type Batch struct {
	// Number of the batch in its channel, whose first one is 1. One that was not acknowledged comes again under the same number.
	Number uint64
	// Tensors are the outputs in the kernel's order, named as their ports; some may have no rows.
	Tensors []*Tensor
}

// Tensor is the output of a port. If there is none, the tensor it returns fails wherever it is used.
func (b *Batch) Tensor(port string) *Tensor { return ofPort(b.Tensors, port) }

// ReadChannel begins to read the channel of that name, which a PrepareStream with ChannelOptions has opened. Whoever comes back
// begins with the first batch that was not acknowledged. ctx is for beginning only.
//
// A RemoteError with CHANNEL_NOT_FOUND says that there is no such channel, one with WRONG_STATE that somebody reads it already.
func (c *Client) ReadChannel(ctx context.Context, name string) (*Channel, error) {
	if err := checkText("a channel's name", name); err != nil {
		return nil, err
	}
	var reply streamReply
	came, err := c.conn.request(ctx, opStream, &streamRequest{Channel: name}, beside{}, &reply)
	if err != nil {
		return nil, err
	}
	if err := reply.check(name, len(came.fds)); err != nil {
		closeAll(came.fds)
		return nil, err
	}
	socket, err := c.conn.newPackets(came.fds[0])
	if err != nil {
		return nil, err
	}
	channel := &Channel{
		replies: newReplies(c.conn, reply.Outputs, reply.BatchBytes, true),
		packets: socket,
		kernel:  reply.Kernel,
		reading: make(chan struct{}, 1),
		number:  reply.First - 1,
		room:    make([]output, len(reply.Outputs)),
	}
	runtime.AddCleanup(channel, func(p *packets) { _ = p.drop(left("forgotten")) }, socket)
	return channel, nil
}

// check holds the host's word against what was asked, and against itself.
func (r *streamReply) check(name string, fds int) error {
	if fds != 1 {
		return protocolError("%d descriptors beside the OK to STREAM, which has one", fds)
	}
	if r.Channel != name || r.First == 0 {
		return protocolError("channel %q from batch %d on; %q was asked for, and batches are counted from 1", r.Channel, r.First, name)
	}
	if err := checkPlaces(r.Outputs, r.BatchBytes); err != nil {
		return protocolError("outputs of channel %q: %w", name, err)
	}
	return checkRows(r.Outputs)
}

func left(how string) error {
	return fmt.Errorf("strait: %w: the channel was %s", ErrDisconnected, how)
}

// Kernel is the one whose outputs come.
func (c *Channel) Kernel() string { return c.kernel }

// Outputs are the kernel's, in its order; they begin with the most rows of a batch.
func (c *Channel) Outputs() []Spec { return specs(c.outputs) }

// Notes is what the kernel had to say, once Next has returned io.EOF.
func (c *Channel) Notes() []Note {
	if notes := c.notes.Load(); notes != nil {
		return *notes
	}
	return nil
}

// Close leaves the channel. Batches that were not acknowledged are kept for whoever comes next, if ChannelOptions.Resume lets
// one; otherwise the producer is told that its consumer left. A Next that waits, and every later one before the end, fails
// with ErrDisconnected. A second Close, and one after the end, do nothing.
func (c *Channel) Close() error {
	_ = c.packets.drop(left("closed here"))
	return nil
}

// Batches yields batch after batch until the end, each of which is acknowledged when the loop asks for the next one. An error
// is the last that it yields. A loop that is left has not acknowledged its last batch; another loop goes on behind that, and
// Close leaves the channel.
func (c *Channel) Batches(ctx context.Context) iter.Seq2[*Batch, error] {
	return func(yield func(*Batch, error) bool) {
		for {
			batch, err := c.Next(ctx)
			if err == io.EOF {
				return
			}
			if !yield(batch, err) || err != nil {
				return
			}
		}
	}
}

// Next acknowledges the batch before, and waits for the next one. At the end, which it acknowledges by itself, and from then
// on, the error is io.EOF. When ctx ends, so does the wait, and the batch comes with another Next.
//
// Any other error is the end of the channel: a RemoteError says why no more comes, with PRODUCER_LOST if the producer left, or
// else with what the producer was told, such as the number of a chunk as "chunk" in its Details; ErrDisconnected that the
// channel, its connection or its host has ended; ErrProtocol that the host broke the protocol.
func (c *Channel) Next(ctx context.Context) (*Batch, error) {
	if err := c.begin(ctx); err != nil {
		return nil, err
	}
	defer func() { <-c.reading }()
	if c.notes.Load() != nil {
		return nil, io.EOF
	}
	if err := c.acknowledge(ctx); err != nil {
		return nil, err
	}
	if c.last == nil {
		batch, err := c.receive(ctx)
		if err != nil || batch != nil {
			return batch, err
		}
		if err := c.acknowledge(ctx); err != nil {
			return nil, err
		}
	}
	c.notes.Store(c.last)
	_ = c.packets.drop(left("read to its end"))
	return nil, io.EOF
}

// receive waits for the next batch; none is the end.
func (c *Channel) receive(ctx context.Context) (*Batch, error) {
	for i, output := range c.outputs {
		if c.room[i].bytes == nil {
			c.room[i].bytes = words(int(output.Length))
		}
	}
	rest := c.answerInto(c.room)
	defer rests.Put(rest)
	// A batch's memory is its own.
	defer clear(c.answer)
	n, err := c.packets.receive(ctx, c.answer)
	if err != nil {
		return nil, err
	}
	batch, err := c.take(n)
	if remote := (*RemoteError)(nil); errors.As(err, &remote) {
		// Whatever comes later did not fail in this way.
		_ = c.packets.drop(left(fmt.Sprintf("ended: %s", remote.Message)))
	} else if err != nil {
		err = c.packets.drop(err)
	}
	return batch, err
}

// Acknowledge tells the host that the batch which came last is done with, so that it makes room for another one and nobody
// gets it again. Without such a batch it does nothing.
func (c *Channel) Acknowledge(ctx context.Context) error {
	if err := c.begin(ctx); err != nil {
		return err
	}
	defer func() { <-c.reading }()
	return c.acknowledge(ctx)
}

func (c *Channel) begin(ctx context.Context) error {
	if err := ended(ctx); err != nil {
		return err
	}
	select {
	case c.reading <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ended(ctx)
	}
}

func (c *Channel) acknowledge(ctx context.Context) error {
	if !c.owed {
		return nil
	}
	frame := make([]byte, headerBytes)
	encodeHeader(frame, header{op: opOK, sequence: uint32(c.number)}, 0, 0)
	err := c.packets.send(ctx, frame)
	c.owed = err != nil
	return err
}

// take makes a batch of the n bytes that were received, or none of the end.
func (c *Channel) take(n int) (*Batch, error) {
	op, reply, err := c.received(n, opStream, uint32(c.number+1), c.room)
	if err != nil {
		return nil, err
	}
	c.number++
	c.owed = true
	if op == opLast {
		c.last = &reply.Notes
		return nil, nil
	}
	batch := &Batch{Number: c.number, Tensors: make([]*Tensor, len(c.outputs))}
	rows := 0
	for i, place := range c.places {
		rows = max(rows, place.Shape[0])
		batch.Tensors[i] = c.tensor(place, c.room[i].bytes)
		c.room[i] = output{}
	}
	if rows == 0 {
		return nil, protocolError("batch %d of a channel has no rows", c.number)
	}
	return batch, nil
}
