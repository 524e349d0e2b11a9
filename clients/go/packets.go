package strait

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// packets is the socket of a channel's consumer. Unlike line it waits with the runtime's poller, so that a context can end a
// wait: a packet is received whole or stays in the socket.
type packets struct {
	conn *conn
	file *os.File
	raw  syscall.RawConn

	mu sync.Mutex
	// Why it is over; set once, before done is closed.
	err  error
	done chan struct{}
}

// newPackets takes over fd, also when it fails.
func (c *conn) newPackets(fd int) (*packets, error) {
	if err := checkPackets(fd, true); err != nil {
		return nil, err
	}
	file := os.NewFile(uintptr(fd), "packets")
	raw, err := file.SyscallConn()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("strait: a socket without a descriptor: %w", err), file.Close())
	}
	p := &packets{conn: c, file: file, raw: raw, done: make(chan struct{})}
	return p, c.add(p)
}

// finish ends it for whoever waits. The first reason stands.
func (p *packets) finish(why error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err != nil {
		return
	}
	p.err = why
	close(p.done)
	// Whatever it returns, the socket is closed.
	_ = p.file.Close()
}

// drop is finish for one that the connection need not end any more. It answers the reason that stands.
func (p *packets) drop(why error) error {
	p.finish(why)
	p.conn.remove(p)
	return p.end()
}

// end is why it is over; nil while it is not.
func (p *packets) end() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// send sends one packet. That the host has ended the socket is no error: why is what it said before that.
func (p *packets) send(ctx context.Context, packet []byte) error {
	return p.wait(ctx, p.raw.Write, func(fd int) error {
		err := unix.Sendmsg(fd, packet, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		if err == unix.EPIPE || err == unix.ECONNRESET {
			return nil
		}
		return err
	})
}

// receive waits for the next packet, which has so many bytes in answer's parts of memory. When ctx ends, so does the wait.
// Any other error is the end.
func (p *packets) receive(ctx context.Context, answer [][]byte) (int, error) {
	var n, flags int
	err := p.wait(ctx, p.raw.Read, func(fd int) (err error) {
		// Without room for them descriptors are not received, and MSG_CTRUNC tells of them.
		n, _, flags, _, err = unix.RecvmsgBuffers(fd, answer, nil, unix.MSG_DONTWAIT)
		if err == unix.ECONNRESET {
			// The host left something unread; what it said before that is still here.
			return unix.EINTR
		}
		return err
	})
	switch {
	case err != nil:
		return 0, err
	case n == 0:
		return 0, p.drop(fmt.Errorf("strait: %w: the host ended the channel and did not say why", ErrDisconnected))
	case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0:
		return 0, p.drop(protocolError("a frame is longer than one can be, or has descriptors"))
	}
	return n, nil
}

// wait tries something until it is done, which EAGAIN says that it is not, or ctx ends.
func (p *packets) wait(ctx context.Context, ready func(func(uintptr) bool) error, try func(fd int) error) error {
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(interrupted)
		// It fails only on a closed socket, on which nobody waits.
		_ = p.file.SetDeadline(time.Unix(1, 0))
	})
	var tried error
	err := ready(func(fd uintptr) bool {
		for {
			if tried = try(int(fd)); tried != unix.EINTR {
				return tried != unix.EAGAIN
			}
		}
	})
	if !stop() {
		<-interrupted
		_ = p.file.SetDeadline(time.Time{})
	}
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return ended(ctx)
	case err == nil && tried == nil:
		return nil
	}
	// Where it was closed there is a reason already.
	return p.drop(fmt.Errorf("strait: %w: %w", ErrDisconnected, errors.Join(err, tried)))
}
