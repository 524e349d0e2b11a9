package strait

import (
	"encoding/json"
	"math"
	"reflect"
	"runtime"
	"slices"
	"testing"
	"time"
)

// collect runs the garbage collector until happened.
func collect(t *testing.T, happened func() bool) {
	t.Helper()
	for range 200 {
		if runtime.GC(); happened() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatal("the garbage collector did not find it")
}

func TestLeasesAreRenewedTogetherAtHalfOfTheirLife(t *testing.T) {
	start := time.Now()
	at := func(seconds int) time.Time { return start.Add(time.Duration(seconds) * time.Second) }
	l := newLeases(true)
	if !l.insert(1, time.Minute, start) || l.insert(2, time.Minute, at(6)) || !l.insert(3, 30*time.Second, start) {
		t.Error("only 1 and 3 bring the next renewal nearer")
	}
	if !l.next.Equal(at(15)) || l.due(at(14)) != nil {
		t.Error(l.next)
	}
	due := l.due(at(15))
	slices.SortFunc(due, func(a, b renewal) int { return int(a.life - b.life) })
	// Lease 1 is due within half of its waiting time, lease 2 is not.
	if !reflect.DeepEqual(due, []renewal{{[]uint64{3}, 30 * time.Second}, {[]uint64{1}, time.Minute}}) || !l.next.Equal(at(36)) {
		t.Error(due, l.next)
	}
	if due := l.due(at(60)); !reflect.DeepEqual(due, []renewal{{[]uint64{2}, time.Minute}}) || !l.next.IsZero() {
		t.Error("nothing is asked twice while a RENEW is under way:", due)
	}
	if !l.renewed([]uint64{1, 2}, time.Minute, at(60)) || !l.next.Equal(at(90)) {
		t.Error(l.next)
	}
	if due := l.due(at(90)); !reflect.DeepEqual(due, []renewal{{[]uint64{1, 2}, time.Minute}}) {
		t.Error(due)
	}
}

func TestALeaseIsRenewedAtHalfOfItsLifeButNotMoreOftenThanEach5Milliseconds(t *testing.T) {
	for life, want := range map[time.Duration]time.Duration{
		time.Minute: 30 * time.Second, 20 * time.Millisecond: 10 * time.Millisecond, time.Millisecond: 5 * time.Millisecond, 0: 5 * time.Millisecond,
	} {
		start := time.Now()
		l := newLeases(true)
		l.insert(1, life, start)
		if got := l.next.Sub(start); got != want {
			t.Errorf("a lease of %v is renewed after %v, not %v", life, got, want)
		}
	}
}

func TestALeaseThatIsGoneIsNeitherRenewedNorReleased(t *testing.T) {
	start := time.Now()
	l := newLeases(true)
	l.insert(1, time.Minute, start)
	l.gone(1, "expired")
	if why, gone := l.why(1); !gone || why != "expired" {
		t.Error(why)
	}
	if due := l.due(start.Add(time.Minute)); due != nil || l.remove(1) || l.remove(1) {
		t.Error(due)
	}
}

func TestAnEndThatComesBeforeItsLeaseCounts(t *testing.T) {
	l := newLeases(true)
	l.gone(7, "expired")
	l.insert(7, time.Minute, time.Now())
	if _, gone := l.why(7); !gone {
		t.Error("it is over")
	}
	for lease := range uint64(2 * earlyGoneMax) {
		l.gone(100+lease, "")
	}
	if len(l.early) != earlyGoneMax {
		t.Error(len(l.early))
	}
}

func TestManyLeasesAreRenewedInFramesThatFit(t *testing.T) {
	l := newLeases(true)
	start := time.Now()
	for i := range uint64(5000) {
		l.insert(math.MaxUint64-i, time.Minute, start)
	}
	count := 0
	for _, renewal := range l.due(start.Add(time.Minute)) {
		count += len(renewal.leases)
		text, err := json.Marshal(&leasesRequest{Leases: renewal.leases, LeaseMS: math.MaxInt64})
		if err != nil || len(text) > bodyBytesMax {
			t.Error(len(text), err)
		}
	}
	if count != 5000 {
		t.Error(count)
	}
}

func TestWithoutRenewalNothingIsDue(t *testing.T) {
	l := newLeases(false)
	if l.insert(1, time.Minute, time.Now()) || !l.next.IsZero() || !l.remove(1) {
		t.Error(l)
	}
}
