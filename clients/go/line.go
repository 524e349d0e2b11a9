package strait

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// line is the socket of what is prepared, and perhaps a ring beside it. Its system calls wait on their thread and not with the
// runtime's poller, with which a call takes some 10 us more.
//
//	Prepared.Call, Stream.Chunk ─▶ send, receive: enter, the system call, leave
//	finish (Close, the end of the connection, a wrong reply, the collector) ends either, and what comes after
type line struct {
	conn *conn

	mu sync.Mutex
	// -1 once it is closed.
	fd int
	// Somebody is in a system call with fd, who closes it then.
	entered bool
	// Through which calls go, if that was asked for; unmapped when the socket is closed.
	ring *ring
	// Why it is over; set once, before done is closed.
	err  error
	done chan struct{}
}

// newLine takes over the descriptors of a socket and perhaps a ring, also when it fails.
func (c *conn) newLine(fds []int, reply *prepareReply) (*line, error) {
	if err := checkPackets(fds[0], false); err != nil {
		closeAll(fds[1:])
		return nil, err
	}
	l := &line{conn: c, fd: fds[0], done: make(chan struct{})}
	if len(fds) > 1 {
		var err error
		if l.ring, err = newRing(fds[1], *reply.Ring, reply.ReplyBytes); err != nil {
			l.finish(err)
			return nil, err
		}
	}
	return l, c.add(l)
}

// checkPackets says whether fd is a socket as the host hands them out, which waits as nonblocking says. It closes any other.
func checkPackets(fd int, nonblocking bool) error {
	domain, domainErr := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	kind, kindErr := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	err := errors.Join(domainErr, kindErr)
	if err == nil && (domain != unix.AF_UNIX || kind != unix.SOCK_SEQPACKET) {
		err = fmt.Errorf("a socket of domain %d and type %d", domain, kind)
	}
	if err == nil {
		err = unix.SetNonblock(fd, nonblocking)
	}
	if err != nil {
		closeAll([]int{fd})
		return protocolError("calls and channels need a unix socket for packets: %w", err)
	}
	return nil
}

// enter is the descriptor, until leave. One caller at a time.
func (l *line) enter() (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return -1, l.err
	}
	l.entered = true
	return l.fd, nil
}

func (l *line) leave() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.entered = false
	if l.err != nil {
		l.close()
	}
}

// finish ends it for whoever uses it. The first reason stands.
func (l *line) finish(why error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return
	}
	l.err = why
	close(l.done)
	if l.entered {
		// Whoever waits in it comes back. It fails only where the host has ended it.
		_ = unix.Shutdown(l.fd, unix.SHUT_RDWR)
	} else {
		l.close()
	}
}

// close is called with the lock held.
func (l *line) close() {
	_ = unix.Close(l.fd)
	l.fd = -1
	if l.ring != nil {
		// Of a mapping of its own, which nobody else knows.
		_ = l.ring.pages.Unmap()
	}
}

// drop is finish for one that the connection need not end any more. It answers the reason that stands.
func (l *line) drop(why error) error {
	l.finish(why)
	l.conn.remove(l)
	return l.end()
}

// end is why it is over; nil while it is not.
func (l *line) end() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// send sends one packet: parts of memory.
func (l *line) send(packet [][]byte) error {
	fd, err := l.enter()
	if err != nil {
		return err
	}
	defer l.leave()
	if l.ring != nil {
		return l.ring.send(fd, packet)
	}
	for {
		if _, err = unix.SendmsgBuffers(fd, packet, nil, nil, unix.MSG_NOSIGNAL); err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("strait: %w: %w", ErrDisconnected, err)
	}
	return nil
}

// receive waits for the next reply, which has so many bytes in answer's parts of memory.
func (l *line) receive(answer [][]byte) (int, error) {
	fd, err := l.enter()
	if err != nil {
		return 0, err
	}
	defer l.leave()
	spin := l.conn.spin
	if l.ring != nil {
		return l.ring.receive(l, fd, answer, spin)
	}
	for until := time.Now().Add(spin); spin > 0 && time.Now().Before(until); {
		n, err := l.packet(fd, answer, unix.MSG_DONTWAIT)
		if err != unix.EAGAIN {
			return n, err
		}
	}
	return l.packet(fd, answer, 0)
}

// packet receives from the socket; with MSG_DONTWAIT as how, the error is EAGAIN if there is nothing.
func (l *line) packet(fd int, answer [][]byte, how int) (int, error) {
	for {
		// Without room for them descriptors are not received, and MSG_CTRUNC tells of them.
		n, _, flags, _, err := unix.RecvmsgBuffers(fd, answer, nil, how)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN:
			return 0, err
		case err != nil:
			return 0, fmt.Errorf("strait: %w: %w", ErrDisconnected, err)
		case n == 0:
			return 0, fmt.Errorf("strait: %w: the host ended what was prepared", ErrDisconnected)
		case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0:
			return 0, protocolError("a reply is longer than a frame can be, or has descriptors")
		}
		return n, nil
	}
}

// Between two CANCELs of one call, at first and at most.
const (
	cancelAgain    = time.Millisecond
	cancelAgainMax = 50 * time.Millisecond
)

// watch cancels the call of prepared that is under way once ctx ends. When what it returns has been called, no CANCEL is
// on its way that could meet the next call.
func (l *line) watch(ctx context.Context, prepared uint64) (stop func()) {
	if ctx.Done() == nil {
		return func() {}
	}
	over, told := make(chan struct{}), make(chan struct{})
	unneeded := context.AfterFunc(ctx, func() {
		defer close(told)
		l.cancel(prepared, over)
	})
	return func() {
		close(over)
		if !unneeded() {
			<-told
		}
	}
}

// cancel asks the host to end the call until it is over: a CANCEL that is taken up before the CALL itself has ended nothing.
func (l *line) cancel(prepared uint64, over <-chan struct{}) {
	ctx, stop := context.WithTimeout(context.Background(), cancelGrace)
	defer stop()
	for again := cancelAgain; ; again = min(2*again, cancelAgainMax) {
		if err := l.conn.ask(ctx, opCancel, &cancelRequest{Prepared: prepared}, nil); err != nil {
			// Whether it ends this call, a later one or none is not known.
			_ = l.drop(fmt.Errorf("strait: %w: a call could not be cancelled: %w", ErrDisconnected, err))
			return
		}
		timer := time.NewTimer(again)
		select {
		case <-over:
			timer.Stop()
			return
		case <-timer.C:
		}
	}
}
