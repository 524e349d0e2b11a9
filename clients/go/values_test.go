package strait

import (
	"context"
	"encoding/json"
	"errors"
	"math"
	"math/big"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestParameters(t *testing.T) {
	type axis int
	type ratio float32
	type level string
	for _, c := range []struct {
		value any
		want  string
	}{
		{true, `true`}, {1, `1`}, {axis(-2), `-2`}, {"bfloat16", `"bfloat16"`}, {BFloat16, `"bfloat16"`}, {level("x"), `"x"`},
		{int8(math.MinInt8), `-128`}, {int16(math.MinInt16), `-32768`}, {int32(math.MinInt32), `-2147483648`},
		{math.MinInt64, `-9223372036854775808`}, {math.MaxInt64, `9223372036854775807`}, {int64(1<<53 + 1), `9007199254740993`},
		{uint8(255), `255`}, {uint16(65535), `65535`}, {uint32(math.MaxUint32), `4294967295`}, {uint(1<<63 - 1), `9223372036854775807`},
		{uint64(math.MaxUint64), `18446744073709551615`},
		{big.NewInt(-5), `-5`}, {new(big.Int).SetUint64(math.MaxUint64), `18446744073709551615`}, {*big.NewInt(7), `7`},
		{json.Number("9007199254740993"), `9007199254740993`}, {json.Number("-9223372036854775808"), `-9223372036854775808`},
		{json.Number("18446744073709551615"), `18446744073709551615`}, {json.Number("2.0"), `2.0`}, {json.Number("1e3"), `1000.0`},
		// A float stays one also where it has no fraction, and keeps the sign of its zero.
		{0.1, `0.1`}, {2.0, `2.0`}, {ratio(0.5), `0.5`}, {float32(0.1), `0.10000000149011612`}, {math.Copysign(0, -1), `-0.0`},
		{float64(1 << 53), `9.007199254740992e+15`}, {1e21, `1e+21`}, {5e-324, `5e-324`}, {math.MaxFloat64, `1.7976931348623157e+308`},
		{math.NaN(), `"nan"`}, {math.Inf(1), `"inf"`}, {float32(math.Inf(-1)), `"-inf"`},
		{[]float64{1, math.Inf(1)}, `[1.0,"inf"]`}, {[]int{3, 4}, `[3,4]`}, {[2]uint64{0, math.MaxUint64}, `[0,18446744073709551615]`},
		{[]float64{}, `[]`}, {[]any{1, 0.5, json.Number("9007199254740993"), big.NewInt(2)}, `[1,0.5,9007199254740993,2]`},
	} {
		r := &invokeRequest{}
		err := Param("p", c.value).call(r)
		if said, jsonErr := json.Marshal(r.Parameters["p"]); err != nil || jsonErr != nil || string(said) != c.want {
			t.Errorf("%T %v: %s and not %s: %v %v", c.value, c.value, said, c.want, err, jsonErr)
		}
	}
	beyond := new(big.Int).Lsh(big.NewInt(1), 64)
	for _, wrong := range []any{
		nil, map[string]int{}, []string{"a"}, [][]float64{{1}}, "\xff", 1i, new(int), []any{"a"}, []any{nil}, []bool{true}, struct{}{},
		time.Second, []time.Duration{1}, time.Now(), beyond, []*big.Int{beyond}, (*big.Int)(nil), big.NewFloat(1), big.NewRat(1, 2),
		json.Number(""), json.Number("NaN"), json.Number("1e999"), json.Number("18446744073709551616"), json.Number("-9223372036854775809"),
	} {
		if err := Param("p", wrong).call(&invokeRequest{}); !errors.Is(err, ErrArgument) || !strings.Contains(err.Error(), `"p"`) {
			t.Errorf("%v: %v", wrong, err)
		}
	}
}

func TestBoundsAndDefaultsAreExact(t *testing.T) {
	c, p := scripted(t)
	go func() {
		asked := p.receive()
		p.send(opOK, asked.sequence, `{"kernels":[{"name":"k","parameters":[`+
			`{"name":"i","kind":"integer","default":-9007199254740993,"minimum":-9223372036854775808,"maximum":18446744073709551615},`+
			`{"name":"r","kind":"real","default":"-inf","minimum":null,"maximum":0.1},`+
			`{"name":"l","kind":"reals","default":[1,18446744073709551615,2.5,"nan"]},{"name":"t","kind":"text","default":"x"},{"name":"n","default":null}]}]}`)
	}()
	kernels, err := c.Kernels(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	want := []Parameter{
		{Name: "i", Kind: "integer", Default: json.Number("-9007199254740993"), Minimum: "-9223372036854775808", Maximum: "18446744073709551615"},
		{Name: "r", Kind: "real", Default: "-inf", Maximum: "0.1"},
		{Name: "l", Kind: "reals", Default: []any{json.Number("1"), json.Number("18446744073709551615"), json.Number("2.5"), "nan"}},
		{Name: "t", Kind: "text", Default: "x"}, {Name: "n"},
	}
	if got := kernels[0].Parameters; !reflect.DeepEqual(got, want) {
		t.Errorf("%#v", got)
	}
}

func TestElementTypes(t *testing.T) {
	type celsius float32
	for got, want := range map[DType]DType{
		DTypeOf[bool](): Bool8, DTypeOf[int](): Int64, DTypeOf[int8](): Int8, DTypeOf[int16](): Int16, DTypeOf[int32](): Int32,
		DTypeOf[uint8](): Uint8, DTypeOf[uint16](): Uint16, DTypeOf[uint32](): Uint32, DTypeOf[uint](): Uint64,
		DTypeOf[celsius](): Float32, DTypeOf[float64](): Float64, DTypeOf[complex64](): Complex64, DTypeOf[complex128](): Complex128,
	} {
		if got != want {
			t.Error(got, want)
		}
	}
	if !holds[uint16](BFloat16) || !holds[uint8](Float8E5M2) || !holds[uint8](Bool8) || holds[uint16](Int16) || holds[float32](Float64) || holds[bool](Uint8) {
		t.Error("which Go types stand for which elements")
	}
}

func TestDataThatDoesNotFitItsShape(t *testing.T) {
	c := &Client{conn: &conn{}}
	for says, data := range map[string]Input{
		"float64[2 3] has 48 bytes; 40 were given":   Slice(make([]float64, 5), 2, 3),
		"bfloat16[] has 2 bytes; 3 were given":       Raw(BFloat16, make([]byte, 3)),
		"negative":                                   Slice([]int8{}, -1),
		`"float7" is not one that this client knows`: Raw("float7", nil),
	} {
		_, err := c.Call(context.Background(), "k", Inputs{"x": data})
		if !errors.Is(err, ErrArgument) || !strings.Contains(err.Error(), says) {
			t.Errorf("%v does not say %q", err, says)
		}
	}
	if _, err := c.Call(context.Background(), "k", Inputs{"x": nil}); !errors.Is(err, ErrArgument) {
		t.Error(err)
	}
	var none *Tensor
	if _, err := c.Call(context.Background(), "k", Inputs{"x": none}); !errors.Is(err, ErrArgument) {
		t.Error(err)
	}
}

func TestAMissingOutputFailsWhereItIsUsed(t *testing.T) {
	y := (&Result{}).Tensor("y")
	if _, err := As[float64](y); !errors.Is(err, ErrArgument) || !strings.Contains(err.Error(), `"y"`) {
		t.Error(err)
	}
	if y.Err() == nil || y.Len() != 0 || y.Writable() {
		t.Error("it is none")
	}
	y.Release()
}

func TestTimesAreNeverRoundedToNothing(t *testing.T) {
	for d, want := range map[time.Duration]int64{
		0: 0, 1: 1, 1500 * time.Microsecond: 2, time.Second: 1000, -1: 0, math.MaxInt64: math.MaxInt64/1_000_000 + 1,
	} {
		if got := milliseconds(d); got != want {
			t.Error(d, got)
		}
	}
}

func TestRemoteErrorsByOtherNames(t *testing.T) {
	for target, remote := range map[error]*RemoteError{
		ErrLeaseExpired:          {Reason: "LEASE_EXPIRED"},
		context.DeadlineExceeded: {Code: "DEADLINE_EXCEEDED"},
		context.Canceled:         {Code: "CANCELLED"},
	} {
		if !errors.Is(remote, target) || errors.Is(&RemoteError{Code: "INTERNAL"}, target) {
			t.Error(target)
		}
	}
}

func host(t *testing.T, directory string) string {
	t.Helper()
	if err := os.MkdirAll(directory, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(directory, dataSocket), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return directory
}

func TestFindingTheHost(t *testing.T) {
	const nobody = 4_000_000_000
	temporary := t.TempDir()
	runtime, session := host(t, filepath.Join(temporary, "runtime")), host(t, filepath.Join(temporary, "session/strait"))
	all := map[string]string{"STRAIT_ADDRESS": "unix:///named", "RUNTIME_DIRECTORY": runtime, "XDG_RUNTIME_DIR": filepath.Join(temporary, "session")}
	find := func(address string) (string, error) {
		return findDirectory(address, func(name string) string { return all[name] }, nobody)
	}
	check := func(want string) {
		t.Helper()
		if got, err := find(""); got != want || err != nil {
			t.Error(got, err)
		}
	}
	check("/named")
	delete(all, "STRAIT_ADDRESS")
	check(runtime)
	// A service's own runtime directory without a host in it does not hide the host.
	if err := os.Remove(filepath.Join(runtime, dataSocket)); err != nil {
		t.Fatal(err)
	}
	check(session)
	clear(all)
	if _, err := find(""); !errors.Is(err, ErrNoHost) || !strings.Contains(err.Error(), "/tmp/strait-4000000000") || !strings.Contains(err.Error(), "strait serve") {
		t.Error(err)
	}
	for _, wrong := range []string{"/run/strait", "unix:/run", "unix://run/strait", "grpc://host:1"} {
		if _, err := find(wrong); !errors.Is(err, ErrArgument) {
			t.Error(wrong, err)
		}
	}
	if err := checkOwner(session, os.Geteuid()); err != nil {
		t.Error(err)
	}
	if err := checkOwner(session, os.Geteuid()+1); !errors.Is(err, ErrNoHost) {
		t.Error(err)
	}
	if _, err := Dial(context.Background(), "unix://"+temporary); !errors.Is(err, ErrNoHost) || !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}
