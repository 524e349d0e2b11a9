package strait

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// How long a cancelled call waits for the host to say that the kernel is over. Kernels stop within
// milliseconds; after this time the host is taken to be stuck.
const cancelGrace = 2 * time.Second

// conn is one connection, shared by any number of goroutines.
//
//	request ── write ─▶ host ── reader goroutine ─▶ waiting[sequence] ─▶ request
//	                                  └─ GONE ─▶ leases ◀─ upkeep goroutine: renewals, lost tensors
type conn struct {
	socket *net.UnixConn
	raw    syscall.RawConn
	log    *slog.Logger
	// Called by whoever notices that the connection is over.
	epitaph func() string
	// Of elements beside one request.
	payloadRoom int
	// For how long a call of what is prepared looks for its reply before it sleeps.
	spin time.Duration
	// Held to write one frame. A channel, so that a context can end the wait for it.
	writing chan struct{}

	// Held for short: over maps, never over a write or a wait.
	mu       sync.Mutex
	sequence uint32
	waiting  map[uint32]*waiter
	leases   leases
	drain    time.Time
	// What was prepared, and channels, end with the connection.
	lines map[finisher]struct{}
	// Tensors that the garbage collector found, and leases that could not be released at once.
	lost    []*handle
	pending []uint64
	// Why the connection is over; set once, before done is closed.
	err  error
	done chan struct{}
	// Wakes upkeep; has room for one.
	wake chan struct{}

	copiedBytes atomic.Int64
	// What else was copied, for a host that is not on this machine; else nil.
	copiedFar   func() int64
	hugeBytes   atomic.Int64
	calls       atomic.Int64
	mappings    atomic.Int64
	lostTensors atomic.Int64
}

// waiter is a request that is not answered yet. Once nobody waits for it, what its reply grants is
// given back.
type waiter struct {
	reply     chan reply
	abandoned bool
}

// reply is a frame with its descriptors, which its holder closes.
type reply struct {
	op   op
	body []byte
	beside
	// This process may open no more descriptors, so that some were lost.
	lost bool
}

func newConn(socket *net.UnixConn, o *dialOptions) (*conn, error) {
	raw, err := socket.SyscallConn()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("strait: a socket without a descriptor: %w", err), socket.Close())
	}
	sendBuffer := 0
	// If Linux does not say, no tensor travels in frames.
	_ = raw.Control(func(fd uintptr) { sendBuffer, _ = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF) })
	c := &conn{
		socket:      socket,
		raw:         raw,
		log:         o.log,
		spin:        o.spin,
		epitaph:     o.epitaph,
		payloadRoom: payloadRoom(sendBuffer),
		writing:     make(chan struct{}, 1),
		waiting:     map[uint32]*waiter{},
		leases:      newLeases(o.renew),
		lines:       map[finisher]struct{}{},
		done:        make(chan struct{}),
		wake:        make(chan struct{}, 1),
	}
	go c.read()
	go c.upkeep()
	return c, nil
}

// request sends body and reads the reply into into (a pointer, or nil). The descriptors that came
// with the reply are the caller's to close, a payload is its own.
//
// When ctx ends, a running INVOKE or PREPARE is cancelled and its end waited for; other requests are abandoned.
func (c *conn) request(ctx context.Context, op op, body request, with beside, into any) (beside, error) {
	answer, err := c.exchange(ctx, op, body, with)
	if err != nil {
		return beside{}, err
	}
	if answer.op == opError {
		closeAll(answer.fds)
		remote := &RemoteError{}
		if err := decodeBody(answer.body, remote); err != nil {
			return beside{}, err
		}
		return beside{}, remote
	}
	err = answer.check(op)
	if err == nil && into != nil {
		err = decodeBody(answer.body, into)
	}
	if err != nil {
		c.giveBack(answer)
		return beside{}, err
	}
	return answer.beside, nil
}

// check says whether a reply that is no error can be one to asked.
func (r *reply) check(asked op) error {
	if greeting := r.op == opWelcome; greeting != (asked == opHello) {
		return protocolError("op %d answers op %d", r.op, asked)
	}
	if len(r.payload) != 0 && asked != opInvoke {
		return protocolError("%d payload bytes answer op %d; only the OK to INVOKE carries a payload", len(r.payload), asked)
	}
	if r.lost {
		return fmt.Errorf("strait: a reply's descriptor could not be received: %w: release tensors, or raise the limit (ulimit -n)", unix.EMFILE)
	}
	return nil
}

// ask is request for a reply without descriptors.
func (c *conn) ask(ctx context.Context, op op, body request, into any) error {
	came, err := c.request(ctx, op, body, beside{}, into)
	closeAll(came.fds)
	return err
}

func (c *conn) exchange(ctx context.Context, op op, body request, with beside) (reply, error) {
	if err := ended(ctx); err != nil {
		return reply{}, err
	}
	id, err := requestID(ctx)
	if err != nil {
		return reply{}, err
	}
	body.trace(id)
	sequence, waiter, err := c.expect()
	if err != nil {
		return reply{}, err
	}
	if err := c.send(ctx, op, sequence, body, with); err != nil {
		c.forget(sequence)
		return reply{}, err
	}
	select {
	case answer := <-waiter.reply:
		return answer, nil
	case <-c.done:
		return c.answered(waiter)
	case <-ctx.Done():
	}
	if op == opInvoke || op == opPrepare {
		if answer, ok := c.cancel(sequence, waiter); ok {
			if answer.op == opError {
				return reply{}, cancelled(ctx, answer)
			}
			return answer, nil
		}
	}
	c.abandon(sequence, waiter)
	return reply{}, ended(ctx)
}

// ended is why a context is over, nil if it is not: its own error, and the cause if somebody gave one.
// A deadline that has passed counts although its timer may not have fired yet.
func ended(ctx context.Context) error {
	err := ctx.Err()
	if err == nil {
		if deadline, limited := ctx.Deadline(); limited && !time.Now().Before(deadline) {
			return context.DeadlineExceeded
		}
		return nil
	}
	if cause := context.Cause(ctx); !errors.Is(cause, err) {
		return fmt.Errorf("%w: %w", err, cause)
	}
	return err
}

// answered is for the end of the connection, which a reply may have preceded.
func (c *conn) answered(w *waiter) (reply, error) {
	select {
	case answer := <-w.reply:
		return answer, nil
	default:
		return reply{}, c.end()
	}
}

// cancel ends a running INVOKE or PREPARE and waits for its reply; false if none came in time.
func (c *conn) cancel(sequence uint32, w *waiter) (reply, bool) {
	ctx, stop := context.WithTimeout(context.Background(), cancelGrace)
	defer stop()
	c.tell(ctx, opCancel, &cancelRequest{Sequence: sequence})
	select {
	case answer := <-w.reply:
		return answer, true
	case <-c.done:
		answer, err := c.answered(w)
		return answer, err == nil
	case <-ctx.Done():
		return reply{}, false
	}
}

// cancelled has both the host's word and the context's, so that errors.Is finds either.
func cancelled(ctx context.Context, answer reply) error {
	closeAll(answer.fds)
	remote := &RemoteError{}
	if err := decodeBody(answer.body, remote); err != nil {
		return err
	}
	return fmt.Errorf("%w: %w", ended(ctx), remote)
}

// tell sends a request whose answer does not matter.
func (c *conn) tell(ctx context.Context, op op, body request) error {
	sequence, waiter, err := c.expect()
	if err != nil {
		return err
	}
	if err := c.send(ctx, op, sequence, body, beside{}); err != nil {
		c.forget(sequence)
		return err
	}
	c.abandon(sequence, waiter)
	return nil
}

// expect takes a sequence that no request under way has.
func (c *conn) expect() (uint32, *waiter, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return 0, nil, c.err
	}
	for {
		c.sequence++
		if _, taken := c.waiting[c.sequence]; c.sequence != 0 && !taken {
			w := &waiter{reply: make(chan reply, 1)}
			c.waiting[c.sequence] = w
			return c.sequence, w, nil
		}
	}
}

// forget is for a request that was not sent.
func (c *conn) forget(sequence uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.waiting, sequence)
}

// abandon is for a request whose reply nobody waits for any more.
func (c *conn) abandon(sequence uint32, w *waiter) {
	c.mu.Lock()
	w.abandoned = true
	c.mu.Unlock()
	select {
	case answer := <-w.reply:
		c.giveBack(answer)
	default:
		// Its sequence stays taken until the host answers.
	}
}

// giveBack closes a reply's descriptors and releases its leases.
func (c *conn) giveBack(answer reply) {
	closeAll(answer.fds)
	if answer.op == opError {
		return
	}
	var granted grantedLeases
	if json.Unmarshal(answer.body, &granted) != nil {
		return
	}
	leases := []uint64{}
	if granted.Lease != 0 {
		leases = append(leases, granted.Lease)
	}
	for _, result := range granted.Results {
		if result.Lease != 0 {
			leases = append(leases, result.Lease)
		}
	}
	if len(leases) > 0 {
		// By upkeep: this may be the reader, which must not wait for the socket.
		c.later(leases, nil)
	}
}

// send writes one frame. A SEQPACKET socket takes all of it or nothing, so a context that ends the
// wait leaves the connection whole.
func (c *conn) send(ctx context.Context, op op, sequence uint32, body request, with beside) error {
	frame, err := encodeFrame(header{op: op, sequence: sequence}, body, with.payload)
	if err != nil {
		return err
	}
	var rights []byte
	if len(with.fds) > 0 {
		rights = unix.UnixRights(with.fds...)
	}
	select {
	case c.writing <- struct{}{}:
		defer func() { <-c.writing }()
	case <-ctx.Done():
		return ended(ctx)
	case <-c.done:
		return c.end()
	}
	err = c.write(frame, rights)
	if errors.Is(err, unix.EAGAIN) {
		err = c.writeWaiting(ctx, frame, rights)
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		return ended(ctx)
	}
	c.finish(c.broken(err))
	return c.end()
}

func (c *conn) broken(err error) error {
	if over := c.end(); over != nil {
		return over
	}
	return fmt.Errorf("strait: %w: %w%s", ErrDisconnected, err, c.epitaph())
}

// write does not wait: EAGAIN says that the socket is full, which it hardly ever is.
func (c *conn) write(frame, rights []byte) error {
	var sent error
	err := c.raw.Write(func(fd uintptr) bool {
		for {
			if sent = unix.Sendmsg(int(fd), frame, rights, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL); sent != unix.EINTR {
				return true
			}
		}
	})
	return errors.Join(err, sent)
}

func (c *conn) writeWaiting(ctx context.Context, frame, rights []byte) error {
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(interrupted)
		// It fails only on a closed socket, on which the write does not wait.
		_ = c.socket.SetWriteDeadline(time.Unix(1, 0))
	})
	_, _, err := c.socket.WriteMsgUnix(frame, rights, nil)
	if !stop() {
		<-interrupted
		_ = c.socket.SetWriteDeadline(time.Time{})
	}
	return err
}

// post is tell for a caller that does not wait at all; false if the socket is full or somebody writes.
func (c *conn) post(op op, body request) bool {
	sequence, waiter, err := c.expect()
	if err != nil {
		// The connection is over, and what was to be told with it.
		return true
	}
	frame, err := encodeFrame(header{op: op, sequence: sequence}, body, nil)
	if err == nil {
		select {
		case c.writing <- struct{}{}:
			err = c.write(frame, nil)
			<-c.writing
		default:
			err = unix.EAGAIN
		}
	}
	if err != nil {
		c.forget(sequence)
		return false
	}
	c.abandon(sequence, waiter)
	return true
}

// read hands every reply to whoever waits for it, until the connection is over.
func (c *conn) read() {
	// One byte more than a frame may have, so that a longer one is noticed.
	packet := make([]byte, frameBytesMax+1)
	control := make([]byte, unix.CmsgSpace(4*fdsMax))
	for {
		n, controlled, flags, _, err := c.socket.ReadMsgUnix(packet, control)
		fds, rightsErr := descriptors(control[:controlled])
		switch {
		case err == io.EOF:
			err = fmt.Errorf("strait: %w: the host closed it%s", ErrDisconnected, c.epitaph())
		case err != nil:
			err = c.broken(err)
		case rightsErr != nil:
			err = rightsErr
		case flags&unix.MSG_TRUNC != 0 || flags&unix.MSG_CTRUNC != 0 && len(fds) == fdsMax:
			err = protocolError("a frame of more than %d bytes, or with more than %d descriptors", frameBytesMax, fdsMax)
		default:
			err = c.dispatch(packet[:n], fds, flags&unix.MSG_CTRUNC != 0)
		}
		if err != nil {
			closeAll(fds)
			c.finish(err)
			return
		}
	}
}

func descriptors(control []byte) ([]int, error) {
	if len(control) == 0 {
		return nil, nil
	}
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return nil, protocolError("control data of a frame: %w", err)
	}
	var fds []int
	for i := range messages {
		// Other kinds of control data are not asked for and carry no descriptors.
		if rights, err := unix.ParseUnixRights(&messages[i]); err == nil {
			fds = append(fds, rights...)
		}
	}
	return fds, nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		// Closing a descriptor of a memory file has nothing to fail at.
		_ = unix.Close(fd)
	}
}

// dispatch takes over fds unless it returns an error, which ends the connection.
func (c *conn) dispatch(packet []byte, fds []int, lost bool) error {
	h, body, payload, err := decodeFrame(packet)
	if err != nil {
		return err
	}
	op, sequence := h.op, h.sequence
	switch {
	case op == opGone:
		var gone gonePush
		if err := decodeBody(body, &gone); err != nil {
			return err
		}
		c.mu.Lock()
		c.leases.gone(gone.Lease, gone.Reason)
		c.mu.Unlock()
	case op == opShutdown:
		var shutdown shutdownPush
		if err := decodeBody(body, &shutdown); err != nil {
			return err
		}
		c.mu.Lock()
		c.drain = time.Now().Add(duration(shutdown.DrainMS))
		c.mu.Unlock()
	case op == opError && sequence == 0:
		// About a frame that the host could not read; it closes the connection after that.
		var remote RemoteError
		if err := decodeBody(body, &remote); err != nil {
			return err
		}
		return protocolError("it refused a frame: %w", &remote)
	case op == opOK || op == opWelcome || op == opError:
		return c.deliver(sequence, reply{op, append([]byte(nil), body...), beside{aligned(payload), fds}, lost})
	default:
		return protocolError("op %d is not for clients", op)
	}
	closeAll(fds)
	return nil
}

func (c *conn) deliver(sequence uint32, answer reply) error {
	c.mu.Lock()
	w, known := c.waiting[sequence]
	delete(c.waiting, sequence)
	wanted := known && !w.abandoned
	if wanted {
		w.reply <- answer
	}
	c.mu.Unlock()
	switch {
	case !known:
		// Whoever waits for the right one would wait for ever.
		return protocolError("a reply to request %d, which is not under way", sequence)
	case !wanted:
		c.giveBack(answer)
	}
	return nil
}

// finish ends the connection for everybody who waits. The first reason stands.
func (c *conn) finish(why error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	c.err = why
	close(c.done)
	for l := range c.lines {
		l.finish(why)
	}
	clear(c.lines)
	// Whatever it returns, the connection is over.
	_ = c.socket.Close()
}

// finisher is what has a socket of its own and ends with its connection.
type finisher interface{ finish(why error) }

// add has l end with the connection, at once if that is over.
func (c *conn) add(l finisher) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		l.finish(c.err)
		return c.err
	}
	c.lines[l] = struct{}{}
	return nil
}

func (c *conn) remove(l finisher) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.lines, l)
}

// end is why the connection is over; nil while it is not.
func (c *conn) end() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}
