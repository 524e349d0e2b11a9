// Package shm is the home of everything unsafe in the Go client: mappings of memory files and the
// casts from their bytes to elements.
//
// A mapping is outside the Go heap. The garbage collector does not see who still reads it, so
// nothing here unmaps by itself.
package shm

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Pages is a mapping of the first Len bytes of a memory file. The zero value maps nothing.
type Pages struct {
	base   unsafe.Pointer
	length int
}

// Map maps the first length bytes of the file behind fd, shared, readable, and writable if write.
// Children of this process do not inherit the pages. From 4 MiB on it begins on a multiple of 2 MiB.
//
// It fails if the file is shorter than length: an access past its end would be a SIGBUS.
func Map(fd int, length int64, write bool) (Pages, error) {
	if err := checkLength(fd, length); err != nil {
		return Pages{}, err
	}
	var at unsafe.Pointer
	if length >= hugeMin {
		at = alignedHint(int(length))
	}
	return mapAt(fd, at, int(length), write, 0)
}

func checkLength(fd int, length int64) error {
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return fmt.Errorf("fstat of a segment: %w", err)
	}
	if length <= 0 || length > stat.Size || int64(int(length)) != length {
		return fmt.Errorf("a mapping of %d bytes of a segment that has %d", length, stat.Size)
	}
	return nil
}

// CheckSeals refuses a file that can become shorter below a mapping, where an access would be a SIGBUS, and,
// if it is to be readOnly for good, one that somebody can still write to.
func CheckSeals(fd int, readOnly bool) error {
	seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	switch {
	case err != nil:
		return fmt.Errorf("a segment that is not a memory file: fcntl: %w", err)
	case seals&unix.F_SEAL_SHRINK == 0:
		return fmt.Errorf("a segment whose memory file is not sealed against shrinking (seals %#x)", seals)
	case readOnly && seals&unix.F_SEAL_WRITE == 0:
		return fmt.Errorf("a segment that is said to be sealed against writing, but its memory file is not (seals %#x)", seals)
	}
	return nil
}

func mapAt(fd int, at unsafe.Pointer, length int, write bool, flags int) (Pages, error) {
	protection := unix.PROT_READ
	if write {
		protection |= unix.PROT_WRITE
	}
	base, err := unix.MmapPtr(fd, 0, at, uintptr(length), protection, flags|unix.MAP_SHARED)
	// Some versions of Linux refuse to map a write-sealed file shared. Private is the same for a
	// reader, as nobody can write to such a file any more.
	if err != nil && !write {
		base, err = unix.MmapPtr(fd, 0, at, uintptr(length), protection, flags|unix.MAP_PRIVATE)
	}
	if err != nil {
		return Pages{}, fmt.Errorf("mmap of %d bytes: %w", length, err)
	}
	pages := Pages{base, length}
	if err := unix.Madvise(pages.Bytes(), unix.MADV_DONTFORK); err != nil {
		// At a fixed address the caller's mapping is replaced already and stays the caller's.
		if flags&unix.MAP_FIXED == 0 {
			err = errors.Join(err, pages.Unmap())
		}
		return Pages{}, fmt.Errorf("madvise of %d bytes: %w", length, err)
	}
	return pages, nil
}

// Bytes is the mapped memory. It is valid until Unmap or Resize.
func (p Pages) Bytes() []byte {
	return unsafe.Slice((*byte)(p.base), p.length)
}

// Word is the 4 bytes at offset, a multiple of 4, which another process may load and store at the same time. It is valid until
// Unmap or Resize.
func (p Pages) Word(offset int) *atomic.Uint32 {
	word := p.Bytes()[offset : offset+4]
	return (*atomic.Uint32)(unsafe.Pointer(unsafe.SliceData(word)))
}

// Len is the mapping's length in bytes.
func (p Pages) Len() int { return p.length }

// Freeze replaces a writable mapping of the file behind fd by a read-only one at the same address.
// Afterwards this process cannot write to it, and does not keep others from sealing it.
func (p Pages) Freeze(fd int) error {
	if err := checkLength(fd, int64(p.length)); err != nil {
		return err
	}
	// A shared mapping made from a descriptor that can write counts as writable in older versions
	// of Linux, whatever its protection.
	readOnly, err := unix.Open("/proc/self/fd/"+strconv.Itoa(fd), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("opening a segment read-only: %w", err)
	}
	_, err = mapAt(readOnly, p.base, p.length, false, unix.MAP_FIXED)
	return errors.Join(err, unix.Close(readOnly))
}

// Resize gives the mapping another length, which the file has. The pages may move to grow; from 4 MiB on
// they begin on a multiple of 2 MiB then.
func (p *Pages) Resize(length int) error {
	base, err := p.remap(length)
	if err != nil {
		return fmt.Errorf("mremap from %d to %d bytes: %w", p.length, length, err)
	}
	p.base, p.length = base, length
	return nil
}

func (p *Pages) remap(length int) (unsafe.Pointer, error) {
	from, to := uintptr(p.length), uintptr(length)
	if length < hugeMin || length < p.length {
		return unix.MremapPtr(p.base, from, nil, to, unix.MREMAP_MAYMOVE)
	}
	if uintptr(p.base)%hugeBytes == 0 {
		if base, err := unix.MremapPtr(p.base, from, nil, to, 0); err == nil {
			return base, nil
		}
	}
	at, err := reserve(length)
	if err != nil {
		return nil, err
	}
	// If it fails the reservation may be gone and its addresses somebody else's, so it is not given back.
	return unix.MremapPtr(p.base, from, at, to, unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED)
}

// Unmap ends the mapping. Whoever reads its bytes afterwards crashes.
func (p *Pages) Unmap() error {
	if p.base == nil {
		return nil
	}
	if err := unix.MunmapPtr(p.base, uintptr(p.length)); err != nil {
		return fmt.Errorf("munmap of %d bytes: %w", p.length, err)
	}
	*p = Pages{}
	return nil
}

// NewFile makes an empty memory file that can be sealed. Its name is for people who read
// /proc/PID/maps.
func NewFile(name string) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// Allocate gives the file real pages for its first length bytes: a host takes no file with holes.
func Allocate(fd int, length int64) error {
	if err := unix.Fallocate(fd, 0, 0, length); err != nil {
		return fmt.Errorf("fallocate of %d bytes of shared memory: %w", length, err)
	}
	return nil
}

// SealLent forbids resizing, and every writable mapping but those that exist.
func SealLent(fd int) error {
	return seal(fd, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_FUTURE_WRITE)
}

// SealWrite forbids resizing and writing. It fails while anybody maps the file writable.
func SealWrite(fd int) error {
	return seal(fd, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE)
}

func seal(fd, seals int) error {
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
		return fmt.Errorf("sealing a memory file: %w", err)
	}
	return nil
}

// View is bytes as elements. The caller has checked that bytes is a whole number of elements at an
// address that is aligned for them; every bit pattern must be a valid T.
func View[T any](bytes []byte) []T {
	var zero T
	if len(bytes) == 0 {
		return []T{}
	}
	return unsafe.Slice((*T)(unsafe.Pointer(unsafe.SliceData(bytes))), len(bytes)/int(unsafe.Sizeof(zero)))
}

// Raw is elements as bytes. T has no pointers.
func Raw[T any](elements []T) []byte {
	var zero T
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(elements))), len(elements)*int(unsafe.Sizeof(zero)))
}

// Offset is how far slice begins behind the beginning of within, and whether all of slice lies in it.
func Offset(within, slice []byte) (int, bool) {
	base := uintptr(unsafe.Pointer(unsafe.SliceData(within)))
	at := uintptr(unsafe.Pointer(unsafe.SliceData(slice)))
	if at < base || at-base > uintptr(len(within)) || uintptr(len(slice)) > uintptr(len(within))-(at-base) {
		return 0, false
	}
	return int(at - base), true
}

// Overlap says whether two slices have a byte in common.
func Overlap(a, b []byte) bool {
	if len(a) == 0 || len(b) == 0 {
		return false
	}
	begin, other := uintptr(unsafe.Pointer(unsafe.SliceData(a))), uintptr(unsafe.Pointer(unsafe.SliceData(b)))
	return begin < other+uintptr(len(b)) && other < begin+uintptr(len(a))
}
