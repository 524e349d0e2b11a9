"""When leases are renewed, by a clock that each test sets."""

import pytest

from strait import _wire
from strait._leases import IN_FRAME_MAX, Leases, renew_interval


@pytest.mark.parametrize("life, interval", [(60.0, 30.0), (0.02, 0.01), (0.001, 0.005), (0.0, 0.005)])
def test_a_lease_is_renewed_at_half_of_its_life_but_not_more_often_than_each_5_ms(life, interval):
    assert renew_interval(life) == interval
    leases = Leases(renew=True)
    assert leases.hold(1, life, 100.0) == 100.0 + interval == leases.next_due()
    assert leases.due(100.0 + interval / 2 - 1e-6) == []
    # Half of the waiting time early: with a neighbour.
    assert leases.due(100.0 + interval / 2 + 1e-6) == [(life, [1])]


def test_neighbours_in_time_are_renewed_together_and_each_life_by_itself():
    leases = Leases(renew=True)
    leases.hold(1, 60, 0)
    leases.hold(2, 60, 6)
    leases.hold(3, 30, 0)
    assert leases.next_due() == 15
    # Lease 1 is due within half of its waiting time, lease 2 is not.
    assert sorted(leases.due(15)) == [(30, [3]), (60, [1])]
    leases.renewed([1, 3], 60, 15)
    assert leases.next_due() == 36
    assert leases.due(36) == [(60, [1, 2, 3])]
    leases.renewed([1, 2, 3], 60, 36)
    assert (leases.due(36), leases.next_due()) == ([], 66)


def test_what_was_not_renewed_stays_due():
    leases = Leases(renew=True)
    leases.hold(1, 60, 0)
    assert leases.due(30) == leases.due(31) == [(60, [1])]


def test_a_lease_that_is_over_is_not_renewed():
    leases = Leases(renew=True)
    leases.hold(1, 60, 0)
    assert (leases.left(1, 10), leases.why_gone(1)) == (50, None)
    leases.gone(1, "expired")
    # An answer to RENEW that was under way does not bring it back.
    leases.renewed([1], 60, 10)
    assert (leases.left(1, 10), leases.why_gone(1), leases.due(100), leases.next_due()) == (0, "expired", [], None)
    leases.end([1, 2])
    assert (leases.left(1, 10), leases.why_gone(1)) == (0, None)


def test_an_end_that_comes_before_its_lease_counts():
    leases = Leases(renew=True)
    leases.gone(7, "expired")
    assert leases.hold(7, 60, 0) is None and leases.why_gone(7) == "expired"
    # Only the last 1024 are remembered.
    for lease in range(100, 100 + 2048):
        leases.gone(lease, "expired")
    assert leases.hold(1123, 60, 0) == 30 and leases.hold(1124, 60, 0) is None


def test_many_leases_are_renewed_in_frames_that_fit():
    leases = Leases(renew=True)
    ids = [2**64 - 1 - n for n in range(2 * IN_FRAME_MAX + 1)]
    for lease in ids:
        leases.hold(lease, 60, 0)
    due = leases.due(30)
    assert [len(some) for _, some in due] == [IN_FRAME_MAX, IN_FRAME_MAX, 1]
    assert [lease for _, some in due for lease in some] == ids
    for _, some in due:
        _wire.encode(_wire.Op.RENEW, 1, {"leases": some, "lease_ms": 2**53})


def test_without_renewal_nothing_is_due():
    leases = Leases(renew=False)
    assert leases.hold(1, 60, 0) is None
    assert (leases.due(59), leases.next_due(), leases.left(1, 59)) == ([], None, 1)
