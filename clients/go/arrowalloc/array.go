package arrowalloc

import (
	"context"
	"fmt"
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
// this allocator and begin on a 64 KiB boundary of it (as those of an array that was built whole
// do), else with one copy for each call. Fixed-size lists are further axes. While it is an input,
// the array must not be written to.
//
// The error is strait.ErrArgument for an array with nulls or of another kind.
func (a *Allocator) Input(ctx context.Context, client *strait.Client, values arrow.Array) (*Input, error) {
	flat, err := flatten(values)
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
// The error is strait.ErrArgument for an array with nulls or of another kind.
func (a *Allocator) Publish(ctx context.Context, client *strait.Client, name string, values arrow.Array, options ...strait.PublishOption) error {
	flat, err := flatten(values)
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

// flat is an array as a tensor.
type flat struct {
	dtype strait.DType
	shape []int
	// All of the buffer, and the array's values in it.
	buffer, bytes []byte
}

func (f *flat) place(name string, offset int) strait.Place {
	return strait.Place{
		Spec:   strait.Spec{Name: name, DType: f.dtype, Shape: f.shape},
		Offset: int64(offset),
		Length: int64(len(f.bytes)),
	}
}

func refuse(format string, arguments ...any) error {
	return fmt.Errorf("strait: %w: %w", strait.ErrArgument, fmt.Errorf(format, arguments...))
}

func flatten(values arrow.Array) (*flat, error) {
	shape := []int{values.Len()}
	data := values.Data()
	// Values of the innermost array, counted in its own elements.
	offset, count := data.Offset(), data.Len()
	for {
		if nulls := data.NullN(); nulls != 0 {
			return nil, refuse("an array with %d nulls; a tensor has none: fill or drop them, or pass a mask of its own", nulls)
		}
		list, isList := data.DataType().(*arrow.FixedSizeListType)
		if !isList {
			break
		}
		size := int(list.Len())
		child := data.Children()[0]
		shape = append(shape, size)
		offset, count = offset*size+child.Offset(), count*size
		data = child
	}
	dtype, known := dtypes[data.DataType().ID()]
	if _, isBool := data.DataType().(*extensions.Bool8Type); isBool {
		dtype, known = strait.Bool8, true
	}
	if !known {
		return nil, refuse("an array of %s; tensors are of integers, floats, bool8, or fixed-size lists of them", data.DataType())
	}
	f := &flat{dtype: dtype, shape: shape}
	if buffers := data.Buffers(); count > 0 && len(buffers) > 1 && buffers[1] != nil {
		width := dtype.Size()
		f.buffer = buffers[1].Bytes()
		if end := (offset + count) * width; end > len(f.buffer) {
			return nil, refuse("an array of %d bytes in a buffer of %d", end, len(f.buffer))
		}
		f.bytes = f.buffer[offset*width : (offset+count)*width]
	}
	return f, nil
}

var dtypes = map[arrow.Type]strait.DType{
	arrow.INT8: strait.Int8, arrow.INT16: strait.Int16, arrow.INT32: strait.Int32, arrow.INT64: strait.Int64,
	arrow.UINT8: strait.Uint8, arrow.UINT16: strait.Uint16, arrow.UINT32: strait.Uint32, arrow.UINT64: strait.Uint64,
	arrow.FLOAT16: strait.Float16, arrow.FLOAT32: strait.Float32, arrow.FLOAT64: strait.Float64,
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
		if axis > 0 && n > math.MaxInt32 {
			return nil, refuse("an axis of %d elements; Arrow's lists have at most %d", n, math.MaxInt32)
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
