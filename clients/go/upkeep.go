package strait

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// The upkeep of a connection's leases: lease.go says when each is to be renewed, and this does it.

// hold begins the upkeep of a lease.
func (c *conn) hold(lease uint64, life time.Duration) {
	c.mu.Lock()
	sooner := c.leases.insert(lease, life, time.Now())
	c.mu.Unlock()
	if sooner {
		c.rouse()
	}
}

// release gives leases back without waiting for the answer, nor for a host that reads nothing: then the
// upkeep goroutine does.
func (c *conn) release(leases ...uint64) {
	c.mu.Lock()
	held := leases[:0]
	for _, lease := range leases {
		if c.leases.remove(lease) {
			held = append(held, lease)
		}
	}
	c.mu.Unlock()
	if len(held) == 0 {
		return
	}
	if !c.post(opRelease, &leasesRequest{Leases: held}) {
		c.later(held, nil)
	}
}

// leaseError says whether, and why, a lease is over, or the connection. Without a lease (0) there is none to end.
func (c *conn) leaseError(lease uint64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return c.err
	}
	if lease == 0 {
		return nil
	}
	if why, gone := c.leases.why(lease); gone {
		return fmt.Errorf("strait: %w: lease %d (%s); its pages stay readable until Release, for anything else fetch the flight again",
			ErrLeaseExpired, lease, why)
	}
	return nil
}

// later hands leases to release, or a tensor that the garbage collector found, to upkeep.
func (c *conn) later(leases []uint64, lost *handle) {
	c.mu.Lock()
	over := c.err != nil
	if !over {
		c.pending = append(c.pending, leases...)
		if lost != nil {
			c.lost = append(c.lost, lost)
		}
	}
	c.mu.Unlock()
	switch {
	case !over:
		c.rouse()
	case lost != nil:
		// Upkeep may have ended, and without a connection there is nothing to wait for.
		lost.found()
	}
}

func (c *conn) rouse() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// upkeep renews leases, releases what nobody wants, and gives back what the garbage collector found.
func (c *conn) upkeep() {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		c.mu.Lock()
		lost, pending := c.lost, c.pending
		c.lost, c.pending = nil, nil
		due := c.leases.due(time.Now())
		next := c.leases.next
		c.mu.Unlock()
		for _, handle := range lost {
			handle.found()
		}
		for len(pending) > 0 {
			some := pending[:min(len(pending), renewMax)]
			pending = pending[len(some):]
			// Only the end of the connection hinders this, and that ends the leases as well.
			_ = c.tell(context.Background(), opRelease, &leasesRequest{Leases: some})
		}
		for _, renewal := range due {
			c.renewAll(renewal)
		}
		wait := time.Hour
		if !next.IsZero() {
			wait = time.Until(next)
		}
		timer.Reset(wait)
		select {
		case <-timer.C:
		case <-c.wake:
		case <-c.done:
			c.mu.Lock()
			lost := c.lost
			c.lost = nil
			c.mu.Unlock()
			for _, handle := range lost {
				handle.found()
			}
			return
		}
	}
}

func (c *conn) renewAll(r renewal) {
	ctx, stop := context.WithTimeout(context.Background(), max(r.life/4, time.Second))
	defer stop()
	_, err := c.renew(ctx, r.leases, r.life)
	switch {
	case err == nil || c.end() != nil:
	case errors.Is(err, ErrLeaseExpired) && len(r.leases) == 1:
		c.mu.Lock()
		c.leases.gone(r.leases[0], err.Error())
		c.mu.Unlock()
	case errors.Is(err, ErrLeaseExpired):
		// One of them is over and none was renewed: find out which.
		for _, lease := range r.leases {
			c.renewAll(renewal{[]uint64{lease}, r.life})
		}
	default:
		// Not repeated: the leases end on their own then, and GONE tells.
		c.log.Warn("strait: leases were not renewed", "leases", r.leases, "error", err)
	}
}

// renew gives leases a new life; 0 asks for the host's default.
func (c *conn) renew(ctx context.Context, leases []uint64, life time.Duration) (time.Duration, error) {
	var renewed renewReply
	if err := c.ask(ctx, opRenew, &leasesRequest{Leases: leases, LeaseMS: milliseconds(life)}, &renewed); err != nil {
		return 0, err
	}
	granted := duration(renewed.ExpiresMS)
	c.mu.Lock()
	sooner := c.leases.renewed(leases, granted, time.Now())
	c.mu.Unlock()
	if sooner {
		c.rouse()
	}
	return granted, nil
}
