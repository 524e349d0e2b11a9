//! Turns with costs that are made up: no threads, no clock.

use super::*;

const MS: Duration = Duration::from_millis(1);

fn share(whose: &str) -> Arc<Share> {
    Share::new(whose.into(), usize::MAX, usize::MAX, CpuMeter::default())
}

/// A queue and what a job of each principal costs; a thread runs one job after the other.
struct Bench {
    queue: FairQueue<&'static str>,
    used: HashMap<&'static str, Duration>,
}

impl Bench {
    fn new(slots: usize) -> Self {
        Self {
            queue: FairQueue::new(slots, usize::MAX),
            used: HashMap::new(),
        }
    }

    fn push(&mut self, share: &Arc<Share>, whose: &'static str) -> u64 {
        self.queue.reserve(share).expect("a place");
        self.queue.push(share, whose).0
    }

    /// Runs the next job at that cost. Whose it was.
    fn run(&mut self, cost: impl Fn(&str) -> Duration) -> &'static str {
        let (turn, whose) = self.queue.take().expect("a job");
        let cost = cost(whose);
        self.queue.end(&turn, cost);
        *self.used.entry(whose).or_default() += cost;
        whose
    }

    fn used_ms(&self, whose: &str) -> u128 {
        self.used.get(whose).map_or(0, Duration::as_millis)
    }
}

#[test]
fn a_thousand_long_jobs_of_one_leave_the_next_turn_to_another() {
    let (one, two) = (share("one"), share("two"));
    let mut bench = Bench::new(1);
    for _ in 0..1000 {
        bench.push(&one, "one");
    }
    let (running, _) = bench.queue.take().expect("a job");
    bench.push(&two, "two");
    bench.queue.end(&running, 600_000 * MS);
    assert_eq!(bench.run(|_| MS), "two");
    // It had nothing else: the first one goes on, whatever it owes.
    assert_eq!(bench.run(|_| 600_000 * MS), "one");
    bench.push(&two, "two");
    assert_eq!(bench.run(|_| MS), "two");
}

#[test]
fn each_gets_the_same_time_and_not_the_same_number() {
    let shares = ["one", "two", "three"].map(|whose| (share(whose), whose));
    let mut bench = Bench::new(1);
    for (share, whose) in &shares {
        for _ in 0..20_000 {
            bench.push(share, whose);
        }
    }
    let cost = |whose: &str| match whose {
        "one" => MS,
        "two" => 7 * MS,
        _ => 200 * MS,
    };
    for _ in 0..15_000 {
        bench.run(cost);
    }
    let used = ["one", "two", "three"].map(|whose| bench.used_ms(whose));
    let (least, most) = (used.iter().min().expect("3"), used.iter().max().expect("3"));
    // A job is not divided: one of the longest, and a quantum.
    assert!(most - least <= 410, "{used:?}");
}

#[test]
fn a_lie_about_the_cost_is_paid_afterwards() {
    let (one, two) = (share("one"), share("two"));
    let mut bench = Bench::new(1);
    for _ in 0..200 {
        bench.push(&one, "one");
    }
    for _ in 0..5000 {
        bench.push(&two, "two");
    }
    // Short ones, so that it is thought cheap, then one that is not.
    for _ in 0..100 {
        bench.run(|_| MS);
    }
    while bench.run(|whose| if whose == "one" { 1000 * MS } else { MS }) != "one" {}
    let mut served = 0;
    while bench.run(|_| MS) == "two" {
        served += 1;
    }
    assert!((990..=1020).contains(&served), "{served}");
}

#[test]
fn nobody_starves_among_many() {
    let mut bench = Bench::new(2);
    let names: Vec<&'static str> = (0..300_u32)
        .map(|n| &*Box::leak(n.to_string().into_boxed_str()))
        .collect();
    let shares: Vec<_> = names.iter().map(|name| share(name)).collect();
    // One of them never has less than fifty, each of a hundred turns.
    for round in 0..20 {
        for _ in 0..50 {
            bench.push(&shares[0], names[0]);
        }
        for (share, name) in shares.iter().zip(&names).skip(1) {
            bench.push(share, name);
        }
        for turn in 0..shares.len() {
            let whose = bench.run(|whose| if whose == "0" { 1000 * MS } else { MS });
            assert!(
                whose != "0" || turn == 0 || turn + 1 == shares.len(),
                "{round}: {turn}"
            );
        }
        for name in &names[1..] {
            assert_eq!(bench.used_ms(name), round + 1, "{name}");
        }
    }
}

#[test]
fn what_is_withdrawn_takes_no_turn_and_idle_principals_no_room() {
    let (one, two) = (share("one"), share("two"));
    let mut bench = Bench::new(1);
    let ids: Vec<_> = (0..100).map(|_| bench.push(&one, "one")).collect();
    let other = bench.push(&two, "two");
    for id in &ids[..99] {
        assert_eq!(bench.queue.withdraw(&one, *id), Some("one"));
        assert_eq!(bench.queue.withdraw(&one, *id), None);
    }
    assert_eq!(bench.queue.withdraw(&two, ids[99]), None, "another's");
    assert_eq!(bench.queue.withdraw(&two, other), Some("two"));
    assert_eq!(bench.queue.lanes.len(), 1);
    assert_eq!(one.used().waiting, 1);
    assert_eq!(bench.run(|_| 60_000 * MS), "one");
    assert!(bench.queue.is_empty() && !bench.queue.has_next());
    // A debt is kept while others are there, and as long as it is one.
    bench.push(&one, "one");
    bench.push(&two, "two");
    bench.push(&two, "two");
    assert_eq!(bench.run(|_| 30 * MS), "one");
    assert_eq!(bench.queue.lanes.len(), 2);
    for _ in 0..4 {
        bench.push(&two, "two");
        bench.run(|_| 10 * MS);
    }
    assert_eq!(bench.queue.lanes.len(), 1);
    bench.queue.reserve(&one).expect("a place");
    assert_eq!(bench.queue.lanes.len(), 2);
    bench.queue.give_back(&one);
    assert_eq!(bench.queue.lanes.len(), 1);
}

#[test]
fn quotas_bound_what_waits_and_what_runs() {
    let one = Share::new("one".into(), 2, 1, CpuMeter::default());
    let two = share("two");
    let mut queue = FairQueue::new(4, 3);
    for waits in [false, true, true] {
        queue.reserve(&one).expect("a place");
        assert_eq!(queue.push(&one, "one").1, waits);
    }
    let full = queue.reserve(&one).expect_err("its quota");
    let quota = QueueFull::Quota {
        whose: "one".into(),
        waiting: 2,
        limit: 2,
    };
    assert_eq!(full, quota);
    assert_eq!(
        full.to_string(),
        "2 invocations of one are waiting already, and its quota.queued is 2; \
         wait for some or cancel them, or ask the operator to raise the quota"
    );
    let (turn, _) = queue.take().expect("a job");
    assert!(!queue.has_next() && queue.take().is_none(), "one may run");
    // What waits for its quota keeps no thread from others.
    queue.reserve(&two).expect("a place");
    queue.push(&two, "two");
    assert_eq!(queue.take().expect("a job").1, "two");
    one.set_limits(2, 2);
    assert!(queue.take().is_some());
    queue.end(&turn, MS);
    assert_eq!((one.used().waiting, one.used().running), (1, 1));
    assert_eq!((one.used().runs, one.used().refused), (2, 1));
}

#[test]
fn a_quota_of_nothing_lets_one_wait_and_run() {
    let (one, none) = (
        share("one"),
        Share::new("none".into(), 0, 0, CpuMeter::default()),
    );
    let mut queue = FairQueue::new(1, 100);
    queue.reserve(&one).expect("a place");
    queue.push(&one, "one");
    let (turn, _) = queue.take().expect("a job");
    // The thread is another's.
    queue.reserve(&none).expect("one may wait");
    queue.push(&none, "none");
    let full = queue.reserve(&none).expect_err("a second");
    assert!(
        full.to_string()
            .starts_with("1 invocations of none are waiting already, and its quota.queued is 0;"),
        "{full}"
    );
    // On the extra thread.
    let (own, whose) = queue.take().expect("a job");
    assert_eq!(whose, "none");
    queue
        .reserve(&none)
        .expect("one may wait while another runs");
    queue.give_back(&none);
    queue.end(&own, MS);
    queue.end(&turn, MS);
    queue.reserve(&none).expect("a thread is free");
}

#[test]
fn who_has_used_too_much_cpu_time_has_no_turn_and_takes_nobody_elses() {
    let (one, two) = (share("one"), share("two"));
    let mut queue = FairQueue::new(2, 100);
    one.cpu().set_limit(10);
    one.cpu().count(10_000 * MS);
    queue.reserve(&one).expect("it may wait");
    assert!(queue.push(&one, "one").1, "it waits");
    assert!(queue.begin(&one).is_none() && queue.take().is_none());
    let opening = queue.next_opening().expect("some day");
    let wait = opening.saturating_duration_since(Instant::now());
    assert!((39..=41).contains(&wait.as_secs()), "{wait:?}");
    queue.reserve(&two).expect("a place");
    queue.push(&two, "two");
    let (turn, whose) = queue.take().expect("a job");
    assert_eq!(whose, "two");
    queue.end(&turn, MS);
    one.cpu().set_limit(u64::MAX);
    assert_eq!(queue.next_opening(), None);
    assert_eq!(queue.take().expect("a job").1, "one");
}

#[test]
fn a_full_host_still_takes_the_first_of_each() {
    let mut queue = FairQueue::new(1, 2);
    let (one, two) = (share("one"), share("two"));
    for _ in 0..3 {
        queue.reserve(&one).expect("a place");
        queue.push(&one, ());
    }
    let full = QueueFull::Host { waiting: 2 };
    assert_eq!(queue.reserve(&one), Err(full));
    queue.reserve(&two).expect("its first");
    let full = QueueFull::Host { waiting: 3 };
    assert_eq!(queue.reserve(&two), Err(full));
}
