package strait

import (
	"encoding/json"
	"fmt"
	"math"
	"math/big"
	"reflect"
	"strconv"
	"strings"
	"time"
)

// Param sets a kernel's parameter: a bool, a number, a string, a DType or a list of numbers.
//
// A number reaches the kernel as it is: every integer type over its whole range (json.Number and
// big.Int as well, as far as int64 and uint64 go) as an integer, a float as a float. A time.Duration is
// refused, since it does not say in which unit the kernel counts: pass d.Milliseconds() or d.Seconds().
func Param(name string, value any) KernelOption {
	return kernelOption(func(r *kernelRequest) error {
		said, err := parameter(value)
		if err != nil {
			return argumentError("parameter %q: %w", name, err)
		}
		if err := checkText("a parameter's name", name); err != nil {
			return err
		}
		if r.Parameters == nil {
			r.Parameters = map[string]any{}
		}
		r.Parameters[name] = said
		return nil
	})
}

// parameter is a value as the protocol has it.
func parameter(value any) (any, error) {
	if value == nil {
		return nil, fmt.Errorf("nil; leave the parameter out to get its default")
	}
	said, isNumber, err := number(value)
	if isNumber || err != nil {
		return said, err
	}
	switch reflected := reflect.ValueOf(value); reflected.Kind() {
	case reflect.Bool:
		return reflected.Bool(), nil
	case reflect.String:
		return reflected.String(), checkText("a text", reflected.String())
	case reflect.Slice, reflect.Array:
		return list(reflected)
	}
	return nil, fmt.Errorf("a %T; parameters are bool, numbers, string or lists of numbers", value)
}

func list(values reflect.Value) (any, error) {
	all := make([]any, values.Len())
	for i := range all {
		element := values.Index(i).Interface()
		said, isNumber, err := number(element)
		if err != nil {
			return nil, fmt.Errorf("element %d: %w", i, err)
		}
		if !isNumber {
			return nil, fmt.Errorf("element %d is a %T; lists are of numbers", i, element)
		}
		all[i] = said
	}
	return all, nil
}

// number is a number as the protocol has it, and whether value is one.
func number(value any) (any, bool, error) {
	switch value := value.(type) {
	case time.Duration:
		return nil, false, fmt.Errorf("a time.Duration, which names no unit; pass d.Milliseconds(), d.Seconds() or what the kernel counts in")
	case json.Number:
		said, err := decimal(string(value))
		return said, err == nil, err
	case *big.Int:
		if value == nil {
			return nil, false, fmt.Errorf("a nil *big.Int")
		}
		said, err := integer(value)
		return said, err == nil, err
	case big.Int:
		said, err := integer(&value)
		return said, err == nil, err
	}
	switch reflected := reflect.ValueOf(value); {
	case reflected.CanInt():
		return reflected.Int(), true, nil
	case reflected.CanUint():
		return reflected.Uint(), true, nil
	case reflected.CanFloat():
		return real64(reflected.Float()), true, nil
	}
	return nil, false, nil
}

func decimal(text string) (any, error) {
	if strings.ContainsAny(text, ".eE") {
		value, err := strconv.ParseFloat(text, 64)
		if err != nil {
			return nil, fmt.Errorf("json.Number %q: %w", text, err)
		}
		return real64(value), nil
	}
	value, ok := new(big.Int).SetString(text, 10)
	if !ok {
		return nil, fmt.Errorf("json.Number %q is not a decimal number", text)
	}
	return integer(value)
}

func integer(value *big.Int) (any, error) {
	switch {
	case value.IsInt64():
		return value.Int64(), nil
	case value.IsUint64():
		return value.Uint64(), nil
	}
	return nil, fmt.Errorf("integer %s is beyond int64 and uint64; pass it as a float64 if its nearest one will do", value)
}

// real64 is a float that JSON does not take for an integer: 2.0 and not 2. For the numbers that JSON
// lacks the protocol has words.
func real64(number float64) any {
	switch {
	case math.IsNaN(number):
		return "nan"
	case math.IsInf(number, 1):
		return "inf"
	case math.IsInf(number, -1):
		return "-inf"
	}
	text := strconv.FormatFloat(number, 'g', -1, 64)
	if !strings.ContainsAny(text, ".e") {
		text += ".0"
	}
	return json.RawMessage(text)
}
