// Package arrowalloc builds Arrow arrays in shared memory, so that kernels of a strait host read
// them in place.
//
//	a := arrowalloc.New(nil)
//	b := array.NewFloat64Builder(a)       // any arrow-go code that takes an allocator
//	…
//	x, err := a.Input(ctx, client, b.NewFloat64Array())
//	res, err := client.Call(ctx, "zscore", strait.Inputs{"x": x}, strait.Param("axis", 0))
//	y, err := arrowalloc.Array(res.Tensor("y"))
//
// As with every allocator that is not Go's own, arrays must be released: their memory is the
// process's until then, and gone afterwards.
package arrowalloc

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/apache/arrow-go/v18/arrow/memory"

	"strait/internal/shm"
)

// Tensors in a segment start on multiples of this, so smaller buffers are not worth a segment. They
// come from the Go heap and are copied when they are used.
const blockBytes = 64 << 10

// Allocator is a memory.Allocator whose buffers of 64 KiB and more are shared memory: each is a memory
// file of its own, which grows without being copied and takes one descriptor. Any number of
// goroutines may use it at once.
//
// An allocator cannot report errors. If Linux gives no shared memory (no descriptor, no space) it
// logs that and uses the Go heap, so that such arrays are copied when they are used.
type Allocator struct {
	heap memory.Allocator
	log  *slog.Logger
	huge atomic.Int64

	mu sync.Mutex
	// By the address of the first byte.
	blocks map[*byte]*block
}

var _ memory.Allocator = (*Allocator)(nil)

// block is one buffer in shared memory.
type block struct {
	file  *os.File
	pages shm.Pages
	// The allocator's count.
	huge *atomic.Int64
	// Handed to a host: it cannot be resized any more.
	sealed bool
	// Replaced by a read-only mapping.
	frozen bool
}

// New makes an allocator. Failures to get shared memory are logged to log; nil is slog.Default.
func New(log *slog.Logger) *Allocator {
	if log == nil {
		log = slog.Default()
	}
	return &Allocator{heap: memory.NewGoAllocator(), log: log, blocks: map[*byte]*block{}}
}

// HugeBytes of all buffers so far that got huge pages before their first fill: those of 4 MiB and more,
// where Linux has huge pages at hand.
func (a *Allocator) HugeBytes() int64 { return a.huge.Load() }

// Allocate returns size bytes of zeroed memory, aligned to 64 bytes or more.
func (a *Allocator) Allocate(size int) []byte {
	if size < blockBytes {
		return a.heap.Allocate(size)
	}
	b, err := a.newBlock(size)
	if err != nil {
		a.log.Warn("strait: no shared memory for a buffer, taking the Go heap", "bytes", size, "error", err)
		return a.heap.Allocate(size)
	}
	return a.put(b)[:size]
}

func (a *Allocator) newBlock(size int) (*block, error) {
	length := int64(roundUp(size))
	file, err := shm.NewFile("strait-arrow")
	if err != nil {
		return nil, err
	}
	b := &block{file: file, huge: &a.huge}
	err = file.Truncate(length)
	if err == nil {
		b.pages, err = shm.Map(b.fd(), length, true)
	}
	if err == nil {
		err = b.populate(0, length)
	}
	if err != nil {
		return nil, errors.Join(err, b.free())
	}
	return b, nil
}

// populate gives a new part of the file pages: huge ones as far as Linux has them, as those are to be had
// only before there are others.
func (b *block) populate(from, to int64) error {
	b.huge.Add(b.pages.Collapse(from, to-from))
	return shm.Allocate(b.fd(), to)
}

func roundUp(size int) int { return (size + blockBytes - 1) / blockBytes * blockBytes }

func (b *block) fd() int { return int(b.file.Fd()) }

// resize does not copy. If it fails the bytes are what they were, but perhaps elsewhere in memory.
func (b *block) resize(size int) error {
	length := roundUp(size)
	switch {
	case length > b.pages.Len():
		before := int64(b.pages.Len())
		if err := b.file.Truncate(int64(length)); err != nil {
			return err
		}
		if err := b.pages.Resize(length); err != nil {
			return err
		}
		return b.populate(before, int64(length))
	case length < b.pages.Len():
		// The mapping first: a page behind the file's end would be a SIGBUS.
		if err := b.pages.Resize(length); err != nil {
			return err
		}
		return b.file.Truncate(int64(length))
	}
	return nil
}

func (b *block) free() error {
	return errors.Join(b.pages.Unmap(), b.file.Close())
}

// Reallocate gives a buffer of this allocator another size. The new bytes may be anything, as with
// arrow-go's own allocator.
func (a *Allocator) Reallocate(size int, old []byte) []byte {
	b := a.take(old)
	if b == nil && size < blockBytes {
		return a.heap.Reallocate(size, old)
	}
	// Not under the lock: Linux may have many pages to make.
	if b != nil && !b.sealed && size >= blockBytes && b.resize(size) == nil {
		return a.put(b)[:size]
	}
	kept := old
	if b != nil {
		kept = b.pages.Bytes()[:min(len(old), b.pages.Len())]
	}
	moved := a.Allocate(size)
	copy(moved, kept)
	a.free(b, old)
	return moved
}

// Free takes a buffer back. Buffers of others are left alone.
func (a *Allocator) Free(old []byte) { a.free(a.take(old), old) }

// free is for a block that was taken, or nil for a buffer of the heap.
func (a *Allocator) free(b *block, old []byte) {
	if b == nil {
		a.heap.Free(old)
		return
	}
	if err := b.free(); err != nil {
		a.log.Error("strait: a buffer could not be freed", "error", err)
	}
}

func (a *Allocator) put(b *block) []byte {
	bytes := b.pages.Bytes()
	a.mu.Lock()
	defer a.mu.Unlock()
	a.blocks[&bytes[0]] = b
	return bytes
}

// take is at for a block that is to be resized or freed.
func (a *Allocator) take(old []byte) *block {
	a.mu.Lock()
	defer a.mu.Unlock()
	b := a.at(old)
	if b != nil {
		delete(a.blocks, unsafe.SliceData(old))
	}
	return b
}

// at is the block that begins where old does, nil if there is none; called with the lock held.
func (a *Allocator) at(old []byte) *block {
	if cap(old) == 0 {
		return nil
	}
	return a.blocks[unsafe.SliceData(old)]
}

// around is the block that data lies in, and where.
func (a *Allocator) around(buffer, data []byte) (*block, int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	b := a.at(buffer)
	if b == nil {
		return nil, 0
	}
	offset, inside := shm.Offset(b.pages.Bytes(), data)
	if !inside {
		return nil, 0
	}
	return b, offset
}

// lend seals a block so that a host takes it while this process can still write.
func (a *Allocator) lend(b *block) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	b.sealed = true
	return shm.SealLent(b.fd())
}

// seal ends writing to a block for good.
func (a *Allocator) seal(b *block) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	b.sealed = true
	if !b.frozen {
		if err := b.pages.Freeze(b.fd()); err != nil {
			return err
		}
		b.frozen = true
	}
	if err := shm.SealWrite(b.fd()); err != nil {
		return fmt.Errorf("strait: an array that is a kernel's input as well; release that input first: %w", err)
	}
	return nil
}
