package strait

import (
	"fmt"
	"math"
	"reflect"
	"strconv"
	"strings"
)

// DType is the type of a tensor's elements, by its name in the protocol. The constants are those
// that this client knows.
type DType string

// The element types. Complex numbers are pairs (real, imaginary); Bool8 is one byte, 0 for false
// and any other for true.
const (
	Bool8        DType = "bool8"
	Int8         DType = "int8"
	Int16        DType = "int16"
	Int32        DType = "int32"
	Int64        DType = "int64"
	Uint8        DType = "uint8"
	Uint16       DType = "uint16"
	Uint32       DType = "uint32"
	Uint64       DType = "uint64"
	Float16      DType = "float16"       // no Go type: uint16 has the bits
	BFloat16     DType = "bfloat16"      // no Go type: uint16 has the bits
	Float8E4M3FN DType = "float8_e4m3fn" // no Go type: uint8 has the bits
	Float8E5M2   DType = "float8_e5m2"   // no Go type: uint8 has the bits
	Float32      DType = "float32"
	Float64      DType = "float64"
	Complex64    DType = "complex64"
	Complex128   DType = "complex128"
)

// Size is the bytes of one element, 0 for a type that this client does not know.
func (d DType) Size() int {
	switch d {
	case Bool8, Int8, Uint8, Float8E4M3FN, Float8E5M2:
		return 1
	case Int16, Uint16, Float16, BFloat16:
		return 2
	case Int32, Uint32, Float32:
		return 4
	case Int64, Uint64, Float64, Complex64:
		return 8
	case Complex128:
		return 16
	}
	return 0
}

// Element is a Go type that a tensor's elements can have. int and uint are the 64-bit types.
type Element interface {
	~bool | ~int | ~int8 | ~int16 | ~int32 | ~int64 |
		~uint | ~uint8 | ~uint16 | ~uint32 | ~uint64 |
		~float32 | ~float64 | ~complex64 | ~complex128
}

// DTypeOf is the element type that T stands for.
func DTypeOf[T Element]() DType {
	switch reflect.TypeFor[T]().Kind() {
	case reflect.Bool:
		return Bool8
	case reflect.Int8:
		return Int8
	case reflect.Int16:
		return Int16
	case reflect.Int32:
		return Int32
	case reflect.Int, reflect.Int64:
		return Int64
	case reflect.Uint8:
		return Uint8
	case reflect.Uint16:
		return Uint16
	case reflect.Uint32:
		return Uint32
	case reflect.Uint, reflect.Uint64:
		return Uint64
	case reflect.Float32:
		return Float32
	case reflect.Float64:
		return Float64
	case reflect.Complex64:
		return Complex64
	}
	return Complex128
}

// holds says whether a []T may stand for elements of type d: the same type, or the raw bits of one
// that Go lacks.
func holds[T Element](d DType) bool {
	asked := DTypeOf[T]()
	switch d {
	case Float16, BFloat16:
		return asked == Uint16
	case Float8E4M3FN, Float8E5M2:
		return asked == Uint8
	case Bool8:
		return asked == Bool8 || asked == Uint8
	}
	return asked == d
}

const rankMax = 8

// byteSize is the length of a contiguous tensor. The error names what is wrong with the spec.
func byteSize(dtype DType, shape []int) (int64, error) {
	size := int64(dtype.Size())
	if size == 0 {
		return 0, fmt.Errorf("element type %q is not one that this client knows", dtype)
	}
	if len(shape) > rankMax {
		return 0, fmt.Errorf("shape %v has %d axes; at most %d are possible", shape, len(shape), rankMax)
	}
	empty := false
	for _, n := range shape {
		if n < 0 {
			return 0, fmt.Errorf("shape %v has a negative size", shape)
		}
		empty = empty || n == 0
	}
	if empty {
		return 0, nil
	}
	for _, n := range shape {
		if size > math.MaxInt64/int64(n) {
			return 0, fmt.Errorf("%s of shape %v has more bytes than there are addresses", dtype, shape)
		}
		size *= int64(n)
	}
	return size, nil
}

// spec is for messages: float64[2 3].
func spec(dtype DType, shape []int) string {
	sizes := make([]string, len(shape))
	for i, n := range shape {
		sizes[i] = strconv.Itoa(n)
	}
	return string(dtype) + "[" + strings.Join(sizes, " ") + "]"
}
