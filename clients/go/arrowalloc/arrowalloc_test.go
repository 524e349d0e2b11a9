package arrowalloc

import (
	"bytes"
	"context"
	"log/slog"
	"math/rand/v2"
	"reflect"
	"sync"
	"testing"

	"github.com/apache/arrow-go/v18/arrow"
	"github.com/apache/arrow-go/v18/arrow/array"
	"github.com/apache/arrow-go/v18/arrow/extensions"
	"github.com/apache/arrow-go/v18/arrow/memory"
	"golang.org/x/sys/unix"

	"strait"
	"strait/internal/hosttest"
)

func dial(t *testing.T) *strait.Client {
	t.Helper()
	address, _ := hosttest.Start(t)
	c, err := strait.Dial(context.Background(), address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func floats(mem memory.Allocator, count int) *array.Float64 {
	b := array.NewFloat64Builder(mem)
	defer b.Release()
	for i := range count {
		b.Append(float64(i))
	}
	return b.NewFloat64Array()
}

func TestBuffersKeepTheirBytesInAnyOrderOfSizes(t *testing.T) {
	const seed = 7
	random := rand.New(rand.NewPCG(seed, 0))
	a := New(nil)
	checked := memory.NewCheckedAllocator(a)
	sizes := []int{0, 1, 64, 1000, blockBytes - 1, blockBytes, blockBytes + 1, 5 * blockBytes, 300_000}
	buffers := make([][]byte, 6)
	fills := make([]byte, len(buffers))
	for step := range 2000 {
		i := random.IntN(len(buffers))
		old, size := buffers[i], sizes[random.IntN(len(sizes))]
		kept := min(len(old), size)
		switch {
		case old == nil:
			buffers[i] = checked.Allocate(size)
			kept = 0
		case random.IntN(4) == 0:
			checked.Free(old)
			buffers[i] = nil
			continue
		default:
			buffers[i] = checked.Reallocate(size, old)
		}
		fresh := buffers[i]
		if len(fresh) != size {
			t.Fatalf("seed %d, step %d: %d bytes, not %d", seed, step, len(fresh), size)
		}
		if bytes.Count(fresh[:kept], []byte{fills[i]}) != kept {
			t.Fatalf("seed %d, step %d: old bytes are lost", seed, step)
		}
		if old == nil && bytes.Count(fresh, []byte{0}) != size {
			t.Fatalf("seed %d, step %d: new memory is not zero", seed, step)
		}
		fills[i] = byte(step%255 + 1)
		for j := range fresh {
			fresh[j] = fills[i]
		}
	}
	for _, b := range buffers {
		if b != nil {
			checked.Free(b)
		}
	}
	checked.AssertSize(t, 0)
	if len(a.blocks) != 0 {
		t.Error(len(a.blocks), "blocks are left")
	}
}

func TestManyGoroutinesAllocate(t *testing.T) {
	a := New(nil)
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			for range 20 {
				values := floats(a, 20_000)
				if values.Value(19_999) != 19_999 {
					t.Error(values.Value(19_999))
				}
				values.Release()
			}
		})
	}
	group.Wait()
	if len(a.blocks) != 0 {
		t.Error(len(a.blocks), "blocks are left")
	}
}

func TestWithoutSharedMemoryTheHeapServes(t *testing.T) {
	var log bytes.Buffer
	a := New(slog.New(slog.NewTextHandler(&log, nil)))
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	none := limit
	none.Cur = 0
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &none); err != nil {
		t.Fatal(err)
	}
	values := floats(a, 20_000)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if len(a.blocks) != 0 || values.Value(19_999) != 19_999 || log.Len() == 0 {
		t.Error(len(a.blocks), log.String())
	}
	values.Release()
}

func TestAnArrayIsAnInputWithoutACopy(t *testing.T) {
	c, ctx := dial(t), context.Background()
	checked := memory.NewCheckedAllocator(New(nil))
	a := New(nil)
	values := floats(a, 100_000)
	x, err := a.Input(ctx, c, values)
	if err != nil {
		t.Fatal(err)
	}
	values.Release()
	for range 2 {
		res, err := c.Call(ctx, "scale-shift", strait.Inputs{"x": x}, strait.Param("a", 2), strait.Param("b", 1))
		if err != nil {
			t.Fatal(err)
		}
		y, err := Array(res.Tensor("y"))
		if err != nil {
			t.Fatal(err)
		}
		if got := y.(*array.Float64); got.Len() != 100_000 || got.Value(99_999) != 199_999 || res.CopiedBytes != 0 {
			t.Error(got.Len(), got.Value(99_999), res.CopiedBytes)
		}
		y.Release()
	}
	if stats := c.ClientStats(); x.Copied || stats.CopiedBytes != 0 || stats.Mappings != 0 {
		t.Error("nothing was to be copied, and all given back:", stats)
	}
	x.Release()
	x.Release()
	if stats, err := c.Stats(ctx); err != nil || stats.Own.Leases != 0 || len(a.blocks) != 0 {
		t.Error(stats.Own, len(a.blocks), err)
	}
	checked.AssertSize(t, 0)
}

func TestBigBuffersAreBornInHugePages(t *testing.T) {
	c, ctx := dial(t), context.Background()
	a := New(nil)
	if small := floats(a, 100_000); a.HugeBytes() != 0 {
		t.Error(a.HugeBytes())
	} else {
		small.Release()
	}
	// Grown by doubling, and reserved as a whole: in both every value stands, and no page is missing.
	grown := floats(a, 3_000_000)
	builder := array.NewFloat64Builder(a)
	builder.Reserve(3_000_000)
	for i := range 3_000_000 {
		builder.UnsafeAppend(float64(i))
	}
	reserved := builder.NewFloat64Array()
	builder.Release()
	huge := a.HugeBytes()
	if huge%(2<<20) != 0 {
		t.Error(huge)
	}
	for _, values := range []*array.Float64{grown, reserved} {
		for i, value := range values.Float64Values() {
			if value != float64(i) {
				t.Fatal(i, value)
			}
		}
		x, err := a.Input(ctx, c, values)
		if err != nil {
			t.Fatal(err)
		}
		if x.Copied {
			t.Error("copied")
		}
		x.Release()
		values.Release()
	}
	if huge == 0 {
		t.Skip("Linux has no huge pages at hand")
	}
}

func TestARecordBatchIsBuiltInSharedMemory(t *testing.T) {
	c, ctx := dial(t), context.Background()
	a := New(nil)
	checked := memory.NewCheckedAllocator(a)
	schema := arrow.NewSchema([]arrow.Field{
		{Name: "id", Type: arrow.PrimitiveTypes.Int32},
		{Name: "at", Type: arrow.FixedSizeListOfNonNullable(3, arrow.PrimitiveTypes.Float32)},
	}, nil)
	builder := array.NewRecordBuilder(checked, schema)
	lists := builder.Field(1).(*array.FixedSizeListBuilder)
	for i := range 30_000 {
		builder.Field(0).(*array.Int32Builder).Append(int32(i))
		lists.Append(true)
		lists.ValueBuilder().(*array.Float32Builder).AppendValues([]float32{float32(i), 1, 2}, nil)
	}
	batch := builder.NewRecordBatch()
	builder.Release()
	for i, shape := range [][]int{{30_000}, {30_000, 3}} {
		name := schema.Field(i).Name
		if err := a.Publish(ctx, c, name, batch.Column(i)); err != nil {
			t.Fatal(err)
		}
		x, err := c.Fetch(ctx, name)
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(x.Shape(), shape) || x.Name() != name {
			t.Error(x.Name(), x.Shape())
		}
		back, err := Array(x)
		if err != nil {
			t.Fatal(err)
		}
		if !array.Equal(back, batch.Column(i)) {
			t.Error(name, "is not what was published")
		}
		back.Release()
	}
	if stats := c.ClientStats(); stats.CopiedBytes != 0 {
		t.Error(stats)
	}
	// The second name for the same memory is no copy either.
	if err := a.Publish(ctx, c, "again", batch.Column(0)); err != nil {
		t.Error(err)
	}
	batch.Release()
	checked.AssertSize(t, 0)
	if len(a.blocks) != 0 {
		t.Error(len(a.blocks), "blocks are left")
	}
	if x, err := c.Fetch(ctx, "at"); err != nil {
		t.Error("published memory outlives the array:", err)
	} else {
		x.Release()
	}
}

func TestWhatIsNotAloneInSharedMemoryIsCopied(t *testing.T) {
	c, ctx := dial(t), context.Background()
	a := New(nil)
	whole := floats(a, 40_000)
	defer whole.Release()
	counted := int64(0)
	for _, column := range []struct {
		values arrow.Array
		copied bool
	}{
		{array.NewSlice(whole, 8192, 40_000), false}, // 64 KiB on
		{array.NewSlice(whole, 1, 40_000), true},
		{floats(a, 10), true},
		{floats(memory.DefaultAllocator, 20_000), true},
		{floats(a, 0), true},
	} {
		x, err := a.Input(ctx, c, column.values)
		if err != nil {
			t.Fatal(err)
		}
		if x.Copied != column.copied {
			t.Error(column.values.Len(), x.Copied)
		}
		bytes := int64(8 * column.values.Len())
		if column.copied {
			counted += bytes
		}
		// A result that came in the reply.
		if bytes <= c.Welcome().InlineBytes {
			counted += bytes
		}
		res, err := c.Call(ctx, "scale-shift", strait.Inputs{"x": x}, strait.Param("a", 1), strait.Param("b", 0))
		if err != nil {
			t.Fatal(err)
		}
		y, err := Array(res.Tensor("y"))
		if err != nil {
			t.Fatal(err)
		}
		if !array.Equal(y, column.values) {
			t.Error(column.values.Len(), "differs")
		}
		y.Release()
		x.Release()
		column.values.Release()
	}
	if stats := c.ClientStats(); stats.CopiedBytes != counted {
		t.Error(stats.CopiedBytes, counted)
	}
}

func TestEveryElementTypeIsAnArray(t *testing.T) {
	c, ctx := dial(t), context.Background()
	for dtype, want := range map[strait.DType]string{
		strait.Bool8: "extension<arrow.bool8>", strait.Float16: "float16", strait.BFloat16: "uint16", strait.Float8E5M2: "uint8",
		strait.Uint64: "uint64", strait.Complex64: "fixed_size_list<item: float32>[2]",
	} {
		made, err := c.Create(ctx, strait.Spec{Name: "x", DType: dtype, Shape: []int{2, 3}})
		if err != nil {
			t.Fatal(err)
		}
		values, err := Array(made[0])
		if err != nil {
			t.Fatal(err)
		}
		inner := values.(*array.FixedSizeList).ListValues()
		if values.Len() != 2 || inner.Len() != 6 || inner.DataType().String() != want {
			t.Error(dtype, inner.DataType(), values.Len(), inner.Len())
		}
		values.Release()
	}
	if stats := c.ClientStats(); stats.Mappings != 0 {
		t.Error(stats)
	}
	scalar, err := strait.NewTensor[bool](ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	scalar.Data()[0] = true
	values, err := Array(scalar.Tensor)
	if err != nil {
		t.Fatal(err)
	}
	if !values.(*extensions.Bool8Array).Value(0) || values.Len() != 1 {
		t.Error(values)
	}
	again, err := New(nil).Input(ctx, c, values)
	if err != nil {
		t.Fatal(err)
	}
	res, err := c.Call(ctx, "cast", strait.Inputs{"x": again}, strait.Param("to", strait.Int8))
	if err != nil {
		t.Fatal(err)
	}
	if data, err := strait.As[int8](res.Tensor("y")); err != nil || len(data) != 1 || data[0] != 1 {
		t.Error(data, err)
	}
	again.Release()
	values.Release()
}
