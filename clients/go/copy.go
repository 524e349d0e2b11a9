package strait

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"strait/internal/shm"
)

// Copied is data on the Go heap as an input: each use copies it once, and ClientStats counts the bytes. Up to
// Welcome.InlineBytes it goes along with the call itself, above that, and for Publish, into shared memory. Slice,
// Scalar and Raw make it.
type Copied struct {
	dtype DType
	shape []int
	bytes []byte
	err   error
}

// Slice is data as a tensor of that shape, row-major; without a shape it has one axis. data must not
// be written to while a Call or Publish with it is under way.
//
// If shape does not fit data, the Call or Publish fails with ErrArgument.
func Slice[T Element](data []T, shape ...int) Copied {
	if len(shape) == 0 {
		shape = []int{len(data)}
	}
	return Raw(DTypeOf[T](), shm.Raw(data), shape...)
}

// Scalar is one element without axes.
func Scalar[T Element](value T) Copied {
	return Raw(DTypeOf[T](), shm.Raw([]T{value}))
}

// Raw is bytes (little-endian, row-major) as a tensor, for element types that Go lacks. Without sizes
// it is one element without axes.
func Raw(dtype DType, bytes []byte, shape ...int) Copied {
	expected, err := byteSize(dtype, shape)
	if err == nil && expected != int64(len(bytes)) {
		err = fmt.Errorf("%s has %d bytes; %d were given", spec(dtype, shape), expected, len(bytes))
	}
	return Copied{dtype, slices.Clone(shape), bytes, err}
}

func (d Copied) fill(t *Tensor) error {
	return t.View(func(bytes []byte) error {
		t.handle.segment.conn.copiedBytes.Add(int64(copy(bytes, d.bytes)))
		return nil
	})
}

func (d Copied) create(ctx context.Context, c *Client, name string) (*Tensor, error) {
	tensors, err := c.Create(ctx, Spec{Name: name, DType: d.dtype, Shape: d.shape})
	if err != nil {
		return nil, err
	}
	return tensors[0], nil
}

func (d Copied) input(ctx context.Context, c *Client, call *invokeRequest) (any, func(bool), error) {
	if d.err != nil {
		return nil, nil, argumentError("%w", d.err)
	}
	if call == nil {
		return d.lasting(ctx, c)
	}
	if said, fits := d.inline(c, call); fits {
		return said, nothing, nil
	}
	t := c.copies.take(d)
	// A cached one whose lease is over is of no use any more.
	if t != nil && t.Err() != nil {
		t.Release()
		t = nil
	}
	if t == nil {
		var err error
		if t, err = d.create(ctx, c, "x"); err != nil {
			return nil, nil, err
		}
	}
	if err := d.fill(t); err != nil {
		t.Release()
		return nil, nil, err
	}
	done := func(answered bool) {
		// Without an answer the kernel may still read it.
		if answered {
			c.copies.put(t)
		} else {
			t.Release()
		}
	}
	return segmentInput{Segment: t.handle.segment.mapping.Segment}, done, nil
}

// lasting is a segment that the host has for itself once it has taken it: no other copy goes there.
func (d Copied) lasting(ctx context.Context, c *Client) (any, func(bool), error) {
	t, _, err := d.tensor(ctx, c, "x")
	if err != nil {
		return nil, nil, err
	}
	return segmentInput{Segment: t.handle.segment.mapping.Segment}, func(bool) { t.Release() }, nil
}

func (d Copied) elements() (Copied, *segment, error) {
	if d.err != nil {
		return Copied{}, nil, argumentError("%w", d.err)
	}
	return d, nil, nil
}

func (d Copied) tensor(ctx context.Context, c *Client, name string) (*Tensor, bool, error) {
	if d.err != nil {
		return nil, false, argumentError("%w", d.err)
	}
	t, err := d.create(ctx, c, name)
	if err != nil {
		return nil, false, err
	}
	if err := d.fill(t); err != nil {
		t.Release()
		return nil, false, err
	}
	return t, true, nil
}

// copies keeps segments that inputs were copied into, for the next input of the same element type
// and shape. The most recently used is last.
type copies struct {
	mu       sync.Mutex
	idle     []*Tensor
	bytes    int64
	bytesMax int64
}

// More are not worth looking through, and a lease each.
const copiesMax = 32

func (c *copies) take(d Copied) *Tensor {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := len(c.idle) - 1; i >= 0; i-- {
		t := c.idle[i]
		if place := t.place(); place.DType == d.dtype && slices.Equal(place.Shape, d.shape) {
			c.idle = slices.Delete(c.idle, i, i+1)
			c.bytes -= t.handle.segment.mapping.Bytes
			return t
		}
	}
	return nil
}

func (c *copies) put(t *Tensor) {
	c.mu.Lock()
	c.idle = append(c.idle, t)
	c.bytes += t.handle.segment.mapping.Bytes
	var over []*Tensor
	for len(c.idle) > 0 && (c.bytes > c.bytesMax || len(c.idle) > copiesMax) {
		over = append(over, c.idle[0])
		c.bytes -= c.idle[0].handle.segment.mapping.Bytes
		c.idle = slices.Delete(c.idle, 0, 1)
	}
	c.mu.Unlock()
	releaseAll(over)
}

// clear ends the caching, too.
func (c *copies) clear() {
	c.mu.Lock()
	idle := c.idle
	c.idle, c.bytes, c.bytesMax = nil, 0, 0
	c.mu.Unlock()
	releaseAll(idle)
}
