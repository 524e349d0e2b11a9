//! Which leases are to be renewed, and when. No clock and no I/O: the caller tells the time, asks
//! what is due, and reports how each RENEW was answered.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

/// Leases that are to be renewed together, since one RENEW has one new life.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Renewal {
    pub(super) leases: Vec<u64>,
    pub(super) life: Duration,
}

/// How a RENEW was answered.
#[derive(Debug)]
pub(super) enum Answer {
    /// All of its leases live this long from now.
    Renewed(Duration),
    /// At least one of them is over, for the reason given, and none was renewed.
    Expired(String),
    /// None was renewed, for another reason.
    Failed,
}

/// One RENEW with this many ids of 20 digits stays below the limit of a frame's body.
const RENEW_LEASES_MAX: usize = 2000;
/// A host that grants very short leases is not asked more often than this.
const RENEW_INTERVAL_MIN: Duration = Duration::from_millis(5);
/// GONE frames remembered for leases whose reply has not been looked at yet.
const EARLY_GONE_MAX: usize = 1024;

#[derive(Debug)]
struct Held {
    life: Duration,
    /// When to renew; `None` while a RENEW is under way, or if nothing is to be renewed.
    due: Option<Instant>,
    /// Why it is over.
    gone: Option<String>,
}

/// The leases of one session. Told the time by its caller.
#[derive(Debug, Default)]
pub(super) struct Leases {
    held: HashMap<u64, Held>,
    /// No later than the earliest `due`: looking is put off until then, not done at each change.
    next: Option<Instant>,
    early: VecDeque<(u64, String)>,
    renew: bool,
}

impl Leases {
    pub(super) fn new(renew: bool) -> Self {
        Self {
            renew,
            ..Self::default()
        }
    }

    /// True if [`Leases::next`] came nearer.
    pub(super) fn insert(&mut self, lease: u64, life: Duration, now: Instant) -> bool {
        let early = self.early.iter().position(|(gone, _)| *gone == lease);
        let gone = early
            .and_then(|index| self.early.remove(index))
            .map(|(_, reason)| reason);
        let due = (self.renew && gone.is_none()).then(|| now + interval(life));
        self.held.insert(lease, Held { life, due, gone });
        self.sooner(due)
    }

    fn sooner(&mut self, due: Option<Instant>) -> bool {
        let Some(due) = due else { return false };
        let nearer = self.next.is_none_or(|next| due < next);
        if nearer {
            self.next = Some(due);
        }
        nearer
    }

    /// True if the host still counts it, so that it is to be released.
    pub(super) fn remove(&mut self, lease: u64) -> bool {
        self.held
            .remove(&lease)
            .is_some_and(|held| held.gone.is_none())
    }

    /// The host announced its end.
    pub(super) fn gone(&mut self, lease: u64, reason: String) {
        if let Some(held) = self.held.get_mut(&lease) {
            held.gone = Some(reason);
            held.due = None;
            return;
        }
        // Its reply may still lie unread with a waiter; released ones end up here too.
        if self.early.len() == EARLY_GONE_MAX {
            self.early.pop_front();
        }
        self.early.push_back((lease, reason));
    }

    pub(super) fn why_gone(&self, lease: u64) -> Option<&str> {
        self.held.get(&lease)?.gone.as_deref()
    }

    /// When to ask [`Leases::due`] again.
    pub(super) fn next(&self) -> Option<Instant> {
        self.next
    }

    /// What is to be renewed now. The caller reports each by [`Leases::answered`].
    pub(super) fn due(&mut self, now: Instant) -> Vec<Renewal> {
        if self.next.is_none_or(|next| now < next) {
            return Vec::new();
        }
        let mut by_life: HashMap<Duration, Vec<u64>> = HashMap::new();
        self.next = None;
        for (lease, held) in &mut self.held {
            let Some(due) = held.due else { continue };
            // Half of the waiting time early still saves a frame for each neighbour in time.
            if due <= now + interval(held.life) / 2 {
                held.due = None;
                by_life.entry(held.life).or_default().push(*lease);
            } else if self.next.is_none_or(|next| due < next) {
                self.next = Some(due);
            }
        }
        let whole = by_life.into_iter().flat_map(|(life, mut leases)| {
            leases.sort_unstable();
            let parts: Vec<_> = leases
                .chunks(RENEW_LEASES_MAX)
                .map(<[u64]>::to_vec)
                .collect();
            parts
                .into_iter()
                .map(move |leases| Renewal { leases, life })
        });
        whole.collect()
    }

    /// Takes in how a RENEW was answered. Returns what is to be renewed instead, at once.
    pub(super) fn answered(
        &mut self,
        renewal: Renewal,
        answer: Answer,
        now: Instant,
    ) -> Vec<Renewal> {
        match (answer, &renewal.leases[..]) {
            (Answer::Renewed(life), leases) => {
                self.renewed(leases, life, now);
                Vec::new()
            }
            (Answer::Expired(message), &[lease]) => {
                self.gone(lease, message);
                Vec::new()
            }
            // Without those that are known to be over by now, or half and half to find out which.
            (Answer::Expired(_), leases) => {
                let live = |lease: &u64| self.held.get(lease).is_some_and(|h| h.gone.is_none());
                let left: Vec<u64> = leases.iter().copied().filter(live).collect();
                let parts = if left.len() < leases.len() { 1 } else { 2 };
                left.chunks(left.len().div_ceil(parts).max(1))
                    .map(|part| Renewal {
                        leases: part.to_vec(),
                        life: renewal.life,
                    })
                    .collect()
            }
            // Not repeated: the leases then end on their own, and GONE tells.
            (Answer::Failed, _) => Vec::new(),
        }
    }

    /// The host gave them a new life. True if [`Leases::next`] came nearer.
    pub(super) fn renewed(&mut self, leases: &[u64], life: Duration, now: Instant) -> bool {
        let mut nearer = false;
        for lease in leases {
            let Some(held) = self.held.get_mut(lease) else {
                continue;
            };
            held.life = life;
            held.due = (self.renew && held.gone.is_none()).then(|| now + interval(life));
            let due = held.due;
            nearer |= self.sooner(due);
        }
        nearer
    }
}

fn interval(life: Duration) -> Duration {
    (life / 2).max(RENEW_INTERVAL_MIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn leases_are_renewed_together_at_half_of_their_life() {
        let start = Instant::now();
        let mut leases = Leases::new(true);
        assert!(leases.insert(1, MINUTE, start));
        assert!(!leases.insert(2, MINUTE, start + MINUTE / 10));
        assert!(leases.insert(3, MINUTE / 2, start));
        assert_eq!(leases.next(), Some(start + MINUTE / 4));
        assert_eq!(leases.due(start), []);

        let now = start + MINUTE / 4;
        assert_eq!(leases.due(now - MINUTE / 60), []);
        let due = leases.due(now);
        assert!(
            due.contains(&Renewal {
                leases: vec![3],
                life: MINUTE / 2
            }),
            "{due:?}"
        );
        // Lease 1 is due within half of its waiting time, lease 2 is not.
        assert!(
            due.contains(&Renewal {
                leases: vec![1],
                life: MINUTE
            }),
            "{due:?}"
        );
        assert_eq!(leases.next(), Some(start + MINUTE / 10 + MINUTE / 2));

        let now = start + MINUTE;
        assert_eq!(
            leases.due(now),
            [Renewal {
                leases: vec![2],
                life: MINUTE
            }]
        );
        assert_eq!(
            leases.next(),
            None,
            "nothing is asked twice while a RENEW is under way"
        );

        assert!(leases.renewed(&[1, 2], MINUTE, now));
        assert_eq!(leases.next(), Some(now + MINUTE / 2));
        assert_eq!(
            leases.due(now + MINUTE / 2),
            [Renewal {
                leases: vec![1, 2],
                life: MINUTE
            }]
        );
    }

    #[test]
    fn the_one_of_many_that_is_over_is_found_by_halves() {
        let start = Instant::now();
        let mut leases = Leases::new(true);
        for lease in 0..1000 {
            leases.insert(lease, MINUTE, start);
        }
        let now = start + MINUTE / 2;
        let mut asked = 0;
        let mut due = leases.due(now);
        while let Some(renewal) = due.pop() {
            asked += 1;
            let answer = if renewal.leases.contains(&700) {
                Answer::Expired("over".into())
            } else {
                Answer::Renewed(2 * MINUTE)
            };
            due.extend(leases.answered(renewal, answer, now));
        }
        assert!(asked <= 2 * 10 + 1, "{asked} frames");
        assert_eq!(leases.why_gone(700), Some("over"));
        assert_eq!(leases.next(), Some(now + MINUTE));
        let renewed = leases.due(now + MINUTE).pop().expect("the others are due");
        assert_eq!(renewed.leases.len(), 999);
        assert_eq!(renewed.life, 2 * MINUTE);
    }

    #[test]
    fn those_known_to_be_over_are_left_out_of_the_next_attempt() {
        let start = Instant::now();
        let mut leases = Leases::new(true);
        for lease in 1..=4 {
            leases.insert(lease, MINUTE, start);
        }
        let now = start + MINUTE / 2;
        let due = leases.due(now).pop().expect("all are due");
        leases.gone(2, "expired".into());
        assert!(leases.remove(3), "it was released");
        assert_eq!(
            leases.answered(due, Answer::Expired("one is over".into()), now),
            [Renewal {
                leases: vec![1, 4],
                life: MINUTE
            }]
        );
    }

    #[test]
    fn a_renew_that_failed_is_not_repeated() {
        let start = Instant::now();
        let mut leases = Leases::new(true);
        leases.insert(1, MINUTE, start);
        let due = leases.due(start + MINUTE).pop().expect("it is due");
        assert_eq!(leases.answered(due, Answer::Failed, start + MINUTE), []);
        assert_eq!(leases.next(), None);
        assert_eq!(leases.why_gone(1), None, "the host has not said so");
        assert!(leases.remove(1), "so it is still to be released");
    }

    #[test]
    fn a_lease_that_is_gone_is_neither_renewed_nor_released() {
        let start = Instant::now();
        let mut leases = Leases::new(true);
        leases.insert(1, MINUTE, start);
        leases.gone(1, "expired".into());
        assert_eq!(leases.why_gone(1), Some("expired"));
        assert_eq!(leases.due(start + MINUTE), []);
        assert!(!leases.remove(1));
        assert!(!leases.remove(1));
    }

    #[test]
    fn an_end_announced_before_its_lease_is_known_counts() {
        let mut leases = Leases::new(true);
        leases.gone(7, "expired".into());
        leases.insert(7, MINUTE, Instant::now());
        assert_eq!(leases.why_gone(7), Some("expired"));
        for lease in 100..100 + 2 * EARLY_GONE_MAX as u64 {
            leases.gone(lease, String::new());
        }
        assert_eq!(leases.early.len(), EARLY_GONE_MAX);
    }

    #[test]
    fn many_leases_are_renewed_in_frames_that_fit() {
        let start = Instant::now();
        let mut leases = Leases::new(true);
        let ids = (u64::MAX - 4999)..=u64::MAX;
        for lease in ids {
            leases.insert(lease, MINUTE, start);
        }
        let due = leases.due(start + MINUTE);
        assert_eq!(
            due.iter()
                .map(|renewal| renewal.leases.len())
                .sum::<usize>(),
            5000
        );
        for Renewal { leases, .. } in due {
            let body = crate::wire::Leases {
                leases,
                lease_ms: Some(u64::MAX),
                request_id: None,
            };
            let bytes = serde_json::to_vec(&body).expect("it serialises").len();
            assert!(bytes <= crate::wire::BODY_BYTES_MAX, "{bytes}");
        }
    }

    #[test]
    fn nothing_is_renewed_when_that_is_switched_off() {
        let start = Instant::now();
        let mut leases = Leases::new(false);
        assert!(!leases.insert(1, MINUTE, start));
        assert_eq!(leases.next(), None);
        assert!(leases.remove(1));
    }
}
