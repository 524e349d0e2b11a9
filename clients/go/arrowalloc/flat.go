package arrowalloc

import (
	"encoding/json"
	"fmt"
	"math/bits"
	"slices"

	"github.com/apache/arrow-go/v18/arrow"
	"github.com/apache/arrow-go/v18/arrow/bitutil"

	"strait"
)

// Metadata of a field: an extension type that arrow-go has no Go type for, and what a host adds where Arrow
// has no type or shape for a tensor.
const (
	extensionKey  = "ARROW:extension:name"
	parametersKey = "ARROW:extension:metadata"
	dtypeKey      = "strait.dtype"
	shapeKey      = "strait.shape"

	bool8Name       = "arrow.bool8"
	tensorShapeName = "arrow.fixed_shape_tensor"

	rankMax = 8
)

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

// flatten takes nothing away: what a tensor cannot have (nulls, an encoding, a type of another meaning) is
// refused.
func flatten(values arrow.Array, metadata arrow.Metadata) (*flat, error) {
	data := values.Data()
	shape := []int{values.Len()}
	// Values of this level that the array has, counted in the level's own elements.
	offset, count := data.Offset(), data.Len()
	extension, parameters := said(metadata, extensionKey), said(metadata, parametersKey)
	for {
		if nulls := nullsIn(data, offset, count); nulls != 0 {
			return nil, refuse("an array with %d nulls among its %d values of %s; a tensor has none: fill or drop them, or pass a mask of its own",
				nulls, count, data.DataType())
		}
		storage := data.DataType()
		if typed, ok := storage.(arrow.ExtensionType); ok {
			extension, parameters, storage = typed.ExtensionName(), typed.Serialize(), typed.StorageType()
		}
		list, isList := storage.(*arrow.FixedSizeListType)
		axes, err := rowShape(extension, parameters, storage)
		if err != nil {
			return nil, err
		}
		if !isList {
			break
		}
		shape = append(shape, axes...)
		child := data.Children()[0]
		size := int(list.Len())
		high, many := bits.Mul64(uint64(count), uint64(size))
		if high != 0 || many > 1<<62 || offset > 1<<62/max(size, 1) {
			return nil, refuse("an array of %s whose element count overflows", data.DataType())
		}
		offset, count = offset*size+child.Offset(), int(many)
		data, extension, parameters = child, "", ""
	}
	f := &flat{dtype: dtypes[storageID(data.DataType())], shape: shape}
	if extension == bool8Name {
		f.dtype = strait.Bool8
	}
	if err := f.values(data, offset, count); err != nil {
		return nil, err
	}
	if err := f.told(metadata); err != nil {
		return nil, err
	}
	if len(f.shape) > rankMax {
		return nil, refuse("an array of shape %v; a tensor has at most %d axes", f.shape, rankMax)
	}
	return f, nil
}

func said(metadata arrow.Metadata, key string) string {
	value, _ := metadata.GetValue(key)
	return value
}

// nullsIn counts the nulls among an array's values from offset on, whatever it says about itself: a slice
// does not know its own, and a list's child those of the rows that a slice left out too.
func nullsIn(data arrow.ArrayData, offset, count int) int {
	if data.DataType().ID() == arrow.NULL {
		return count
	}
	buffers := data.Buffers()
	if len(buffers) == 0 || buffers[0] == nil || !hasValidity(data.DataType()) {
		return 0
	}
	valid := buffers[0].Bytes()
	if count > 8*len(valid)-offset {
		// A bitmap may be left empty where there are no nulls.
		return data.NullN()
	}
	return count - bitutil.CountSetBits(valid, offset, count)
}

// hasValidity is false for the types whose first buffer is something else.
func hasValidity(kind arrow.DataType) bool {
	id := storageID(kind)
	return id != arrow.SPARSE_UNION && id != arrow.DENSE_UNION && id != arrow.RUN_END_ENCODED
}

func storageID(kind arrow.DataType) arrow.Type {
	if extension, ok := kind.(arrow.ExtensionType); ok {
		return extension.StorageType().ID()
	}
	return kind.ID()
}

// rowShape is what a row of this level adds to the shape: nothing for a number, the list's size for a list,
// more axes for a tensor in a list. Anything else is refused.
func rowShape(extension, parameters string, storage arrow.DataType) ([]int, error) {
	list, isList := storage.(*arrow.FixedSizeListType)
	switch {
	case extension == bool8Name && storage.ID() == arrow.INT8:
		return nil, nil
	case extension == tensorShapeName && isList:
		return tensorShape(parameters, int(list.Len()))
	case extension != "":
		return nil, refuse("an array of the extension type %s over %s; pass its storage (array.ExtensionArray.Storage) if those are the numbers that are meant",
			extension, storage)
	case isList:
		return []int{int(list.Len())}, nil
	case dtypes[storage.ID()] == "":
		return nil, refuse("an array of %s; %s", storage, remedy(storage))
	}
	return nil, nil
}

func tensorShape(parameters string, values int) ([]int, error) {
	var said struct {
		Shape       []int `json:"shape"`
		Permutation []int `json:"permutation"`
	}
	if err := json.Unmarshal([]byte(parameters), &said); err != nil {
		return nil, refuse("an array of %s with parameters %q: %w", tensorShapeName, parameters, err)
	}
	for axis, from := range said.Permutation {
		if axis != from {
			return nil, refuse("an array of %s whose axes are permuted (%v); write it in row-major order", tensorShapeName, said.Permutation)
		}
	}
	product := 1
	for _, n := range said.Shape {
		if n < 0 || n > 0 && product > values/n && !slices.Contains(said.Shape, 0) {
			product = -1
			break
		}
		product *= n
	}
	if product != values {
		return nil, refuse("an array of %s of shape %v over lists of %d", tensorShapeName, said.Shape, values)
	}
	return said.Shape, nil
}

// values finds the numbers themselves.
func (f *flat) values(data arrow.ArrayData, offset, count int) error {
	buffers := data.Buffers()
	if count == 0 || len(buffers) < 2 || buffers[1] == nil {
		if count > 0 {
			return refuse("an array of %d values of %s without a buffer for them", count, data.DataType())
		}
		return nil
	}
	width := f.dtype.Size()
	f.buffer = buffers[1].Bytes()
	if end := len(f.buffer) / width; offset > end || count > end-offset {
		return refuse("an array of %d values of %s from %d on in a buffer of %d", count, data.DataType(), offset, end)
	}
	f.bytes = f.buffer[offset*width : (offset+count)*width]
	return nil
}

// told takes in what a host wrote beside a column that Arrow has no type or shape for.
func (f *flat) told(metadata arrow.Metadata) error {
	if dtype := strait.DType(said(metadata, dtypeKey)); dtype != "" && dtype != f.dtype {
		stored, rows := f.dtype, slices.Clone(f.shape)
		pair := dtype == strait.Complex64 || dtype == strait.Complex128
		if pair && f.shape[len(f.shape)-1] == 2 {
			f.shape = f.shape[:len(f.shape)-1]
		}
		if stands[dtype] != stored || pair && (len(rows) < 2 || rows[len(rows)-1] != 2) {
			return refuse("a column whose %s is %s over %s of shape %v", dtypeKey, dtype, stored, rows)
		}
		f.dtype = dtype
	}
	if shape := said(metadata, shapeKey); shape != "" {
		if shape != "[]" || !slices.Equal(f.shape, []int{1}) {
			return refuse("a column whose %s is %s over rows of shape %v", shapeKey, shape, f.shape)
		}
		f.shape = []int{}
	}
	return nil
}

// stands is how a type that Arrow lacks is stored.
var stands = map[strait.DType]strait.DType{
	strait.Bool8: strait.Int8, strait.BFloat16: strait.Uint16, strait.Float8E4M3FN: strait.Uint8, strait.Float8E5M2: strait.Uint8,
	strait.Complex64: strait.Float32, strait.Complex128: strait.Float64,
}

var dtypes = map[arrow.Type]strait.DType{
	arrow.INT8: strait.Int8, arrow.INT16: strait.Int16, arrow.INT32: strait.Int32, arrow.INT64: strait.Int64,
	arrow.UINT8: strait.Uint8, arrow.UINT16: strait.Uint16, arrow.UINT32: strait.Uint32, arrow.UINT64: strait.Uint64,
	arrow.FLOAT16: strait.Float16, arrow.FLOAT32: strait.Float32, arrow.FLOAT64: strait.Float64,
}

// remedy says what to do about a type that tensors do not have.
func remedy(kind arrow.DataType) string {
	switch kind := kind.(type) {
	case *arrow.DictionaryType:
		return fmt.Sprintf("decode it first: compute.CastArray to %s", kind.ValueType)
	case *arrow.RunEndEncodedType:
		return "decode it first: compute.RunEndDecodeArray"
	case *arrow.BooleanType:
		return "its booleans are packed into bits: build an arrow.bool8 (extensions.NewBool8Builder), a byte each"
	case *arrow.Date32Type, *arrow.Date64Type, *arrow.Time32Type, *arrow.Time64Type, *arrow.TimestampType, *arrow.DurationType:
		return "cast it to the integers that it stores: compute.CastArray"
	case arrow.DecimalType:
		return "cast it to floats, or to the integers that it counts in: compute.CastArray"
	case *arrow.StructType:
		return "pass its fields one by one"
	case arrow.ListLikeType:
		return "its rows may be of different lengths: build a fixed-size list if they are not"
	}
	return "tensors are of integers, floats, arrow.bool8, or fixed-size lists of them"
}
