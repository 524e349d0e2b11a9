package strait

import (
	"context"
	"fmt"
	"io"
	"math"
	"runtime"
	"slices"
	"sync/atomic"
	"time"

	"strait/internal/shm"
)

// Tensor is elements in shared memory: of a tensor to fill, of a flight or of a result. It is
// contiguous and row-major. Any number of goroutines may use it at once.
//
// A small result is an exception that need not concern its user: it came in the reply (see InlineBytes), its elements
// are of the Go heap and have no segment, but the rules and the methods are the same. It costs nobody anything when it
// is forgotten.
//
// Its memory is not the Go heap's. Bytes, As and TensorOf.Data lend a slice of it, and Go cannot see
// who still has that slice. So the rules are:
//
//   - A slice is valid until Release of the tensor that lent it; reading it later crashes the
//     program or reads something else. Copy what has to live longer (slices.Clone).
//   - Only Release takes lent memory away. A tensor that lent a slice and is forgotten stays mapped,
//     and occupies the host, until the process ends; ClientStats counts it and the log names it.
//   - A tensor that never lent a slice (it went from one Call to the next, or was used by View,
//     WriteTo and ReadFrom only) is given back when the garbage collector finds it.
//   - Writing to a slice of a read-only tensor is a memory fault that ends the program; ask Writable.
type Tensor struct {
	// By value nowhere: the handle is what the cleanup gets, which must not reach the Tensor.
	handle  *handle
	cleanup runtime.Cleanup
	// Why there is no tensor; all methods return it.
	missing error
}

// handle is one tensor's share in its segment.
type handle struct {
	segment  *segment
	place    *Place
	released atomic.Bool
	lent     atomic.Bool
	// Its memory was looked at, so that it may be filled; guarded by the segment.
	born bool
}

func newTensor(s *segment, place *Place) *Tensor {
	t := &Tensor{handle: &handle{segment: s, place: place}}
	if s.lease == 0 {
		return t
	}
	// Only queued: the cleanup goroutine is for everybody's and must not wait for a socket.
	t.cleanup = runtime.AddCleanup(t, func(h *handle) { s.conn.later(nil, h) }, t.handle)
	return t
}

// missingTensor fails with err wherever it is used.
func missingTensor(err error) *Tensor { return &Tensor{missing: err} }

// found is for a handle whose tensor the garbage collector found.
func (h *handle) found() {
	if h.released.Swap(true) {
		return
	}
	if !h.lent.Load() {
		h.segment.drop()
		return
	}
	h.segment.conn.lostTensors.Add(1)
	h.segment.conn.log.Warn("strait: a tensor was forgotten without Release; it stays mapped because a slice of it may live",
		"tensor", h.place.Name, "spec", spec(h.place.DType, h.place.Shape), "segment", h.segment.mapping.Segment)
}

// begin starts a use of the pages, to be ended by segment.drop.
func (t *Tensor) begin() (*handle, error) {
	if t == nil {
		return nil, argumentError("a nil tensor")
	}
	if t.missing != nil {
		return nil, t.missing
	}
	h := t.handle
	if h.segment.use() {
		if !h.released.Load() {
			return h, nil
		}
		// Another tensor of the segment keeps it mapped.
		h.segment.drop()
	}
	return nil, fmt.Errorf("strait: %w: %q", ErrReleased, h.place.Name)
}

// Err says why the tensor cannot be used: nil if it can be a kernel's input, ErrReleased, ErrDisconnected,
// or ErrLeaseExpired, after which its elements stay readable.
func (t *Tensor) Err() error {
	h, err := t.begin()
	if err != nil {
		return err
	}
	defer h.segment.drop()
	return h.segment.conn.leaseError(h.segment.lease)
}

// Name is the tensor's name in its segment: an output port's for a result.
func (t *Tensor) Name() string { return t.place().Name }

// DType is the type of the elements.
func (t *Tensor) DType() DType { return t.place().DType }

// Shape is the sizes of the axes, the last one fastest. Empty: one element.
func (t *Tensor) Shape() []int { return slices.Clone(t.place().Shape) }

// Len is the number of elements.
func (t *Tensor) Len() int {
	place := t.place()
	if place.Length == 0 {
		return 0
	}
	return int(place.Length) / place.DType.Size()
}

// ByteLen is the number of bytes.
func (t *Tensor) ByteLen() int { return int(t.place().Length) }

// place is empty for a tensor that is missing.
func (t *Tensor) place() *Place {
	if t == nil || t.handle == nil {
		return &Place{}
	}
	return t.handle.place
}

// Mapping is what the host said about the tensor's segment when it was made or fetched; empty for a small result,
// which has none.
func (t *Tensor) Mapping() Mapping {
	if t == nil || t.handle == nil || t.handle.segment.lease == 0 {
		return Mapping{}
	}
	mapping := t.handle.segment.mapping
	// A copy, since the places say where the memory of the tensors is.
	mapping.Tensors = slices.Clone(mapping.Tensors)
	for i := range mapping.Tensors {
		mapping.Tensors[i].Shape = slices.Clone(mapping.Tensors[i].Shape)
	}
	return mapping
}

// Writable says whether the elements can be written: a tensor that this client made and did not
// publish.
func (t *Tensor) Writable() bool {
	h, err := t.begin()
	if err != nil {
		return false
	}
	defer h.segment.drop()
	return h.segment.writable()
}

// Bytes lends the elements' bytes: little-endian, row-major. See Tensor for how long.
//
// The error is ErrReleased after Release.
func (t *Tensor) Bytes() ([]byte, error) {
	h, err := t.begin()
	if err != nil {
		return nil, err
	}
	defer h.segment.drop()
	h.lent.Store(true)
	// A concurrent Release is the caller's own; one that came first was seen by begin.
	return h.segment.bytes(h), nil
}

// View calls use with the elements' bytes, which are valid until use returns, whatever else happens
// to the tensor meanwhile.
func (t *Tensor) View(use func(bytes []byte) error) error {
	h, err := t.begin()
	if err != nil {
		return err
	}
	defer h.segment.drop()
	return use(h.segment.bytes(h))
}

// WriteTo writes the elements' bytes: little-endian, row-major.
func (t *Tensor) WriteTo(w io.Writer) (int64, error) {
	var written int
	err := t.View(func(bytes []byte) (err error) {
		written, err = w.Write(bytes)
		return err
	})
	return int64(written), err
}

// ReadFrom fills the tensor with bytes from r: little-endian, row-major. It reads as much as the
// tensor holds and no more. Meanwhile a Publish of its segment fails with ErrArgument.
//
// The errors are ErrReadOnly, io.ErrUnexpectedEOF if r has less, ErrReleased, and r's own.
func (t *Tensor) ReadFrom(r io.Reader) (int64, error) {
	var read int
	err := t.View(func(bytes []byte) (err error) {
		if !t.handle.segment.fill() {
			return fmt.Errorf("strait: %w: %q", ErrReadOnly, t.handle.place.Name)
		}
		defer t.handle.segment.filled()
		read, err = io.ReadFull(r, bytes)
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return err
	})
	return int64(read), err
}

// As lends the elements as a slice, row-major; see Tensor for how long. float16 and bfloat16 are
// lent as uint16, the two float8 types and bool8 (also) as uint8.
//
// A byte of a bool8 is true unless it is 0; a Go bool is 0 or 1. Where a []bool meets other bytes, those of a
// writable tensor become 1, and a read-only one is lent as a copy, which ClientStats counts.
//
// The error is ErrArgument if the elements are of another type, ErrReleased after Release.
func As[T Element](t *Tensor) ([]T, error) {
	if t != nil && t.missing == nil && !holds[T](t.DType()) {
		return nil, argumentError("tensor %q is %s; %s was asked for", t.Name(), t.DType(), DTypeOf[T]())
	}
	bytes, err := t.Bytes()
	if err != nil {
		return nil, err
	}
	if DTypeOf[T]() == Bool8 {
		bytes = t.handle.truths(bytes)
	}
	return shm.View[T](bytes), nil
}

// truths is the bytes of a bool8 as Go has them, where they are if possible.
func (h *handle) truths(bytes []byte) []byte {
	if areTruths(bytes) {
		return bytes
	}
	if h.segment.fill() {
		defer h.segment.filled()
	} else {
		bytes = slices.Clone(bytes)
		h.segment.conn.copiedBytes.Add(int64(len(bytes)))
	}
	for i, b := range bytes {
		bytes[i] = min(b, 1)
	}
	return bytes
}

// areTruths says whether all bytes are 0 or 1; they begin on a word's boundary.
func areTruths(bytes []byte) bool {
	whole := len(bytes) &^ 7
	for _, word := range shm.View[uint64](bytes[:whole]) {
		if word&^0x0101010101010101 != 0 {
			return false
		}
	}
	return !slices.ContainsFunc(bytes[whole:], func(b byte) bool { return b > 1 })
}

// Renew gives the tensor's lease a new life, counted from now; 0 asks for the host's default. It
// returns the life that the host granted. Unless the client was dialled WithoutRenewal, leases are
// renewed without it. A small result has no lease and lasts: for the longest Duration there is.
func (t *Tensor) Renew(ctx context.Context, life time.Duration) (time.Duration, error) {
	h, err := t.begin()
	if err != nil {
		return 0, err
	}
	defer h.segment.drop()
	if err := h.segment.conn.leaseError(h.segment.lease); err != nil {
		return 0, err
	}
	if h.segment.lease == 0 {
		return math.MaxInt64, nil
	}
	return h.segment.conn.renew(ctx, []uint64{h.segment.lease}, life)
}

// Release gives the tensor back: slices that it lent are no longer valid. The memory itself is
// unmapped with the last tensor of its segment. A second Release does nothing.
func (t *Tensor) Release() {
	if t == nil || t.handle == nil || t.handle.released.Swap(true) {
		return
	}
	t.cleanup.Stop()
	t.handle.segment.drop()
}

// TensorOf is a tensor whose elements are of type T. NewTensor makes it.
type TensorOf[T Element] struct{ *Tensor }

// Data lends the elements, row-major; see Tensor for how long. It is nil after Release.
func (t TensorOf[T]) Data() []T {
	// The dtype was made of T, so that nothing but Release can be in the way.
	data, err := As[T](t.Tensor)
	if err != nil {
		return nil
	}
	return data
}

// NewTensor makes a tensor to fill, in memory that host and kernels share: as an input of Call it is
// not copied. Its elements are zero; without sizes it has one element. It can be written again once
// every Call that it went into has returned.
func NewTensor[T Element](ctx context.Context, c *Client, shape ...int) (TensorOf[T], error) {
	tensors, err := c.Create(ctx, Spec{Name: "x", DType: DTypeOf[T](), Shape: shape})
	if err != nil {
		return TensorOf[T]{}, err
	}
	return TensorOf[T]{tensors[0]}, nil
}
