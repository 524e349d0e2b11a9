package strait

import (
	"slices"
	"time"
)

const (
	// One RENEW or RELEASE with this many ids of 20 digits fits into a frame.
	renewMax = 2000
	// A host that grants very short leases is not asked more often than this.
	renewIntervalMin = 5 * time.Millisecond
	// GONE frames remembered for leases whose reply has not been looked at yet.
	earlyGoneMax = 1024
)

// leases is what one session holds, and when each is to be renewed. Its caller tells it the time and
// guards it.
type leases struct {
	held map[uint64]*heldLease
	// Not after the earliest due time of a lease; zero: nothing is due.
	next  time.Time
	early []earlyGone
	renew bool
}

type heldLease struct {
	life time.Duration
	// Zero while a RENEW is under way, and if nothing is to be renewed.
	due  time.Time
	over bool
	why  string
}

type earlyGone struct {
	lease uint64
	why   string
}

// renewal is leases that are renewed together, since one RENEW has one new life.
type renewal struct {
	leases []uint64
	life   time.Duration
}

func newLeases(renew bool) leases {
	return leases{held: map[uint64]*heldLease{}, renew: renew}
}

func renewInterval(life time.Duration) time.Duration {
	return max(life/2, renewIntervalMin)
}

// insert says whether next came nearer.
func (l *leases) insert(lease uint64, life time.Duration, now time.Time) bool {
	held := &heldLease{life: life}
	l.held[lease] = held
	if i := slices.IndexFunc(l.early, func(e earlyGone) bool { return e.lease == lease }); i >= 0 {
		held.over, held.why = true, l.early[i].why
		l.early = slices.Delete(l.early, i, i+1)
	}
	return l.schedule(held, now)
}

func (l *leases) schedule(held *heldLease, now time.Time) bool {
	if !l.renew || held.over {
		return false
	}
	held.due = now.Add(renewInterval(held.life))
	if l.next.IsZero() || held.due.Before(l.next) {
		l.next = held.due
		return true
	}
	return false
}

// remove says whether the host still counts it, so that it is to be released.
func (l *leases) remove(lease uint64) bool {
	held, known := l.held[lease]
	delete(l.held, lease)
	return known && !held.over
}

// gone: the host announced its end.
func (l *leases) gone(lease uint64, why string) {
	if held, known := l.held[lease]; known {
		held.over, held.why, held.due = true, why, time.Time{}
		return
	}
	// The reply that grants it may still be with its waiter; released ones end up here too.
	if len(l.early) == earlyGoneMax {
		l.early = slices.Delete(l.early, 0, 1)
	}
	l.early = append(l.early, earlyGone{lease, why})
}

// why says whether a lease is over.
func (l *leases) why(lease uint64) (string, bool) {
	held, known := l.held[lease]
	if !known {
		return "released", true
	}
	return held.why, held.over
}

// due is what is to be renewed now. Each is reported by renewed or gone.
func (l *leases) due(now time.Time) []renewal {
	if l.next.IsZero() || now.Before(l.next) {
		return nil
	}
	l.next = time.Time{}
	byLife := map[time.Duration][]uint64{}
	for lease, held := range l.held {
		switch {
		case held.due.IsZero():
		// Half of the waiting time early saves a frame for each neighbour in time.
		case !held.due.After(now.Add(renewInterval(held.life) / 2)):
			held.due = time.Time{}
			byLife[held.life] = append(byLife[held.life], lease)
		case l.next.IsZero() || held.due.Before(l.next):
			l.next = held.due
		}
	}
	var all []renewal
	for life, ids := range byLife {
		slices.Sort(ids)
		for some := range slices.Chunk(ids, renewMax) {
			all = append(all, renewal{some, life})
		}
	}
	return all
}

// renewed says whether next came nearer.
func (l *leases) renewed(ids []uint64, life time.Duration, now time.Time) bool {
	sooner := false
	for _, lease := range ids {
		if held, known := l.held[lease]; known {
			held.life = life
			sooner = l.schedule(held, now) || sooner
		}
	}
	return sooner
}
