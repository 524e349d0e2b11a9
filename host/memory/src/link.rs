//! Memory between guests: what one of them writes, others read.

use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::MemfdFlags;

use crate::pages::{FileAccess, Reservation};
use crate::{
    Budget, GUEST_PAGE, HUGE, Inode, MemoryError, Open, ParkError, Parked, Segment, to_usize,
};

/// A small segment that is mapped into one guest for writing and into others for reading, for as long as they run. Nobody else
/// ever has it, so that it has no seals.
#[derive(Debug)]
pub struct LinkPages {
    segment: Segment<Open>,
    bytes: usize,
    /// For what moves within it; mapped when something does.
    own: Option<Reservation>,
    mappings: Arc<Budget>,
}

impl LinkPages {
    /// Most bytes that one can have: a confined process may have no larger file.
    pub const BYTES_MAX: u64 = HUGE;

    /// New memory of `bytes` bytes, whole guest pages.
    ///
    /// # Errors
    /// [`MemoryError::System`]: Linux gives none.
    ///
    /// # Panics
    /// If there are none, or they are no whole guest pages or more than [`Self::BYTES_MAX`], which is our own bug.
    pub fn create(bytes: u64) -> Result<Self, MemoryError> {
        assert!(
            bytes > 0 && bytes.is_multiple_of(GUEST_PAGE) && bytes <= Self::BYTES_MAX,
            "{bytes} bytes between two guests"
        );
        let failed = |what| move |errno| MemoryError::system(what, bytes, errno);
        let fd = rustix::fs::memfd_create(c"strait-link", MemfdFlags::CLOEXEC)
            .map_err(failed("memfd_create"))?;
        rustix::fs::ftruncate(&fd, bytes).map_err(failed("ftruncate"))?;
        let counted = Budget::new("bytes between guests", u64::MAX);
        Ok(Self {
            segment: Segment::<Open>::of_host(fd, bytes, &counted)?,
            bytes: to_usize(bytes),
            own: None,
            mappings: Budget::new("mappings between guests", u64::MAX),
        })
    }

    /// Its bytes.
    pub fn bytes(&self) -> u64 {
        self.segment.bytes()
    }

    /// Which shared-memory object it is.
    pub fn inode(&self) -> Inode {
        self.segment.inode()
    }

    /// A mapping for who writes.
    ///
    /// # Errors
    /// [`MemoryError::Park`].
    pub fn writer(&self) -> Result<Parked, MemoryError> {
        Ok(Parked::whole(&self.segment, self.mappings.try_reserve(1)?)?)
    }

    /// A mapping for one that reads.
    ///
    /// # Errors
    /// [`MemoryError::Park`].
    pub fn reader(&self) -> Result<Parked, MemoryError> {
        let charge = self.mappings.try_reserve(1)?;
        Ok(Parked::of_link(&self.segment, charge)?)
    }

    /// Moves `bytes` bytes from `from` to the front, while no guest runs that has it.
    ///
    /// # Errors
    /// [`MemoryError::Park`]: Linux maps no more.
    ///
    /// # Panics
    /// If there are not as many, which is our own bug.
    pub fn bring_forward(&mut self, from: usize, bytes: usize) -> Result<(), MemoryError> {
        const PIECE: usize = 16 << 10;
        let end = from.checked_add(bytes);
        assert!(
            end.is_some_and(|end| end <= self.bytes),
            "{bytes} bytes from {from} on, of {}",
            self.bytes
        );
        let own = match self.own.take() {
            Some(own) => own,
            None => {
                let access = FileAccess::SharedReadWrite;
                Reservation::of_file(self.segment.fd().as_fd(), self.bytes, access)
                    .map_err(ParkError::system("mmap", self.bytes))?
            }
        };
        let mut piece = [0; PIECE];
        let mut done = 0;
        while done < bytes {
            let piece = &mut piece[..PIECE.min(bytes - done)];
            // SAFETY: mapped as long as `own` is, of a file that nobody shrinks; the range is checked above.
            unsafe { own.copy_out(from + done, piece) };
            // SAFETY: as above, and mapped writable. What is overwritten was read before, or comes before `from`.
            unsafe { own.copy_in(done, piece) };
            done += piece.len();
        }
        self.own = Some(own);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::GuestSpaces;

    const PAGE: usize = 64 << 10;

    #[test]
    fn readers_see_what_the_writer_wrote_and_where_it_was_moved() {
        let mut link = LinkPages::create(2 * GUEST_PAGE).expect("memory");
        let spaces = GuestSpaces::new(2);
        let space = || {
            let space = spaces.take(1 << 24).expect("address space");
            space.make_accessible(0, 4 * PAGE).expect("memory");
            space
        };
        let (one, two) = (space(), space());
        let mut writer = link.writer().expect("a mapping");
        let text: Vec<u8> = (0..=250).cycle().take(2 * PAGE).collect();
        writer.copy_in(0, &text);
        let all = 0..2 * GUEST_PAGE;
        let window = writer.move_into(all.clone(), &one, one.base() + PAGE);
        let reader = link.reader().expect("a mapping");
        assert_eq!(reader.inode(), link.inode());
        let reading = reader.move_into(all, &two, two.base());
        let (window, reading) = (window.expect("moved"), reading.expect("moved"));
        link.bring_forward(100, 2 * PAGE - 100).expect("a mapping");
        link.bring_forward(7, 0).expect("nothing");
        let reader = reading.move_home().expect("home");
        let mut seen = vec![0; 2 * PAGE];
        reader.copy_out(0, &mut seen);
        assert_eq!(seen[..2 * PAGE - 100], text[100..]);
        assert_eq!(seen[2 * PAGE - 100..], text[2 * PAGE - 100..]);
        drop(window);
    }
}
