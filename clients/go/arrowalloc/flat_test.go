package arrowalloc

import (
	"context"
	"errors"
	"fmt"
	"math"
	"reflect"
	"strings"
	"testing"

	"github.com/apache/arrow-go/v18/arrow"
	"github.com/apache/arrow-go/v18/arrow/array"
	"github.com/apache/arrow-go/v18/arrow/extensions"
	"github.com/apache/arrow-go/v18/arrow/memory"

	"strait"
)

// fromJSON is an array of any kind.
func fromJSON(t *testing.T, kind arrow.DataType, text string) arrow.Array {
	t.Helper()
	values, _, err := array.FromJSON(memory.DefaultAllocator, kind, strings.NewReader(text))
	if err != nil {
		t.Fatal(kind, err)
	}
	return values
}

func lists(size int32, kind arrow.DataType) arrow.DataType { return arrow.FixedSizeListOf(size, kind) }

// tensorType is arrow.fixed_shape_tensor, or an extension of any other name, for whoever registers one.
type tensorType struct {
	arrow.ExtensionBase
	name, parameters string
}

type tensorArray struct{ array.ExtensionArrayBase }

func (*tensorType) ArrayType() reflect.Type { return reflect.TypeFor[tensorArray]() }
func (t *tensorType) ExtensionName() string { return t.name }
func (t *tensorType) Serialize() string     { return t.parameters }
func (t *tensorType) Deserialize(storage arrow.DataType, data string) (arrow.ExtensionType, error) {
	return &tensorType{arrow.ExtensionBase{Storage: storage}, t.name, data}, nil
}
func (t *tensorType) ExtensionEquals(other arrow.ExtensionType) bool {
	return other.ExtensionName() == t.name && other.Serialize() == t.parameters
}

// extended is storage with an extension type over it.
func extended(storage arrow.Array, name, parameters string) arrow.Array {
	kind := &tensorType{arrow.ExtensionBase{Storage: storage.DataType()}, name, parameters}
	data := array.NewData(kind, storage.Len(), storage.Data().Buffers(), storage.Data().Children(), storage.NullN(), storage.Data().Offset())
	return array.MakeFromData(data)
}

func metadata(pairs ...string) arrow.Metadata {
	var keys, values []string
	for i := 0; i < len(pairs); i += 2 {
		keys, values = append(keys, pairs[i]), append(values, pairs[i+1])
	}
	return arrow.NewMetadata(keys, values)
}

func TestWhatIsKept(t *testing.T) {
	i32, f32 := arrow.PrimitiveTypes.Int32, arrow.PrimitiveTypes.Float32
	numbers := fromJSON(t, i32, `[0,1,2,3,4,5,6,7,8,9,10,11]`)
	holes := fromJSON(t, i32, `[null,1,2,3,null]`)
	pairs := fromJSON(t, lists(2, i32), `[[0,1],[2,3],[4,5],[6,7]]`)
	holePairs := fromJSON(t, lists(2, i32), `[null,[2,3],[4,5],[6,null]]`)
	deep := fromJSON(t, lists(2, lists(3, i32)), `[[[0,1,2],[3,4,5]],[[6,7,8],[9,10,11]],[[12,13,14],[15,16,17]]]`)
	sixes := fromJSON(t, lists(6, i32), `[[0,1,2,3,4,5],[6,7,8,9,10,11]]`)
	// A child that has an offset of its own below a list that has one.
	inner := array.NewSlice(numbers, 2, 10)
	shifted := array.MakeFromData(array.NewData(lists(2, i32), 3, []*memory.Buffer{nil}, []arrow.ArrayData{inner.Data()}, 0, 1))
	bools := extensions.NewBool8Builder(memory.DefaultAllocator)
	bools.AppendValues([]bool{true, false}, nil)
	anyBytes := extended(fromJSON(t, arrow.PrimitiveTypes.Int8, `[0,1,2,-1]`), bool8Name, "")
	floats := fromJSON(t, lists(2, f32), `[[1,2],[3,4],[5,6]]`)
	for name, example := range map[string]struct {
		values   arrow.Array
		metadata arrow.Metadata
		dtype    strait.DType
		shape    []int
		want     string
	}{
		"whole":                    {numbers, metadata(), strait.Int32, []int{12}, "[0 1 2 3 4 5 6 7 8 9 10 11]"},
		"a slice":                  {array.NewSlice(numbers, 3, 6), metadata(), strait.Int32, []int{3}, "[3 4 5]"},
		"an empty slice":           {array.NewSlice(numbers, 12, 12), metadata(), strait.Int32, []int{0}, "[]"},
		"a slice of a slice":       {array.NewSlice(array.NewSlice(numbers, 3, 9), 2, 4), metadata(), strait.Int32, []int{2}, "[5 6]"},
		"between nulls":            {array.NewSlice(holes, 1, 4), metadata(), strait.Int32, []int{3}, "[1 2 3]"},
		"an empty one of nulls":    {array.NewSlice(holes, 0, 0), metadata(), strait.Int32, []int{0}, "[]"},
		"rows":                     {pairs, metadata(), strait.Int32, []int{4, 2}, "[0 1 2 3 4 5 6 7]"},
		"some rows":                {array.NewSlice(pairs, 1, 3), metadata(), strait.Int32, []int{2, 2}, "[2 3 4 5]"},
		"rows between nulls":       {array.NewSlice(holePairs, 1, 3), metadata(), strait.Int32, []int{2, 2}, "[2 3 4 5]"},
		"no rows":                  {array.NewSlice(pairs, 4, 4), metadata(), strait.Int32, []int{0, 2}, "[]"},
		"rows of rows":             {array.NewSlice(deep, 1, 3), metadata(), strait.Int32, []int{2, 2, 3}, "[6 7 8 9 10 11 12 13 14 15 16 17]"},
		"offsets at both levels":   {shifted, metadata(), strait.Int32, []int{3, 2}, "[4 5 6 7 8 9]"},
		"bool8":                    {bools.NewArray(), metadata(), strait.Bool8, []int{2}, "[1 0]"},
		"any byte of bool8":        {anyBytes, metadata(), strait.Bool8, []int{4}, "[0 1 2 -1]"},
		"bool8 by its field":       {fromJSON(t, arrow.PrimitiveTypes.Int8, `[0,2]`), metadata(extensionKey, bool8Name), strait.Bool8, []int{2}, "[0 2]"},
		"float16":                  {fromJSON(t, arrow.FixedWidthTypes.Float16, `[1,2]`), metadata(), strait.Float16, []int{2}, "[15360 16384]"},
		"a tensor type":            {extended(sixes, tensorShapeName, `{"shape":[2,3]}`), metadata(), strait.Int32, []int{2, 2, 3}, "[0 1 2 3 4 5 6 7 8 9 10 11]"},
		"a sliced tensor type":     {array.NewSlice(extended(sixes, tensorShapeName, `{"shape":[3,2],"dim_names":["a","b"]}`), 1, 2), metadata(), strait.Int32, []int{1, 3, 2}, "[6 7 8 9 10 11]"},
		"axes in their order":      {extended(sixes, tensorShapeName, `{"shape":[1,6],"permutation":[0,1]}`), metadata(), strait.Int32, []int{2, 1, 6}, "[0 1 2 3 4 5 6 7 8 9 10 11]"},
		"a tensor by its field":    {sixes, metadata(extensionKey, tensorShapeName, parametersKey, `{"shape":[2,3]}`), strait.Int32, []int{2, 2, 3}, "[0 1 2 3 4 5 6 7 8 9 10 11]"},
		"bfloat16":                 {fromJSON(t, arrow.PrimitiveTypes.Uint16, `[16256]`), metadata(dtypeKey, "bfloat16"), strait.BFloat16, []int{1}, "[16256]"},
		"complex64":                {floats, metadata(dtypeKey, "complex64", extensionKey, tensorShapeName, parametersKey, `{"shape":[2]}`), strait.Complex64, []int{3}, "[1 2 3 4 5 6]"},
		"no axes":                  {array.NewSlice(numbers, 7, 8), metadata(shapeKey, "[]"), strait.Int32, []int{}, "[7]"},
		"metadata of others' keys": {array.NewSlice(numbers, 7, 8), metadata("unit", "m"), strait.Int32, []int{1}, "[7]"},
	} {
		flat, err := flatten(example.values, example.metadata)
		if err != nil {
			t.Error(name, err)
			continue
		}
		if flat.dtype != example.dtype || !reflect.DeepEqual(flat.shape, example.shape) || elements(flat) != example.want {
			t.Error(name, flat.dtype, flat.shape, elements(flat))
		}
	}
}

// elements are the stored numbers.
func elements(f *flat) string {
	storage := map[strait.DType]arrow.DataType{
		strait.Int32: arrow.PrimitiveTypes.Int32, strait.Bool8: arrow.PrimitiveTypes.Int8, strait.Float16: arrow.PrimitiveTypes.Uint16,
		strait.BFloat16: arrow.PrimitiveTypes.Uint16, strait.Complex64: arrow.PrimitiveTypes.Float32,
	}[f.dtype]
	count := len(f.bytes) * 8 / storage.(arrow.FixedWidthDataType).BitWidth()
	return fmt.Sprint(array.MakeFromData(array.NewData(storage, count, []*memory.Buffer{nil, memory.NewBufferBytes(f.bytes)}, nil, 0, 0)))
}

func dictionary(t *testing.T, indices, values string) arrow.Array {
	kind := &arrow.DictionaryType{IndexType: arrow.PrimitiveTypes.Int8, ValueType: arrow.PrimitiveTypes.Int64}
	return array.NewDictionaryArray(kind, fromJSON(t, kind.IndexType, indices), fromJSON(t, kind.ValueType, values))
}

func TestWhatIsRefusedSaysWhatToDo(t *testing.T) {
	i8, i64, f32 := arrow.PrimitiveTypes.Int8, arrow.PrimitiveTypes.Int64, arrow.PrimitiveTypes.Float32
	runs := array.NewRunEndEncodedArray(fromJSON(t, arrow.PrimitiveTypes.Int32, `[2,3]`), fromJSON(t, i64, `[1,null]`), 3, 0)
	sixes := fromJSON(t, lists(6, i64), `[[0,1,2,3,4,5]]`)
	numbers := fromJSON(t, i64, `[1,2,3]`)
	structs := fromJSON(t, arrow.StructOf(arrow.Field{Name: "a", Type: i64}), `[{"a":1}]`)
	union, err := array.NewSparseUnionFromArrays(fromJSON(t, i8, `[0,0,0]`), []arrow.Array{numbers})
	if err != nil {
		t.Fatal(err)
	}
	none := array.MakeFromData(array.NewData(i64, 4, []*memory.Buffer{nil, nil}, nil, 0, 0))
	for name, example := range map[string]struct {
		values   arrow.Array
		metadata arrow.Metadata
		says     string
	}{
		"nulls":                     {fromJSON(t, i64, `[1,null,null]`), metadata(), "2 nulls among its 3 values of int64"},
		"nulls in a slice":          {array.NewSlice(fromJSON(t, i64, `[null,1,null,2]`), 1, 4), metadata(), "1 nulls among its 3"},
		"a null row":                {fromJSON(t, lists(2, i64), `[[1,2],null]`), metadata(), "1 nulls among its 2"},
		"a null in a row":           {fromJSON(t, lists(2, i64), `[[1,2],[3,null]]`), metadata(), "1 nulls among its 4 values of int64"},
		"a null in a sliced row":    {array.NewSlice(fromJSON(t, lists(2, i64), `[[1,null],[3,null]]`), 1, 2), metadata(), "1 nulls among its 2 values of int64"},
		"a null two lists down":     {fromJSON(t, lists(1, lists(2, i64)), `[[[1,2]],[[3,null]]]`), metadata(), "1 nulls among its 4"},
		"a null in a tensor":        {extended(fromJSON(t, lists(2, i64), `[[1,null]]`), tensorShapeName, `{"shape":[2]}`), metadata(), "1 nulls"},
		"nulls alone":               {array.NewNull(3), metadata(), "3 nulls"},
		"no nulls even":             {array.NewNull(0), metadata(), "tensors are of integers"},
		"a dictionary":              {dictionary(t, `[0,1,0]`, `[1,2]`), metadata(), "compute.CastArray to int64"},
		"a dictionary with a null":  {dictionary(t, `[0,1,0]`, `[1,null]`), metadata(), "decode it first"},
		"a dictionary, null index":  {dictionary(t, `[0,null,0]`, `[1,2]`), metadata(), "1 nulls"},
		"runs":                      {runs, metadata(), "compute.RunEndDecodeArray"},
		"bits":                      {fromJSON(t, arrow.FixedWidthTypes.Boolean, `[true,false]`), metadata(), "extensions.NewBool8Builder"},
		"rows of bits":              {fromJSON(t, lists(2, arrow.FixedWidthTypes.Boolean), `[[true,false]]`), metadata(), "packed into bits"},
		"texts":                     {fromJSON(t, arrow.BinaryTypes.String, `["1"]`), metadata(), "array of utf8"},
		"bytes":                     {fromJSON(t, arrow.BinaryTypes.Binary, `["AA=="]`), metadata(), "array of binary"},
		"bytes of one length":       {fromJSON(t, &arrow.FixedSizeBinaryType{ByteWidth: 1}, `["AA=="]`), metadata(), "array of fixed_size_binary"},
		"days":                      {fromJSON(t, arrow.FixedWidthTypes.Date32, `[1]`), metadata(), "the integers that it stores"},
		"times":                     {fromJSON(t, arrow.FixedWidthTypes.Timestamp_ns, `[1]`), metadata(), "the integers that it stores"},
		"durations":                 {fromJSON(t, arrow.FixedWidthTypes.Duration_s, `[1]`), metadata(), "the integers that it stores"},
		"decimals":                  {fromJSON(t, &arrow.Decimal128Type{Precision: 5, Scale: 2}, `["1.25"]`), metadata(), "cast it to floats"},
		"decimals of 32 bits":       {fromJSON(t, &arrow.Decimal32Type{Precision: 5, Scale: 2}, `["1.25"]`), metadata(), "cast it to floats"},
		"lists":                     {fromJSON(t, arrow.ListOf(i64), `[[1],[2]]`), metadata(), "build a fixed-size list"},
		"large lists":               {fromJSON(t, arrow.LargeListOf(i64), `[[1],[2]]`), metadata(), "build a fixed-size list"},
		"a map":                     {fromJSON(t, arrow.MapOf(i64, i64), `[[{"key":1,"value":2}]]`), metadata(), "different lengths"},
		"structs":                   {structs, metadata(), "one by one"},
		"a union":                   {union, metadata(), "tensors are of integers"},
		"a permuted tensor":         {extended(sixes, tensorShapeName, `{"shape":[2,3],"permutation":[1,0]}`), metadata(), "permuted ([1 0])"},
		"a permuted one by field":   {sixes, metadata(extensionKey, tensorShapeName, parametersKey, `{"shape":[2,3],"permutation":[1,0]}`), "row-major order"},
		"a tensor of another shape": {extended(sixes, tensorShapeName, `{"shape":[2,4]}`), metadata(), "shape [2 4] over lists of 6"},
		"a shape that wraps":        {extended(sixes, tensorShapeName, `{"shape":[4294967296,4294967296,6]}`), metadata(), "over lists of 6"},
		"a negative shape":          {extended(sixes, tensorShapeName, `{"shape":[-2,-3]}`), metadata(), "over lists of 6"},
		"parameters that are none":  {extended(sixes, tensorShapeName, `[`), metadata(), "parameters"},
		"a tensor over numbers":     {numbers, metadata(extensionKey, tensorShapeName, parametersKey, `{"shape":[]}`), "pass its storage"},
		"another extension":         {extended(numbers, "arrow.opaque", "x"), metadata(), "array.ExtensionArray.Storage"},
		"an unknown extension":      {numbers, metadata(extensionKey, "my.celsius"), "my.celsius"},
		"bool8 over more":           {numbers, metadata(extensionKey, bool8Name), "pass its storage"},
		"bfloat16 over int64":       {numbers, metadata(dtypeKey, "bfloat16"), "bfloat16 over int64"},
		"complex of three":          {fromJSON(t, lists(3, f32), `[[1,2,3]]`), metadata(dtypeKey, "complex64"), "complex64 over float32"},
		"a type unheard of":         {numbers, metadata(dtypeKey, "float7"), "float7 over int64"},
		"no axes but rows":          {numbers, metadata(shapeKey, "[]"), "over rows of shape [3]"},
		"nine axes": {fromJSON(t, lists(1, lists(1, lists(1, lists(1, lists(1, lists(1, lists(1, lists(1, i64)))))))), `[[[[[[[[[1]]]]]]]]]`),
			metadata(), "at most 8 axes"},
		"no buffer": {none, metadata(), "without a buffer"},
	} {
		_, err := flatten(example.values, example.metadata)
		if !errors.Is(err, strait.ErrArgument) || !strings.Contains(err.Error(), example.says) {
			t.Errorf("%s: %v does not say %q", name, err, example.says)
		}
		if len(example.metadata.Keys()) == 0 {
			if _, err := New(nil).Input(context.Background(), nil, example.values); !errors.Is(err, strait.ErrArgument) {
				t.Error(name, err)
			}
			if err := New(nil).Publish(context.Background(), nil, "x", example.values); !errors.Is(err, strait.ErrArgument) {
				t.Error(name, err)
			}
		}
	}
}

func TestAnEmptyTensorOfImmenseRowsIsRefusedAsAnArray(t *testing.T) {
	c, ctx := dial(t), context.Background()
	made, err := c.Create(ctx, strait.Spec{Name: "x", DType: strait.Int8, Shape: []int{math.MaxInt32, math.MaxInt32, math.MaxInt32, 0}})
	if err != nil {
		t.Skip("this host makes none:", err)
	}
	defer made[0].Release()
	if values, err := Array(made[0]); !errors.Is(err, strait.ErrArgument) {
		t.Error(values, err)
	}
	// arrow-go has no lists of size 0, and panics.
	rows, err := strait.NewTensor[int8](ctx, c, 2, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Release()
	if values, err := Array(rows.Tensor); !errors.Is(err, strait.ErrArgument) {
		t.Error(values, err)
	}
}
