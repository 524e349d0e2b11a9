//! What happens when the operating system refuses: nothing is lost, nothing is reused that
//! may not be ours, and the process goes on.

mod common;

use std::process::Command;
use std::sync::Arc;

use rustix::mm::{MapFlags, ProtFlags};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use strait_memory::{
    Copied, GuestSpaces, Lot, ParkError, PoolSegment, ResultPool, SCRAP_BYTES, Scrap, Sealed,
    Segment, process,
};

const MIB: u64 = 1 << 20;

/// Runs the test `name` again in a process of its own, with `STRAIT_LIMITS` set; true there.
fn alone(name: &str) -> bool {
    if std::env::var_os("STRAIT_LIMITS").is_some() {
        return true;
    }
    let status = Command::new(std::env::current_exe().expect("ours"))
        .args(["--exact", name, "--nocapture"])
        .env("STRAIT_LIMITS", "1")
        .status()
        .expect("it runs");
    assert!(status.success(), "{status}");
    false
}

struct Setting {
    lot: Arc<Lot>,
    pool: Arc<ResultPool>,
    spaces: Arc<GuestSpaces>,
    input: Segment<Sealed>,
    result: PoolSegment,
    expected: Vec<u8>,
}

impl Setting {
    fn new(bytes: u64) -> Self {
        let budget = common::budget();
        let expected = common::pattern(1, bytes);
        let segment = Segment::create(bytes, &budget).expect("fits");
        segment
            .write_at(0, &expected, &Copied::new())
            .expect("within");
        let pool = ResultPool::new(Arc::clone(&budget), 1 << 30);
        let result = pool
            .take(bytes, common::key(1), pool.budget())
            .expect("fits");
        result
            .pages()
            .write_at(0, &expected, &Copied::new())
            .expect("at home");
        Self {
            lot: Lot::new(100, 1 << 30),
            result,
            pool,
            spaces: GuestSpaces::new(4),
            input: segment.seal().expect("unmapped"),
            expected,
        }
    }

    fn result_is_lost(&self) -> bool {
        self.result.read_at(0, &mut [0], &Copied::new()).is_err()
    }

    /// Whatever happened to a call, both segments hold what they held; a result whose pages
    /// were lost (which its call must have said) is replaced by a new one, as a caller would.
    fn check(&mut self, refused: bool) {
        let copied = Copied::new();
        let mut written = vec![0; self.expected.len()];
        if self.result.read_at(0, &mut written, &copied).is_ok() {
            assert!(written == self.expected);
        } else {
            assert!(refused);
            self.result = self
                .pool
                .take(self.result.bytes(), common::key(1), self.pool.budget())
                .expect("fits");
            self.result
                .pages()
                .write_at(0, &self.expected, &copied)
                .expect("at home");
        }
        assert!(*self.input.map().expect("sealed") == *self.expected);
    }

    /// One call, all the way.
    fn call(&mut self) -> Result<(), ParkError> {
        let bytes = self.input.bytes();
        let space = self.spaces.take(1 << 30)?;
        space.make_accessible(0, 256 << 20)?;
        let input = self.lot.take_input(&self.input, 0..bytes)?;
        let at = space.base() + (2 << 20);
        let input = input.move_into(0..bytes, &space, at).map_err(|refused| {
            let error = refused.error;
            self.lot.give_back(refused.parked);
            error
        })?;
        let Some(output) = self.result.pages().take_parked() else {
            return Err(ParkError::Spent {
                inode: self.result.inode(),
            });
        };
        let at = space.base() + (128 << 20);
        let output = match output.move_into(0..bytes, &space, at) {
            Ok(output) => output,
            Err(refused) => {
                self.result.pages().put_parked(refused.parked);
                return Err(refused.error);
            }
        };
        let home = output.move_home();
        match home {
            Ok(parked) => self.result.pages().put_parked(parked),
            Err(poisoned) => {
                assert!(space.is_poisoned());
                poisoned
                    .parked
                    .into_iter()
                    .for_each(|parked| self.result.pages().put_parked(parked));
                return Err(poisoned.error);
            }
        }
        let input = input.move_home().map_err(|poisoned| poisoned.error)?;
        self.lot.give_back(input);
        Ok(())
    }
}

#[test]
fn too_little_address_space() {
    if !alone("too_little_address_space") {
        return;
    }
    let mut setting = Setting::new(8 * MIB);
    setting.call().expect("no limit");
    let unlimited = getrlimit(Resource::As);
    let mut refused = 0;
    for step in 0..64 {
        let limit = Rlimit {
            current: Some(address_space() + step * MIB - 40 * MIB),
            maximum: unlimited.maximum,
        };
        setrlimit(Resource::As, limit).expect("a soft limit");
        let result = setting.call();
        setrlimit(Resource::As, unlimited).expect("soft limits go up again");
        refused += usize::from(result.is_err());
        setting.check(result.is_err());
        setting.call().expect("no limit");
    }
    setting.check(false);
    assert!(
        refused > 0 && refused < 64,
        "{refused} of 64 calls were refused"
    );
}

/// Bytes of address space that this process has mapped.
fn address_space() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("/proc is there");
    let pages = statm.split(' ').next().expect("seven numbers");
    pages.parse::<u64>().expect("a number") * 4096
}

#[test]
fn too_many_mappings() {
    if !alone("too_many_mappings") {
        return;
    }
    if process::mappings_max() > 200_000 {
        eprintln!("vm.max_map_count is too high to be reached");
        return;
    }
    let mut setting = Setting::new(4 * MIB);
    setting.call().expect("room");
    let before = process::counts().expect("/proc is there");
    let mut fillers = Vec::with_capacity(200_000);
    while let Some(filler) = Filler::new(fillers.len()) {
        fillers.push(filler);
    }
    let mut refused = 0;
    while let Err(error) = setting.call() {
        assert!(matches!(error, ParkError::System { .. }), "{error}");
        refused += 1;
        assert!(
            refused < 40,
            "still refused, and mappings to spare: {error}"
        );
        // Going home needs more than going in did, so a result may be lost just here.
        let lost = setting.result_is_lost();
        fillers.truncate(fillers.len() - if lost { 10 } else { 1 });
        if lost {
            setting.check(true);
        }
    }
    drop(fillers);
    assert!(refused > 0, "the limit was never felt");
    setting.check(true);
    for _ in 0..20 {
        setting.call().expect("room");
    }
    let after = process::counts().expect("/proc is there");
    assert!(
        after.mappings <= before.mappings + 6,
        "{before:?} {after:?}"
    );
}

/// One mapping, which does not merge with those of the indices beside it.
struct Filler(*mut libc::c_void);

impl Filler {
    fn new(index: usize) -> Option<Self> {
        let rights = [ProtFlags::empty(), ProtFlags::READ][index % 2];
        let anywhere = std::ptr::null_mut();
        // SAFETY: a null address lets the operating system choose unused addresses.
        unsafe { rustix::mm::mmap_anonymous(anywhere, 4096, rights, MapFlags::PRIVATE) }
            .ok()
            .map(Self)
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and nobody has a reference into it.
        unsafe { rustix::mm::munmap(self.0, 4096) }.expect("ours");
    }
}

#[test]
fn what_a_guest_stores_is_bounded_without_descriptors_too() {
    if !alone("what_a_guest_stores_is_bounded_without_descriptors_too") {
        return;
    }
    const BYTES: u64 = 5 * MIB;
    let setting = Setting::new(BYTES);
    let space = setting.spaces.take(1 << 30).expect("address space");
    space.make_accessible(0, 16 << 20).expect("within");
    let window = setting
        .lot
        .take_input(&setting.input, 0..BYTES)
        .expect("room")
        .move_into(0..BYTES, &space, space.base() + (2 << 20))
        .expect("it is accessible");
    let limit = getrlimit(Resource::Nofile);
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: Some(0),
            ..limit
        },
    )
    .expect("lower");
    let (range, scrap) = (window.fault_range(), Scrap::new());
    // SAFETY: the window is in its guest.
    assert!(unsafe { range.divert_in_signal(&scrap) });
    setrlimit(Resource::Nofile, limit).expect("as it was");
    for at in (range.start..range.end).step_by(4096) {
        let seen = at - range.start >= SCRAP_BYTES;
        // SAFETY: the window shows memory that can be read and written.
        assert_eq!(unsafe { common::peek(at) }, u8::from(seen) * 7, "{at:#x}");
        // SAFETY: as above.
        unsafe { common::poke(at, 7) };
    }
    assert_eq!(scrap.dirtied_bytes(), SCRAP_BYTES as u64);
    assert!(window.move_home().expect("it can be covered").is_spent());
    assert!(*setting.input.map().expect("sealed") == *setting.expected);
    // SAFETY: accessible again.
    assert_eq!(unsafe { common::peek(range.start) }, 0);
}
