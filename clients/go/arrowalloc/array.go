package arrowalloc

import (
	"context"
	"math"
	"sync"

	"github.com/apache/arrow-go/v18/arrow"
	"github.com/apache/arrow-go/v18/arrow/array"
	"github.com/apache/arrow-go/v18/arrow/extensions"
	"github.com/apache/arrow-go/v18/arrow/memory"

	"strait"
)

// Input is an array as a kernel's input. It keeps the array until Release.
type Input struct {
	strait.Input
	// Copied: the array is not in shared memory, so that each call copies it.
	Copied  bool
	release sync.Once
	adopted *strait.Adopted
	array   arrow.Array
}

// Release gives back the array, and the host's lease on its memory. A second Release does nothing.
func (i *Input) Release() {
	i.release.Do(func() {
		if i.adopted != nil {
			i.adopted.Release()
		}
		i.array.Release()
	})
}

// Input makes an array of numbers a kernel's input: without a copy if its values are in memory of
// this allocator and begin on a 64 KiB boundary of it (as those of an array that was built
// entirely in it do), else with one copy for each call. Fixed-size lists are further axes, and so are the rows of an
// arrow.fixed_shape_tensor; a byte of an arrow.bool8 is true unless it is 0. While it is an input,
// the array must not be written to.
//
// The error is strait.ErrArgument for an array with nulls, at any level, or of another kind; it says what
// to do.
func (a *Allocator) Input(ctx context.Context, client *strait.Client, values arrow.Array) (*Input, error) {
	return a.input(ctx, client, values, arrow.Metadata{})
}

// Column is Input for a column of a record batch, such as one that was read over Flight: what its field
// says counts, so that shapes and types that arrow-go has no Go type for come back as they were.
func (a *Allocator) Column(ctx context.Context, client *strait.Client, batch arrow.RecordBatch, column int) (*Input, error) {
	return a.input(ctx, client, batch.Column(column), batch.Schema().Field(column).Metadata)
}

func (a *Allocator) input(ctx context.Context, client *strait.Client, values arrow.Array, metadata arrow.Metadata) (*Input, error) {
	flat, err := flatten(values, metadata)
	if err != nil {
		return nil, err
	}
	input := &Input{Input: strait.Raw(flat.dtype, flat.bytes, flat.shape...), Copied: true, array: values}
	if b, offset := a.around(flat.buffer, flat.bytes); b != nil && offset%blockBytes == 0 && len(flat.bytes) > 0 {
		if err := a.lend(b); err != nil {
			return nil, err
		}
		adopted, err := client.Adopt(ctx, b.file, []strait.Place{flat.place("x", offset)}, "")
		if err != nil {
			return nil, err
		}
		input.Input, input.Copied, input.adopted = adopted, false, adopted
	}
	values.Retain()
	return input, nil
}

// Publish gives an array of numbers a name under which others find it: without a copy where Input
// needs none, else with one. Without a copy its memory becomes read-only here too, at the same
// address, even if the host refuses the name: it must not be an Input at that time.
//
// The error is strait.ErrArgument for an array that Input refuses.
func (a *Allocator) Publish(ctx context.Context, client *strait.Client, name string, values arrow.Array, options ...strait.PublishOption) error {
	return a.publish(ctx, client, name, values, arrow.Metadata{}, options)
}

// PublishColumn is Publish for a column of a record batch, as Column is Input.
func (a *Allocator) PublishColumn(ctx context.Context, client *strait.Client, name string, batch arrow.RecordBatch, column int, options ...strait.PublishOption) error {
	return a.publish(ctx, client, name, batch.Column(column), batch.Schema().Field(column).Metadata, options)
}

func (a *Allocator) publish(ctx context.Context, client *strait.Client, name string, values arrow.Array, metadata arrow.Metadata, options []strait.PublishOption) error {
	flat, err := flatten(values, metadata)
	if err != nil {
		return err
	}
	b, offset := a.around(flat.buffer, flat.bytes)
	if b == nil || offset%blockBytes != 0 || len(flat.bytes) == 0 {
		_, err := client.Publish(ctx, name, strait.Raw(flat.dtype, flat.bytes, flat.shape...), options...)
		return err
	}
	if err := a.seal(b); err != nil {
		return err
	}
	adopted, err := client.Adopt(ctx, b.file, []strait.Place{flat.place(name, offset)}, name, options...)
	if err != nil {
		return err
	}
	adopted.Release()
	return nil
}

// Array is a tensor's elements as an Arrow array, without a copy: rows over the first axis, further
// axes as fixed-size lists, no axes as one row. bfloat16 is uint16, the float8 types are uint8, a
// complex number is a list of two. The array takes the tensor over: releasing the array releases it.
func Array(t *strait.Tensor) (arrow.Array, error) {
	kind, err := arrowType(t.DType())
	if err != nil {
		return nil, err
	}
	shape := t.Shape()
	if len(shape) == 0 {
		shape = []int{1}
	}
	pair := t.DType() == strait.Complex64 || t.DType() == strait.Complex128
	if pair {
		shape = append(shape, 2)
	}
	count := 1
	for axis, n := range shape {
		if axis > 0 && (n > math.MaxInt32 || n == 0) {
			return nil, refuse("a tensor of shape %v; every axis but the first is a list, and arrow-go's have 1 to %d elements: use its bytes", shape, math.MaxInt32)
		}
		count *= n
	}
	bytes, err := t.Bytes()
	if err != nil {
		return nil, err
	}
	buffer := memory.NewBufferWithAllocator(bytes, owner{t})
	defer buffer.Release()
	data := array.NewData(kind, count, []*memory.Buffer{nil, buffer}, nil, 0, 0)
	for axis := len(shape) - 1; axis > 0; axis-- {
		rows := 1
		for _, n := range shape[:axis] {
			rows *= n
		}
		kind = arrow.FixedSizeListOfNonNullable(int32(shape[axis]), kind)
		outer := array.NewData(kind, rows, []*memory.Buffer{nil}, []arrow.ArrayData{data}, 0, 0)
		data.Release()
		data = outer
	}
	defer data.Release()
	return array.MakeFromData(data), nil
}

func arrowType(dtype strait.DType) (arrow.DataType, error) {
	switch dtype {
	case strait.Bool8:
		return extensions.NewBool8Type(), nil
	case strait.Int8:
		return arrow.PrimitiveTypes.Int8, nil
	case strait.Int16:
		return arrow.PrimitiveTypes.Int16, nil
	case strait.Int32:
		return arrow.PrimitiveTypes.Int32, nil
	case strait.Int64:
		return arrow.PrimitiveTypes.Int64, nil
	case strait.Uint8, strait.Float8E4M3FN, strait.Float8E5M2:
		return arrow.PrimitiveTypes.Uint8, nil
	case strait.Uint16, strait.BFloat16:
		return arrow.PrimitiveTypes.Uint16, nil
	case strait.Uint32:
		return arrow.PrimitiveTypes.Uint32, nil
	case strait.Uint64:
		return arrow.PrimitiveTypes.Uint64, nil
	case strait.Float16:
		return arrow.FixedWidthTypes.Float16, nil
	case strait.Float32, strait.Complex64:
		return arrow.PrimitiveTypes.Float32, nil
	case strait.Float64, strait.Complex128:
		return arrow.PrimitiveTypes.Float64, nil
	}
	return nil, refuse("elements of type %q have no Arrow type", dtype)
}

// owner gives a tensor back when the buffer over it is released. It only ever frees.
type owner struct{ tensor *strait.Tensor }

func (owner) Allocate(size int) []byte { return make([]byte, size) }

func (owner) Reallocate(size int, old []byte) []byte {
	moved := make([]byte, size)
	copy(moved, old)
	return moved
}

func (o owner) Free([]byte) { o.tensor.Release() }
