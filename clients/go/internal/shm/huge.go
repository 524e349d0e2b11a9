package shm

import (
	"fmt"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	pageBytes = 4 << 10
	hugeBytes = 2 << 20
	// What is smaller gets no huge pages, and no address that would allow them.
	hugeMin = 2 * hugeBytes
	// What one system call collapses: on memory that the machine has not touched before, more would
	// stop the caller for long.
	stepBytes = 8 << 20
)

// How long collapsing may take before 4 KiB pages are the better choice.
const (
	stepMax   = 50 * time.Millisecond
	perMiBMax = 2 * time.Millisecond
)

// alignedHint is an address for a mapping that is a multiple of 2 MiB: only where address and file offset are
// equal modulo 2 MiB does Linux use a file's huge pages. It is free, unless another thread is quicker; then
// Linux maps elsewhere. nil leaves the choice to Linux.
func alignedHint(length int) unsafe.Pointer {
	at, err := reserve(length)
	if err != nil || unix.MunmapPtr(at, roundUp(uintptr(length), pageBytes)) != nil {
		return nil
	}
	return at
}

// reserve takes an address range that begins on a multiple of 2 MiB, for a mapping to be put over it.
func reserve(length int) (unsafe.Pointer, error) {
	kept := roundUp(uintptr(length), pageBytes)
	base, err := unix.MmapPtr(-1, 0, nil, kept+hugeBytes, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("mmap of %d bytes of addresses: %w", kept+hugeBytes, err)
	}
	before := roundUp(uintptr(base), hugeBytes) - uintptr(base)
	at := unsafe.Add(base, before)
	if before > 0 {
		err = unix.MunmapPtr(base, before)
	}
	if err == nil && before < hugeBytes {
		err = unix.MunmapPtr(unsafe.Add(at, kept), hugeBytes-before)
	}
	if err != nil {
		return nil, fmt.Errorf("munmap around %d bytes of addresses: %w", kept, err)
	}
	return at, nil
}

func roundUp(bytes, unit uintptr) uintptr { return (bytes + unit - 1) / unit * unit }

// Collapse gives the whole 2 MiB parts of a range huge pages before they have any: filling those costs a
// seventh. It answers the bytes that are in huge pages now; what is not is as it was. Nobody may have
// written to the range yet, since a byte of each part is zeroed.
//
// It gives up where Linux refuses, and where it is slow: then the memory is scattered, and small pages
// cost less.
func (p Pages) Collapse(offset, length int64) int64 {
	if length < hugeMin || uintptr(p.base)%hugeBytes != 0 {
		return 0
	}
	from, to := (offset+hugeBytes-1)/hugeBytes*hugeBytes, (offset+length)/hugeBytes*hugeBytes
	bytes := p.Bytes()
	var done int64
	var spent time.Duration
	for at := from; at < to; at += stepBytes {
		step := bytes[at:min(at+stepBytes, to)]
		start := time.Now()
		// Linux collapses no range without any page.
		for part := 0; part < len(step); part += hugeBytes {
			step[part] = 0
		}
		if unix.Madvise(step, unix.MADV_COLLAPSE) != nil {
			break
		}
		took := time.Since(start)
		spent += took
		done += int64(len(step))
		if took > stepMax || spent > time.Duration(done>>20)*perMiBMax {
			break
		}
	}
	return done
}
