package remote

import (
	"encoding/json"
	"math"
	"slices"
	"strconv"

	"github.com/apache/arrow-go/v18/arrow"
	"github.com/apache/arrow-go/v18/arrow/array"
	"github.com/apache/arrow-go/v18/arrow/memory"

	"strait"
)

// Tensors as Arrow columns, both ways. The elements are not looked at.

const (
	dtypeKey         = "strait.dtype"
	shapeKey         = "strait.shape"
	extensionName    = "ARROW:extension:name"
	extensionData    = "ARROW:extension:metadata"
	fixedShapeTensor = "arrow.fixed_shape_tensor"
	bool8            = "arrow.bool8"
	// Tensors of a segment start on multiples of this.
	pageBytes = 65536
)

// plain are the Arrow types that say the dtype of their elements.
var plain = map[strait.DType]arrow.DataType{
	strait.Int8: arrow.PrimitiveTypes.Int8, strait.Int16: arrow.PrimitiveTypes.Int16, strait.Int32: arrow.PrimitiveTypes.Int32,
	strait.Int64: arrow.PrimitiveTypes.Int64, strait.Uint8: arrow.PrimitiveTypes.Uint8, strait.Uint16: arrow.PrimitiveTypes.Uint16,
	strait.Uint32: arrow.PrimitiveTypes.Uint32, strait.Uint64: arrow.PrimitiveTypes.Uint64, strait.Float16: arrow.FixedWidthTypes.Float16,
	strait.Float32: arrow.PrimitiveTypes.Float32, strait.Float64: arrow.PrimitiveTypes.Float64,
}

// storage is what the elements of other dtypes are stored as.
var storage = map[strait.DType]strait.DType{
	strait.Bool8: strait.Int8, strait.BFloat16: strait.Uint16, strait.Float8E4M3FN: strait.Uint8, strait.Float8E5M2: strait.Uint8,
	strait.Complex64: strait.Float32, strait.Complex128: strait.Float64,
}

// stored is the Arrow type that a dtype's elements are stored in, and whether it says the dtype.
func stored(dtype strait.DType) (kind arrow.FixedWidthDataType, says, known bool) {
	says = plain[dtype] != nil
	if !says {
		dtype = storage[dtype]
	}
	kind, known = plain[dtype].(arrow.FixedWidthDataType)
	return kind, says, known
}

// dtypes are those that Arrow's own types say.
var dtypes = map[arrow.Type]strait.DType{
	arrow.INT8: strait.Int8, arrow.INT16: strait.Int16, arrow.INT32: strait.Int32, arrow.INT64: strait.Int64,
	arrow.UINT8: strait.Uint8, arrow.UINT16: strait.Uint16, arrow.UINT32: strait.Uint32, arrow.UINT64: strait.Uint64,
	arrow.FLOAT16: strait.Float16, arrow.FLOAT32: strait.Float32, arrow.FLOAT64: strait.Float64,
}

func isComplex(dtype strait.DType) bool {
	return dtype == strait.Complex64 || dtype == strait.Complex128
}

// field is a tensor's column.
func field(spec strait.Spec) (arrow.Field, error) {
	kind, says, known := stored(spec.DType)
	if !known {
		return arrow.Field{}, argument("tensor %q has the element type %q, which is not known here", spec.Name, spec.DType)
	}
	keys, values := []string{}, []string{}
	note := func(key, value string) { keys, values = append(keys, key), append(values, value) }
	if len(spec.Shape) == 0 {
		note(shapeKey, "[]")
	}
	row := slices.Clone(spec.Shape[min(1, len(spec.Shape)):])
	if isComplex(spec.DType) {
		row = append(row, 2)
	}
	var column arrow.DataType = kind
	switch {
	case len(row) > 0:
		width := 1
		for _, size := range row {
			width *= size
		}
		if width > math.MaxInt32 {
			return arrow.Field{}, argument("tensor %q has %d elements in a row, and Arrow has at most %d: reshape it, so that its first axis is longer",
				spec.Name, width, math.MaxInt32)
		}
		shape, err := json.Marshal(map[string][]int{"shape": row})
		if err != nil {
			return arrow.Field{}, err
		}
		note(extensionName, fixedShapeTensor)
		note(extensionData, string(shape))
		if !says {
			note(dtypeKey, string(spec.DType))
		}
		column = arrow.FixedSizeListOfNonNullable(int32(width), kind)
	case spec.DType == strait.Bool8:
		note(extensionName, bool8)
		note(extensionData, "")
	case !says:
		note(dtypeKey, string(spec.DType))
	}
	return arrow.Field{Name: spec.Name, Type: column, Metadata: arrow.NewMetadata(keys, values)}, nil
}

// places are the columns of a schema as tensors of so many rows, as they lie in a segment, and the bytes of that.
func places(schema *arrow.Schema, rows int64) ([]strait.Place, int64, error) {
	var all []strait.Place
	for _, column := range schema.Fields() {
		spec, err := specOf(column, int(rows))
		if err != nil {
			return nil, 0, err
		}
		all = append(all, strait.Place{Spec: spec})
	}
	return lay(all)
}

// lay sets where tensors lie in a segment of their own.
func lay(all []strait.Place) ([]strait.Place, int64, error) {
	var end int64
	for i := range all {
		length, err := byteSize(all[i].Spec)
		if err != nil {
			return nil, 0, err
		}
		all[i].Offset, all[i].Length = end, length
		end += (length + pageBytes - 1) / pageBytes * pageBytes
	}
	return all, max(end, pageBytes), nil
}

func byteSize(spec strait.Spec) (int64, error) {
	if _, _, known := stored(spec.DType); !known {
		return 0, protocol("tensor %q has the element type %q, which is not known here", spec.Name, spec.DType)
	}
	bytes := int64(spec.DType.Size())
	for _, size := range spec.Shape {
		if size < 0 || (size > 0 && bytes > math.MaxInt64/4/int64(size)) {
			return 0, protocol("tensor %q has the shape %v", spec.Name, spec.Shape)
		}
		bytes *= int64(size)
	}
	return bytes, nil
}

func specOf(column arrow.Field, rows int) (strait.Spec, error) {
	kind := column.Type
	said := func(key string) string {
		value, _ := column.Metadata.GetValue(key)
		return value
	}
	extension, parameters := said(extensionName), said(extensionData)
	if own, is := kind.(arrow.ExtensionType); is {
		extension, parameters, kind = own.ExtensionName(), own.Serialize(), own.StorageType()
	}
	var row []int
	for {
		list, is := kind.(*arrow.FixedSizeListType)
		if !is {
			break
		}
		row, kind = append(row, int(list.Len())), list.Elem()
	}
	if extension == fixedShapeTensor {
		var told struct {
			Shape []int `json:"shape"`
		}
		if err := json.Unmarshal([]byte(parameters), &told); err != nil {
			return strait.Spec{}, protocol("column %q: its shape: %w", column.Name, err)
		}
		row = told.Shape
	}
	dtype, known := dtypes[kind.ID()]
	if extension == bool8 {
		dtype = strait.Bool8
	}
	if given := said(dtypeKey); given != "" {
		dtype = strait.DType(given)
	}
	storage, _, is := stored(dtype)
	if !known || !is || storage.ID() != kind.ID() {
		return strait.Spec{}, protocol("column %q is of the Arrow type %s with the element type %q, which is no tensor of strait's", column.Name, column.Type, dtype)
	}
	if isComplex(dtype) {
		row = row[:max(len(row)-1, 0)]
	}
	spec := strait.Spec{Name: column.Name, DType: dtype, Shape: append([]int{rows}, row...)}
	if said(shapeKey) == "[]" {
		spec.Shape = []int{}
	}
	return spec, nil
}

// elements is the bytes of a column.
func elements(data arrow.ArrayData) ([]byte, error) {
	kind, offset, length := data.DataType(), data.Offset(), data.Len()
	for {
		if own, is := kind.(arrow.ExtensionType); is {
			kind = own.StorageType()
		}
		list, is := kind.(*arrow.FixedSizeListType)
		if !is {
			break
		}
		width := int(list.Len())
		data, kind = data.Children()[0], list.Elem()
		offset, length = offset*width+data.Offset(), length*width
	}
	fixed, is := kind.(arrow.FixedWidthDataType)
	if !is || len(data.Buffers()) < 2 {
		return nil, protocol("a column of the Arrow type %s", kind)
	}
	if length == 0 {
		return nil, nil
	}
	width, bytes := fixed.BitWidth()/8, data.Buffers()[1].Bytes()
	if (offset+length)*width > len(bytes) {
		return nil, protocol("a column of %s bytes that has %d", strconv.Itoa((offset+length)*width), len(bytes))
	}
	return bytes[offset*width : (offset+length)*width], nil
}

// batch is rows of tensors as a record batch of that schema, over their own memory.
func batch(schema *arrow.Schema, all []strait.Place, segment []byte, first, last int) arrow.RecordBatch {
	columns := make([]arrow.Array, len(all))
	for i, place := range all {
		rows := rowsOf(place.Spec)
		row := int64(0)
		if rows > 0 {
			row = place.Length / int64(rows)
		}
		bytes := segment[place.Offset+int64(first)*row : place.Offset+int64(last)*row]
		kind, _, _ := stored(place.DType)
		count := len(bytes) / (kind.BitWidth() / 8)
		data := array.NewData(kind, count, []*memory.Buffer{nil, memory.NewBufferBytes(bytes)}, nil, 0, 0)
		if list, is := schema.Field(i).Type.(*arrow.FixedSizeListType); is {
			data = array.NewData(list, last-first, []*memory.Buffer{nil}, []arrow.ArrayData{data}, 0, 0)
		}
		columns[i] = array.MakeFromData(data)
	}
	return array.NewRecordBatch(schema, columns, int64(last-first))
}

func rowsOf(spec strait.Spec) int {
	if len(spec.Shape) == 0 {
		return 1
	}
	return spec.Shape[0]
}
