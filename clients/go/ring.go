package strait

import (
	"fmt"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"strait/internal/shm"
)

// Ring is an option of Prepare: its calls go through slots in memory that the host shares with this process, and not over the
// socket. While both sides look for what comes (WithSpin, and the host's server.spin_us) a call is no system call; otherwise one
// wakes the other over the socket. The memory counts as a segment.
func Ring() PrepareOption { return ringOption{} }

type ringOption struct{}

func (ringOption) prepare(r *prepareRequest) error {
	r.Ring = true
	return nil
}

// Whoever looks for longer sees the end of the host too late.
const spinMax = 50 * time.Millisecond

// ringReply is where what is in a ring's memory, in bytes.
type ringReply struct {
	Bytes         int64 `json:"bytes"`
	Slots         int64 `json:"slots"`
	Requests      int64 `json:"requests"`
	RequestStride int64 `json:"request_stride"`
	Replies       int64 `json:"replies"`
	ReplyStride   int64 `json:"reply_stride"`
}

const (
	ringSlots = 2
	ringPage  = 4096
	ringLine  = 64

	// The words of this side, and of the host's.
	ownTail    = 0
	ownAsleep  = 128
	hostTail   = ringPage
	hostAsleep = ringPage + 128
)

// ringOf is where it must be for payloads of so many bytes.
func ringOf(requestBytes, replyBytes int64) ringReply {
	up := func(bytes, to int64) int64 { return (bytes + to - 1) / to * to }
	r := ringReply{Slots: ringSlots, Requests: 2 * ringPage}
	r.RequestStride, r.ReplyStride = up(headerBytes+requestBytes, ringLine), up(headerBytes+replyBytes, ringLine)
	r.Replies = r.Requests + up(ringSlots*r.RequestStride, ringPage)
	r.Bytes = r.Replies + up(ringSlots*r.ReplyStride, ringPage)
	return r
}

// ring is the memory beside a line's socket. Its line says who uses it, and when nobody does any more.
//
// The protocol wants loads with acquire, stores with release, and a full fence between an own store and the load of the other
// side's word: Go's atomics are sequentially consistent, which is all of that.
type ring struct {
	pages  shm.Pages
	layout ringReply
	// Of a reply without a body.
	frameBytes int
	// Counted here: what is in the memory is the host's to write.
	sent, received uint32

	ownTail, ownAsleep, hostTail, hostAsleep *atomic.Uint32
}

// newRing maps a ring. It takes over fd, also when it fails.
func newRing(fd int, layout ringReply, replyBytes int64) (*ring, error) {
	err := shm.CheckSeals(fd, false)
	r := &ring{layout: layout, frameBytes: headerBytes + int(replyBytes)}
	if err == nil {
		r.pages, err = shm.Map(fd, layout.Bytes, true)
	}
	closeAll([]int{fd})
	if err != nil {
		return nil, protocolError("the memory of a ring: %w", err)
	}
	r.ownTail, r.ownAsleep = r.pages.Word(ownTail), r.pages.Word(ownAsleep)
	r.hostTail, r.hostAsleep = r.pages.Word(hostTail), r.pages.Word(hostAsleep)
	return r, nil
}

// send puts a frame into the next slot, which is free since there is one call at a time, and wakes a host that sleeps.
func (r *ring) send(fd int, packet [][]byte) error {
	slot := r.slot(r.layout.Requests, r.layout.RequestStride, r.sent)
	for _, part := range packet {
		slot = slot[copy(slot, part):]
	}
	r.sent++
	r.ownTail.Store(r.sent)
	if r.hostAsleep.Load() == 0 {
		return nil
	}
	for {
		switch err := unix.Sendmsg(fd, []byte{0}, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL); err {
		case unix.EINTR:
		// It has so much to receive there that it wakes anyway.
		case nil, unix.EAGAIN:
			return nil
		default:
			return fmt.Errorf("strait: %w: %w", ErrDisconnected, err)
		}
	}
}

func (r *ring) slot(from, stride int64, count uint32) []byte {
	at := from + int64(count%ringSlots)*stride
	return r.pages.Bytes()[at : at+stride]
}

// take copies the next reply out of its slot, before anybody looks at it; false if there is none.
func (r *ring) take(answer [][]byte) (bool, error) {
	came := r.hostTail.Load() - r.received
	switch {
	case came == 0:
		return false, nil
	case came > r.sent-r.received:
		return false, protocolError("the host's tail in a ring says that %d replies came to %d calls", came, r.sent-r.received)
	}
	slot := r.slot(r.layout.Replies, r.layout.ReplyStride, r.received)[:r.frameBytes]
	for _, part := range answer {
		slot = slot[copy(part, slot):]
	}
	r.received++
	return true, nil
}

// receive waits for the next reply, which has so many bytes in answer's parts of memory.
func (r *ring) receive(l *line, fd int, answer [][]byte, spin time.Duration) (int, error) {
	came, err := r.look(l, answer, spin)
	for !came && err == nil {
		r.ownAsleep.Store(1)
		if came, err = r.take(answer); !came && err == nil {
			// Whatever it is, it is the end, but for what only wakes.
			var n int
			if n, err = l.packet(fd, answer, 0); err == nil && n != 1 {
				err = l.lastWords(linear(answer, n))
			}
		}
		r.ownAsleep.Store(0)
		if !came && err == nil {
			came, err = r.take(answer)
		}
	}
	if err != nil {
		return 0, err
	}
	header := [headerBytes]byte(answer[0])
	if [4]byte(header[8:]) == [4]byte{} {
		return r.frameBytes, nil
	}
	// It has a body, and comes on the socket.
	for {
		n, err := l.packet(fd, answer, 0)
		switch {
		case err != nil:
			return 0, err
		case n == 1:
		case n < headerBytes || [headerBytes]byte(answer[0]) != header:
			return 0, protocolError("another frame on the socket than the one that a ring's slot told of")
		default:
			return n, nil
		}
	}
}

// look is take again and again, for as long as this side looks.
func (r *ring) look(l *line, answer [][]byte, spin time.Duration) (bool, error) {
	came, err := r.take(answer)
	if came || err != nil || spin == 0 {
		return came, err
	}
	for until := time.Now().Add(spin); time.Now().Before(until); {
		for range 64 {
			if came, err = r.take(answer); came || err != nil {
				return came, err
			}
		}
		if err := l.end(); err != nil {
			return false, err
		}
	}
	return false, nil
}

// lastWords is why the host has ended a ring.
func (l *line) lastWords(packet []byte) error {
	h, body, _, err := decodeFrame(packet)
	if err != nil || h.op != opError {
		return protocolError("a frame on the socket of a ring that no slot told of")
	}
	remote := &RemoteError{}
	if err := decodeBody(body, remote); err != nil {
		return err
	}
	// No call after it can fail in this way.
	l.finish(closed("ended by the host: " + remote.Message))
	return remote
}
