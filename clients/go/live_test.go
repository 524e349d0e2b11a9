package strait

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/big"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"strait/internal/hosttest"
	"strait/internal/shm"
)

func dial(t *testing.T, options ...DialOption) *Client {
	t.Helper()
	address, _ := hosttest.Start(t)
	return dialAt(t, address, options...)
}

func dialAt(t *testing.T, address string, options ...DialOption) *Client {
	t.Helper()
	c, err := Dial(context.Background(), address, options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func must[T any](t *testing.T) func(T, error) T {
	return func(value T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return value
	}
}

// inode says which memory file lies at the first byte.
func inode(t *testing.T, data []byte) string {
	t.Helper()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(maps)) {
		var from, to, offset uint64
		var protection, device, inode string
		if _, err := fmt.Sscanf(line, "%x-%x %s %x %s %s", &from, &to, &protection, &offset, &device, &inode); err != nil {
			continue
		}
		if at := addressOf(data); from <= at && at < to {
			return inode
		}
	}
	return ""
}

func addressOf(data []byte) uint64 {
	var at uint64
	fmt.Sscanf(fmt.Sprintf("%p", data), "0x%x", &at)
	return at
}

func TestACallCopiesNothing(t *testing.T) {
	c, ctx := dial(t), context.Background()
	x := must[TensorOf[float64]](t)(NewTensor[float64](ctx, c, 300, 1000))
	defer x.Release()
	for i, data := 0, x.Data(); i < len(data); i++ {
		data[i] = float64(i)
	}
	res := must[*Result](t)(c.Call(ctx, "scale-shift", Inputs{"x": x}, Param("a", 2), Param("b", 1), Verify()))
	defer res.Release()
	y := must[[]float64](t)(As[float64](res.Tensor("y")))
	for i, value := range y {
		if value != 2*float64(i)+1 {
			t.Fatal(i, value)
		}
	}
	if len(y) != 300_000 || !reflect.DeepEqual(res.Tensor("y").Shape(), []int{300, 1000}) {
		t.Error(len(y), res.Tensor("y").Shape())
	}
	if res.CopiedBytes != 0 || c.ClientStats().CopiedBytes != 0 {
		t.Error("copied:", res.CopiedBytes, c.ClientStats())
	}
	saw := map[string]string{}
	for _, pages := range res.Pages {
		saw[pages.Port] = fmt.Sprint(pages.Inode)
	}
	if got := (map[string]string{"x": inode(t, shm.Raw(x.Data())), "y": inode(t, shm.Raw(y))}); !reflect.DeepEqual(got, saw) {
		t.Error("pages here and in the kernel:", got, saw)
	}
	// The next call may have the result as it is.
	again := must[*Result](t)(c.Call(ctx, "scale-shift", Inputs{"x": res.Tensor("y")}, Param("a", 0), Param("b", 5)))
	defer again.Release()
	if z := must[[]float64](t)(As[float64](again.Tensor("y"))); z[7] != 5 || again.CopiedBytes != 0 {
		t.Error(z[7], again.CopiedBytes)
	}
	// And the input may be written again.
	x.Data()[0] = 21
	third := must[*Result](t)(c.Call(ctx, "scale-shift", Inputs{"x": x}, Param("a", 2), Param("b", 0)))
	defer third.Release()
	if z := must[[]float64](t)(As[float64](third.Tensor("y"))); z[0] != 42 {
		t.Error(z[0])
	}
}

func TestBigTensorsAreBornInHugePages(t *testing.T) {
	address, _ := hosttest.Start(t)
	c, other, ctx := dialAt(t, address), dialAt(t, address), context.Background()
	const count = 16 << 20 / 8
	unfilled := must[TensorOf[float64]](t)(NewTensor[float64](ctx, c, count))
	defer unfilled.Release()
	small := must[TensorOf[uint8]](t)(NewTensor[uint8](ctx, c, 4<<20-1))
	defer small.Release()
	small.Data()[0] = 1
	if stats := c.ClientStats(); stats.HugeBytes != 0 {
		t.Error("what is small or not looked at costs nothing:", stats)
	}
	made := must[[]*Tensor](t)(c.Create(ctx, Spec{"a", Float64, []int{count}}, Spec{"b", Float64, []int{count}}))
	defer releaseAll(made)
	for _, tensor := range made {
		data := must[[]float64](t)(As[float64](tensor))
		for i := range data {
			if data[i] != 0 {
				t.Fatal(i, data[i])
			}
			data[i] = float64(i)
		}
	}
	huge := c.ClientStats().HugeBytes
	if huge%(2<<20) != 0 || huge > 32<<20 {
		t.Error(huge)
	}
	// Looked at again, nothing is touched.
	if data := must[[]float64](t)(As[float64](made[1])); data[1] != 1 || data[1<<18] != 1<<18 || c.ClientStats().HugeBytes != huge {
		t.Error(data[1], data[1<<18], c.ClientStats())
	}
	must[Flight](t)(c.Publish(ctx, "go big", made[0]))
	defer c.Delete(ctx, "go big")
	// One that is read-only before it was looked at is not written to.
	must[Flight](t)(c.Publish(ctx, "go unfilled", unfilled))
	defer c.Delete(ctx, "go unfilled")
	if unfilled.Data()[count-1] != 0 || c.ClientStats().HugeBytes != huge {
		t.Error(c.ClientStats())
	}
	seen := must[*Tensor](t)(other.Fetch(ctx, "go big#b"))
	defer seen.Release()
	data := must[[]float64](t)(As[float64](seen))
	if data[count-1] != count-1 || other.ClientStats().HugeBytes != 0 {
		t.Error(data[count-1], other.ClientStats())
	}
	for _, tensor := range []*Tensor{seen, made[1]} {
		bytes := must[[]byte](t)(tensor.Bytes())
		if at := addressOf(bytes) - uint64(tensor.place().Offset); at%(2<<20) != 0 {
			t.Errorf("a segment is mapped at %#x", at)
		}
	}
	copied := make([]float64, count)
	copied[0], copied[count-1] = 3, 4
	res := must[*Result](t)(c.Call(ctx, "clip", Inputs{"x": Slice(copied)}))
	defer res.Release()
	if y := must[[]float64](t)(As[float64](res.Tensor("y"))); y[0] != 3 || y[1] != 0 || y[count-1] != 4 {
		t.Error(y[0], y[1], y[count-1])
	}
	if huge == 0 {
		t.Skip("Linux has no huge pages at hand")
	}
}

func TestOtherDataIsCopiedOnceAndCounted(t *testing.T) {
	c, ctx := dial(t), context.Background()
	// More than a frame takes.
	data := make([]float32, 10_000)
	data[9999] = 6
	var segments []string
	for i := range 3 {
		data[0] = float32(i)
		res := must[*Result](t)(c.Call(ctx, "scale-shift", Inputs{"x": Slice(data, 2, 5000)}, Param("a", 1), Param("b", 0.5)))
		y := must[[]float32](t)(As[float32](res.Tensor("y")))
		if y[0] != float32(i)+0.5 || y[9999] != 6.5 {
			t.Error(y[0], y[9999])
		}
		res.Release()
		if stats := c.ClientStats(); stats.CopiedBytes != int64(40_000*(i+1)) || stats.Calls != int64(i+1) || stats.Mappings != 1 {
			t.Error(stats)
		}
		segments = append(segments, c.copies.idle[0].Mapping().Segment)
	}
	if segments[0] != segments[2] {
		t.Error("the segment is to be used again:", segments)
	}
	res := must[*Result](t)(c.Call(ctx, "scale-shift", Inputs{"x": Scalar(4.0)}, Param("a", math.Inf(1)), Param("b", 0)))
	defer res.Release()
	if y := res.Tensor("y"); len(y.Shape()) != 0 || y.Len() != 1 || must[[]float64](t)(As[float64](y))[0] != math.Inf(1) {
		t.Error(y.Shape())
	}
}

func TestAnyByteButZeroIsTrue(t *testing.T) {
	c, ctx := dial(t), context.Background()
	want := []bool{false, true, true, true}
	must[Flight](t)(c.Publish(ctx, "go truths", Raw(Bool8, []byte{0, 1, 2, 255}, 4)))
	defer c.Delete(ctx, "go truths")
	seen := must[*Tensor](t)(c.Fetch(ctx, "go truths"))
	defer seen.Release()
	before := c.ClientStats().CopiedBytes
	data := must[[]bool](t)(As[bool](seen))
	if raw := must[[]uint8](t)(As[uint8](seen)); !reflect.DeepEqual(data, want) || !bytes.Equal(shm.Raw(data), []byte{0, 1, 1, 1}) || raw[2] != 2 {
		t.Error(data, raw)
	}
	if copied := c.ClientStats().CopiedBytes - before; copied != 4 {
		t.Error("a copy that is not counted:", copied)
	}
	made := must[TensorOf[bool]](t)(NewTensor[bool](ctx, c, 4))
	defer made.Release()
	raw := must[[]uint8](t)(As[uint8](made.Tensor))
	copy(raw, []byte{0, 1, 2, 255})
	if data := made.Data(); !reflect.DeepEqual(data, want) || raw[3] != 1 || c.ClientStats().CopiedBytes-before != 4 {
		t.Error(data, raw)
	}
}

func TestTruthsAreFoundAtAnyPlace(t *testing.T) {
	for at := range 19 {
		data := make([]uint64, 3)
		bytes := shm.Raw(data)[:19]
		bytes[(at+1)%19] = 1
		if !areTruths(bytes) {
			t.Error(bytes)
		}
		if bytes[at] = 2; areTruths(bytes) {
			t.Error(bytes)
		}
	}
}

func TestPublishAndFetch(t *testing.T) {
	address, _ := hosttest.Start(t)
	c, other, ctx := dialAt(t, address), dialAt(t, address), context.Background()
	x := must[TensorOf[int32]](t)(NewTensor[int32](ctx, c, 4))
	defer x.Release()
	copy(x.Data(), []int32{1, 2, 3, 4})
	must[Flight](t)(c.Publish(ctx, "go x", x))
	if x.Writable() || x.Data()[3] != 4 {
		t.Error("it stays readable at its address, and is not writable")
	}
	if _, err := x.ReadFrom(bytes.NewReader(make([]byte, 16))); !errors.Is(err, ErrReadOnly) {
		t.Error(err)
	}
	y := must[*Tensor](t)(other.Fetch(ctx, "go x"))
	defer y.Release()
	seen := must[[]int32](t)(As[int32](y))
	if !reflect.DeepEqual(seen, []int32{1, 2, 3, 4}) || inode(t, shm.Raw(seen)) != inode(t, shm.Raw(x.Data())) {
		t.Error(seen)
	}
	if _, err := As[uint32](y); !errors.Is(err, ErrArgument) {
		t.Error(err)
	}
	if _, err := c.Publish(ctx, "go x", x); reason(err) != "NAME_TAKEN" {
		t.Error(err)
	}
	must[Flight](t)(c.Publish(ctx, "go x", Slice([]bool{true, false}), Replace()))
	if flight := must[Flight](t)(c.Lookup(ctx, "go x")); flight.Mapping.Tensors[0].DType != Bool8 || flight.Mapping.Tensors[0].Name != "go x" {
		t.Error(flight)
	}
	found := 0
	for _, flight := range must[[]Flight](t)(c.List(ctx)) {
		if flight.Name == "go x" {
			found++
		}
	}
	if found != 1 || c.ClientStats().CopiedBytes != 2 {
		t.Error(found, c.ClientStats())
	}
	if err := c.Delete(ctx, "go x"); err != nil {
		t.Error(err)
	}
	if _, err := c.Fetch(ctx, "go x"); reason(err) != "FLIGHT_NOT_FOUND" {
		t.Error(err)
	}
	if seen[3] != 4 {
		t.Error("pages outlive the name")
	}
}

func reason(err error) string {
	var remote *RemoteError
	if !errors.As(err, &remote) {
		return fmt.Sprintf("not remote: %v", err)
	}
	return remote.Reason
}

func TestSeveralTensorsUnderOneName(t *testing.T) {
	c, ctx := dial(t), context.Background()
	made := must[[]*Tensor](t)(c.Create(ctx, Spec{"a", BFloat16, []int{3}}, Spec{"b", Float64, []int{3, 2}}))
	copy(must[[]uint16](t)(As[uint16](made[0])), []uint16{0x3f80, 0x4000, 0x4040})
	must[[]float64](t)(As[float64](made[1]))[5] = 7
	must[Flight](t)(c.Publish(ctx, "go pair", made[0]))
	releaseAll(made)
	defer c.Delete(ctx, "go pair")
	if _, err := c.Fetch(ctx, "go pair"); !errors.Is(err, ErrArgument) {
		t.Error(err)
	}
	b := must[*Tensor](t)(c.Fetch(ctx, "go pair#b"))
	if data := must[[]float64](t)(As[float64](b)); data[5] != 7 {
		t.Error(data)
	}
	res := must[*Result](t)(c.Call(ctx, "cast", Inputs{"x": Name("go pair#a")}, Param("to", Float32)))
	if data := must[[]float32](t)(As[float32](res.Tensor("y"))); !reflect.DeepEqual(data, []float32{1, 2, 3}) {
		t.Error(data)
	}
	fromSegment := must[*Result](t)(c.Call(ctx, "scale-shift", Inputs{"x": b}, Param("a", 1), Param("b", 1)))
	if data := must[[]float64](t)(As[float64](fromSegment.Tensor("y"))); data[5] != 8 {
		t.Error(data)
	}
	all := must[[]*Tensor](t)(c.FetchAll(ctx, "go pair"))
	all[0].Release()
	if data := must[[]float64](t)(As[float64](all[1])); data[5] != 7 {
		t.Error("the segment stays mapped for its other tensor")
	}
	if _, err := all[0].Bytes(); !errors.Is(err, ErrReleased) {
		t.Error(err)
	}
	all[1].Release()
	b.Release()
	res.Release()
	fromSegment.Release()
	if stats := c.ClientStats(); stats.Mappings != 0 {
		t.Error(stats)
	}
}

func TestReleasedIsReleased(t *testing.T) {
	c, ctx := dial(t), context.Background()
	x := must[TensorOf[float64]](t)(NewTensor[float64](ctx, c, 3))
	x.Release()
	x.Release()
	_, err := c.Call(ctx, "scale-shift", Inputs{"x": x})
	if !errors.Is(err, ErrReleased) || x.Data() != nil || !errors.Is(x.Err(), ErrReleased) {
		t.Error(err, x.Err())
	}
	if stats := must[Stats](t)(c.Stats(ctx)); stats.Own.Leases != 0 || c.ClientStats().Mappings != 0 {
		t.Error(stats.Own)
	}
}

func TestKernelsSayWhatTheyTake(t *testing.T) {
	c := dial(t)
	for _, kernel := range must[[]Kernel](t)(c.Kernels(context.Background())) {
		if kernel.Name == "zscore" {
			if kernel.Signature != "()->()" || kernel.Combine != "none" || kernel.BlockTree != nil || kernel.Inputs[0].Whole {
				t.Errorf("%+v", kernel)
			}
			if kernel.Doc == "" || kernel.Inputs[0].Name != "x" || kernel.Parameters[0].Kind != "axis" {
				t.Errorf("%+v", kernel)
			}
			return
		}
	}
	t.Error("no zscore")
}

func TestIntegersBeyondFloatsAreExact(t *testing.T) {
	c, ctx := dial(t), context.Background()
	const exact = 1 << 53
	signed := func(data []int64, option CallOption) []int64 {
		t.Helper()
		res := must[*Result](t)(c.Call(ctx, "clip", Inputs{"x": Slice(data)}, option))
		defer res.Release()
		return slices.Clone(must[[]int64](t)(As[int64](res.Tensor("y"))))
	}
	if y := signed([]int64{exact, exact + 1, exact + 2}, Param("hi", exact+1)); !reflect.DeepEqual(y, []int64{exact, exact + 1, exact + 1}) {
		t.Error(y)
	}
	if y := signed([]int64{-exact - 6, -exact - 1}, Param("lo", int64(-exact-1))); !reflect.DeepEqual(y, []int64{-exact - 1, -exact - 1}) {
		t.Error(y)
	}
	if y := signed([]int64{math.MinInt64, math.MaxInt64}, Param("lo", math.MinInt64+1)); !reflect.DeepEqual(y, []int64{math.MinInt64 + 1, math.MaxInt64}) {
		t.Error(y)
	}
	for _, hi := range []any{uint64(1<<63 - 1), json.Number("9223372036854775807"), new(big.Int).SetUint64(1<<63 - 1)} {
		res := must[*Result](t)(c.Call(ctx, "clip", Inputs{"x": Slice([]uint64{1 << 63, 5})}, Param("hi", hi)))
		if y := must[[]uint64](t)(As[uint64](res.Tensor("y"))); !reflect.DeepEqual(y, []uint64{1<<63 - 1, 5}) {
			t.Error(hi, y)
		}
		res.Release()
	}
}

func TestRemoteErrorsHaveTheHostsWords(t *testing.T) {
	c, ctx := dial(t), WithRequestID(context.Background(), "go-test")
	_, err := c.Call(ctx, "scale-shift", Inputs{"x": Slice([]float64{1})}, Param("slope", 2))
	var remote *RemoteError
	if !errors.As(err, &remote) || remote.Code != "INVALID_ARGUMENT" || remote.Reason != "UNKNOWN_PARAMETER" || remote.RequestID != "go-test" {
		t.Error(err)
	}
	if _, err := c.Call(ctx, "no such", nil); reason(err) != "KERNEL_NOT_FOUND" {
		t.Error(err)
	}
}

func TestARunawayKernelEnds(t *testing.T) {
	address, _ := hosttest.Start(t, "spins.wasm", "traps.wasm")
	c := dialAt(t, address)
	x := Slice([]float64{1})
	_, err := c.Call(context.Background(), "spins/k", Inputs{"x": x}, Deadline(50*time.Millisecond))
	if reason(err) != "DEADLINE" || !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	time.AfterFunc(50*time.Millisecond, cancel)
	if _, err := c.Call(ctx, "spins/k", Inputs{"x": x}); reason(err) != "CANCELLED" || !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	ctx, cancel = context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := c.Call(ctx, "spins/k", Inputs{"x": x}); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	if stats := must[Stats](t)(c.Stats(context.Background())); stats.Running != 0 {
		t.Error("a kernel still runs")
	}
	_, err = c.Call(context.Background(), "traps/k", Inputs{"x": x})
	var remote *RemoteError
	if !errors.As(err, &remote) || remote.Reason != "GUEST_TRAP" || remote.Backtrace == "" {
		t.Errorf("%#v", err)
	}
}

func TestACallThatWaitsForAWorkerIsCancelled(t *testing.T) {
	t.Setenv("STRAIT__ENGINE__WORKERS", "1")
	address, _ := hosttest.Start(t, "spins.wasm")
	c, other := dialAt(t, address), dialAt(t, address)
	ctx, stop := context.WithCancel(context.Background())
	spins := make(chan error)
	go func() {
		_, err := other.Call(ctx, "spins/k", Inputs{"x": Slice([]float64{1})})
		spins <- err
	}()
	for must[Stats](t)(c.Stats(context.Background())).Running == 0 {
		time.Sleep(time.Millisecond)
	}
	for range 3 {
		brief, stop := context.WithTimeout(context.Background(), 20*time.Millisecond)
		defer stop()
		if _, err := c.Call(brief, "scale-shift", Inputs{"x": Slice([]float64{1})}); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		if err := c.Ping(context.Background()); err != nil {
			t.Error("the connection stays:", err)
		}
	}
	stop()
	if err := <-spins; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	res := must[*Result](t)(c.Call(context.Background(), "scale-shift", Inputs{"x": Slice([]float64{1})}, Param("a", 2.0), Param("b", 1)))
	if y := must[[]float64](t)(As[float64](res.Tensor("y"))); y[0] != 3 {
		t.Error(y)
	}
	res.Release()
}

func TestAKeyBelongsToOneRequest(t *testing.T) {
	c, ctx := dial(t), context.Background()
	x := must[TensorOf[float64]](t)(NewTensor[float64](ctx, c, 3))
	defer x.Release()
	call := func(kernel string, options ...CallOption) ([]float64, error) {
		res, err := c.Call(ctx, kernel, Inputs{"x": x}, append(options, IdempotencyKey("go-once"))...)
		if err != nil {
			return nil, err
		}
		defer res.Release()
		data, err := As[float64](res.Tensor("y"))
		return slices.Clone(data), err
	}
	copy(x.Data(), []float64{0, 1, 2})
	for range 2 {
		if y, err := call("scale-shift", Param("a", 2)); err != nil || !reflect.DeepEqual(y, []float64{0, 2, 4}) {
			t.Error(y, err)
		}
	}
	for _, other := range [][]CallOption{{Param("a", 3)}, {Param("a", 2), PublishAs("y", "go keyed")}, {Param("a", 2), Seal()}} {
		if _, err := call("scale-shift", other...); reason(err) != "IDEMPOTENCY_KEY_REUSED" {
			t.Error(err)
		}
	}
	if _, err := call("zscore"); reason(err) != "IDEMPOTENCY_KEY_REUSED" {
		t.Error(err)
	}
}

func TestAHostThatIsKilled(t *testing.T) {
	address, host := hosttest.Start(t, "spins.wasm")
	c := dialAt(t, address)
	x := must[TensorOf[float64]](t)(NewTensor[float64](context.Background(), c, 3))
	time.AfterFunc(200*time.Millisecond, func() { host.Kill() })
	if _, err := c.Call(context.Background(), "spins/k", Inputs{"x": x}); !errors.Is(err, ErrDisconnected) {
		t.Error(err)
	}
	if _, err := host.Wait(); err != nil {
		t.Error(err)
	}
	x.Data()[0] = 1
	if !errors.Is(x.Err(), ErrDisconnected) {
		t.Error(x.Err())
	}
	x.Release()
	if stats := c.ClientStats(); stats.Mappings != 0 {
		t.Error(stats)
	}
	if _, err := Dial(context.Background(), address); !errors.Is(err, ErrNoHost) {
		t.Error(err)
	}
}

func TestManyGoroutines(t *testing.T) {
	c, ctx := dial(t), context.Background()
	var group sync.WaitGroup
	for caller := range 8 {
		group.Go(func() {
			for i := range 25 {
				value := float64(100*caller + i)
				res, err := c.Call(ctx, "scale-shift", Inputs{"x": Slice([]float64{value})}, Param("a", 2), Param("b", 1))
				if err != nil {
					t.Error(err)
					return
				}
				if y, err := As[float64](res.Tensor("y")); err != nil || y[0] != 2*value+1 {
					t.Error(y, err)
				}
				res.Release()
			}
		})
	}
	group.Wait()
}

func TestAThousandCallsLeaveNothingBehind(t *testing.T) {
	c, ctx := dial(t), context.Background()
	x := must[TensorOf[float64]](t)(NewTensor[float64](ctx, c, 100_000))
	defer x.Release()
	call := func(times int) {
		for range times {
			res := must[*Result](t)(c.Call(ctx, "scale-shift", Inputs{"x": x}, Param("a", 1), Param("b", 0)))
			res.Release()
		}
	}
	call(50)
	fds, before := openFDs(t), must[Stats](t)(c.Stats(ctx))
	call(1000)
	after := must[Stats](t)(c.Stats(ctx))
	if now := openFDs(t); now != fds || c.ClientStats().Mappings != 1 {
		t.Errorf("%d descriptors, %d before; %+v", now, fds, c.ClientStats())
	}
	// The host may start a thread meanwhile, which has some mappings; a leak would be a thousand.
	if after.Process.FDs > before.Process.FDs+2 || after.Process.Mappings > before.Process.Mappings+50 || after.Leases != before.Leases || after.Segments != before.Segments {
		t.Errorf("%s\n%s", before.JSON, after.JSON)
	}
}

func TestAnExpiredLease(t *testing.T) {
	address, _ := hosttest.Start(t)
	c, ctx := dialAt(t, address, WithoutRenewal()), context.Background()
	must[Flight](t)(c.Publish(ctx, "go brief", Slice([]int8{1, 2})))
	defer c.Delete(ctx, "go brief")
	x := must[*Tensor](t)(c.Fetch(ctx, "go brief", LeaseFor(100*time.Millisecond)))
	defer x.Release()
	if granted := must[time.Duration](t)(x.Renew(ctx, 150*time.Millisecond)); granted != 150*time.Millisecond {
		t.Error(granted)
	}
	for deadline := time.Now().Add(10 * time.Second); x.Err() == nil && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond)
	}
	_, err := c.Call(ctx, "clip", Inputs{"x": x})
	_, renewErr := x.Renew(ctx, 0)
	if !errors.Is(err, ErrLeaseExpired) || !errors.Is(renewErr, ErrLeaseExpired) {
		t.Error(err, renewErr)
	}
	if data, err := As[int8](x); err != nil || data[1] != 2 {
		t.Error(data, err)
	}
	kept := dialAt(t, address, WithLease(100*time.Millisecond))
	y := must[*Tensor](t)(kept.Fetch(ctx, "go brief"))
	defer y.Release()
	time.Sleep(500 * time.Millisecond)
	if err := y.Err(); err != nil {
		t.Error("it is to be renewed in the background:", err)
	}
}

func TestAdoptingAMemoryFile(t *testing.T) {
	c, ctx := dial(t), context.Background()
	file := must[*os.File](t)(shm.NewFile("own"))
	defer file.Close()
	if err := shm.Allocate(int(file.Fd()), 65536); err != nil {
		t.Fatal(err)
	}
	must[int](t)(file.WriteAt([]byte{7, 8}, 0))
	place := Place{Spec{"x", Uint8, []int{2}}, 0, 2}
	if _, err := c.Adopt(ctx, file, []Place{place}, ""); reason(err) != "BAD_SEGMENT" {
		t.Error(err)
	}
	if err := shm.SealWrite(int(file.Fd())); err != nil {
		t.Fatal(err)
	}
	adopted := must[*Adopted](t)(c.Adopt(ctx, file, []Place{place}, "go adopted", Replace()))
	defer c.Delete(ctx, "go adopted")
	res := must[*Result](t)(c.Call(ctx, "clip", Inputs{"x": adopted}, Param("lo", 8)))
	defer res.Release()
	if y := must[[]uint8](t)(As[uint8](res.Tensor("y"))); !reflect.DeepEqual(y, []uint8{8, 8}) {
		t.Error(y)
	}
	adopted.Release()
	adopted.Release()
	if _, err := c.Call(ctx, "clip", Inputs{"x": adopted}); !errors.Is(err, ErrReleased) {
		t.Error(err)
	}
	x := must[*Tensor](t)(c.Fetch(ctx, "go adopted"))
	defer x.Release()
	var stat unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &stat); err != nil || inode(t, must[[]byte](t)(x.Bytes())) != fmt.Sprint(stat.Ino) {
		t.Error("it is to be the same memory:", err)
	}
}

func TestPublishedResults(t *testing.T) {
	c, ctx := dial(t), context.Background()
	res := must[*Result](t)(c.Call(ctx, "scale-shift", Inputs{"x": Slice([]float64{1, 2})}, Param("a", 3), Param("b", 0),
		PublishAs("y", "go tripled"), Replace(), WithoutResults(), IdempotencyKey("once")))
	defer c.Delete(ctx, "go tripled")
	if len(res.Tensors) != 0 || len(res.Published) != 1 || res.Published[0].Name != "go tripled" || res.Timing.Total <= 0 {
		t.Errorf("%+v", res)
	}
	sealed := must[*Result](t)(c.Call(ctx, "scale-shift", Inputs{"x": Name("go tripled")}, Param("a", 2), Param("b", 0), Seal(), LeaseFor(time.Minute)))
	defer sealed.Release()
	y := sealed.Tensor("y")
	if data := must[[]float64](t)(As[float64](y)); !reflect.DeepEqual(data, []float64{6, 12}) || y.Mapping().Writers != "none" {
		t.Error(data, y.Mapping().Writers)
	}
	must[Flight](t)(c.Publish(ctx, "go six", y))
	defer c.Delete(ctx, "go six")
	if _, err := c.Call(ctx, "scale-shift", Inputs{"x": y}, Limits{ResultBytes: 1}); reason(err) != "LIMIT_RESULT_BYTES" {
		t.Error(err)
	}
}
