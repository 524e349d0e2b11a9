package flight

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"

	"github.com/apache/arrow-go/v18/arrow"
	"github.com/apache/arrow-go/v18/arrow/array"
	"github.com/apache/arrow-go/v18/arrow/memory"

	"strait"
	"strait/arrowalloc"
	"strait/internal/hosttest"
)

// tcpAddress is a free address for a host's Flight over TCP.
func tcpAddress(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().String()
}

func dial(t *testing.T, address string) *Client {
	t.Helper()
	c, err := Dial(address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func dialLocal(t *testing.T, address string) *strait.Client {
	t.Helper()
	c, err := strait.Dial(context.Background(), address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

var schema = arrow.NewSchema([]arrow.Field{
	{Name: "id", Type: arrow.PrimitiveTypes.Int64},
	{Name: "at", Type: arrow.FixedSizeListOfNonNullable(2, arrow.PrimitiveTypes.Float64)},
}, nil)

// table is one batch of rows rows.
func table(t *testing.T, rows int) array.RecordReader {
	t.Helper()
	builder := array.NewRecordBuilder(memory.DefaultAllocator, schema)
	defer builder.Release()
	lists := builder.Field(1).(*array.FixedSizeListBuilder)
	for i := range rows {
		builder.Field(0).(*array.Int64Builder).Append(int64(i))
		lists.Append(true)
		lists.ValueBuilder().(*array.Float64Builder).AppendValues([]float64{float64(i), 0.5}, nil)
	}
	batch := builder.NewRecordBatch()
	defer batch.Release()
	reader, err := array.NewRecordReader(schema, []arrow.RecordBatch{batch})
	if err != nil {
		t.Fatal(err)
	}
	return reader
}

func TestPutAndGet(t *testing.T) {
	tcp := tcpAddress(t)
	t.Setenv("STRAIT__SERVER__TCP", tcp)
	address, _ := hosttest.Start(t)
	for transport, address := range map[string]string{"unix": address, "tcp": "grpc+tcp://" + tcp} {
		t.Run(transport, func(t *testing.T) {
			c, ctx := dial(t, address), context.Background()
			const rows = 200_000
			name := "table over " + transport
			mapping, err := c.Put(ctx, name, table(t, rows), false)
			if err != nil {
				t.Fatal(err)
			}
			if transport == "tcp" {
				if len(mapping.Tensors) != 0 {
					t.Error("somebody far away has no use for a mapping", mapping)
				}
			} else if len(mapping.Tensors) != 2 || mapping.Tensors[1].Shape[0] != rows || mapping.Tensors[1].Shape[1] != 2 {
				t.Error(mapping)
			}
			_, err = c.Put(ctx, name, table(t, 1), false)
			if reason(err) != "NAME_TAKEN" {
				t.Error(err)
			}
			reader, err := c.Get(ctx, name)
			if err != nil {
				t.Fatal(err)
			}
			var seen int64
			for reader.Next() {
				batch := reader.RecordBatch()
				ids := batch.Column(0).(*array.Int64)
				at := batch.Column(1).(*array.FixedSizeList).ListValues().(*array.Float64)
				for i := range ids.Len() {
					if ids.Value(i) != seen || at.Value(2*i) != float64(seen) || at.Value(2*i+1) != 0.5 {
						t.Fatal("row", seen, "is", ids.Value(i), at.Value(2*i))
					}
					seen++
				}
			}
			if err := reader.Err(); err != nil || seen != rows {
				t.Error(seen, err)
			}
			reader.Release()
			if _, err := c.Put(ctx, name, table(t, 0), true); err != nil {
				t.Error("an empty table:", err)
			}
			// Given up before its end.
			if _, err := c.Put(ctx, name, table(t, rows), true); err != nil {
				t.Fatal(err)
			}
			if reader, err = c.Get(ctx, name); err != nil || !reader.Next() {
				t.Fatal(err)
			}
			reader.Release()
			found := 0
			infos, err := c.List(ctx)
			for _, info := range infos {
				if info.FlightDescriptor.Path[0] == name {
					found++
				}
			}
			if err != nil || found != 1 {
				t.Error(found, err)
			}
		})
	}
}

func reason(err error) string {
	var remote *strait.RemoteError
	if !errors.As(err, &remote) {
		return ""
	}
	return remote.Reason
}

func TestRefusals(t *testing.T) {
	address, _ := hosttest.Start(t)
	c, ctx := dial(t, address), context.Background()
	_, err := c.Get(ctx, "none")
	var remote *strait.RemoteError
	if !errors.As(err, &remote) || remote.Code != "NOT_FOUND" || remote.Reason != "FLIGHT_NOT_FOUND" || remote.RequestID == "" {
		t.Errorf("%#v", err)
	}
	texts := array.NewStringBuilder(memory.DefaultAllocator)
	texts.Append("x")
	wrong := arrow.NewSchema([]arrow.Field{{Name: "s", Type: arrow.BinaryTypes.String}}, nil)
	batch := array.NewRecordBatch(wrong, []arrow.Array{texts.NewArray()}, 1)
	records, err := array.NewRecordReader(wrong, []arrow.RecordBatch{batch})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Put(ctx, "texts", records, false); reason(err) != "BAD_TENSOR" {
		t.Error(err)
	}
	for _, wrong := range []string{"", "unix:relative", "http://x", "grpc+tcp://"} {
		if _, err := Dial(wrong); !errors.Is(err, strait.ErrArgument) {
			t.Error(wrong, err)
		}
	}
}

func TestFetchMapsWhatFlightFound(t *testing.T) {
	address, _ := hosttest.Start(t)
	other, _ := hosttest.Start(t)
	c, local, ctx := dial(t, address), dialLocal(t, address), context.Background()
	if _, err := local.Publish(ctx, "x", strait.Slice([]float32{1, 2, 3})); err != nil {
		t.Fatal(err)
	}
	x, err := c.Fetch(ctx, local, "x")
	if err != nil {
		t.Fatal(err)
	}
	defer x.Release()
	if data, err := strait.As[float32](x); err != nil || data[2] != 3 {
		t.Error(data, err)
	}
	if _, err := c.Fetch(ctx, dialLocal(t, other), "x"); !errors.Is(err, ErrFar) {
		t.Error(err)
	}
	// A tensor that a client made and one that was put are the same to a kernel.
	if _, err := c.Put(ctx, "table", table(t, 10), false); err != nil {
		t.Fatal(err)
	}
	res, err := local.Call(ctx, "scale-shift", strait.Inputs{"x": strait.Name("table#at")}, strait.Param("a", 2), strait.Param("b", 0))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Release()
	if data, err := strait.As[float64](res.Tensor("y")); err != nil || len(data) != 20 || data[18] != 18 || data[19] != 1 {
		t.Error(data, err)
	}
}

func TestAColumnKeepsItsShapeAndType(t *testing.T) {
	address, _ := hosttest.Start(t)
	c, local, ctx := dial(t, address), dialLocal(t, address), context.Background()
	a := arrowalloc.New(nil)
	for name, tensor := range map[string]strait.Copied{
		"bfloat16[2 2 3]":  strait.Raw(strait.BFloat16, []byte("aAbBcCdDeEfFgGhHiIjJkKlL"), 2, 2, 3),
		"float8_e5m2[3]":   strait.Raw(strait.Float8E5M2, []byte("abc"), 3),
		"complex64[2 2]":   strait.Slice([]complex64{1 + 2i, 3, 4i, 5}, 2, 2),
		"complex128[2]":    strait.Slice([]complex128{1 + 2i, 3}),
		"bool8[1 3]":       strait.Raw(strait.Bool8, []byte{0, 1, 2}, 1, 3),
		"float64[]":        strait.Scalar(2.5),
		"int16[2 1 2]":     strait.Slice([]int16{1, 2, 3, 4}, 2, 1, 2),
		"float16[4]":       strait.Raw(strait.Float16, []byte("abcdefgh"), 4),
		"float8_e4m3fn[1]": strait.Raw(strait.Float8E4M3FN, []byte("x"), 1),
	} {
		if _, err := local.Publish(ctx, name, tensor); err != nil {
			t.Fatal(name, err)
		}
		reader, err := c.Get(ctx, name)
		if err != nil {
			t.Fatal(name, err)
		}
		if !reader.Next() {
			t.Fatal(name, reader.Err())
		}
		back := name + " back"
		if err := a.PublishColumn(ctx, local, back, reader.RecordBatch(), 0); err != nil {
			t.Error(name, err)
			continue
		}
		reader.Release()
		got, want := fetched(t, local, back), fetched(t, local, name)
		if got != want {
			t.Errorf("%s came back as %s", want, got)
		}
	}
}

// fetched is a flight's type, shape and bytes.
func fetched(t *testing.T, c *strait.Client, name string) string {
	t.Helper()
	x, err := c.Fetch(context.Background(), name)
	if err != nil {
		t.Fatal(err)
	}
	defer x.Release()
	bytes, err := x.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%s%v %x", x.DType(), x.Shape(), bytes)
}

// TestPutKeepsOrRefuses: what comes back is what was put, or it was refused by name.
func TestPutKeepsOrRefuses(t *testing.T) {
	address, _ := hosttest.Start(t)
	c, ctx := dial(t, address), context.Background()
	i64 := arrow.PrimitiveTypes.Int64
	from := func(kind arrow.DataType, text string) arrow.Array {
		values, _, err := array.FromJSON(memory.DefaultAllocator, kind, strings.NewReader(text))
		if err != nil {
			t.Fatal(kind, err)
		}
		return values
	}
	encoded := &arrow.DictionaryType{IndexType: arrow.PrimitiveTypes.Int8, ValueType: i64}
	pairs := from(arrow.FixedSizeListOf(2, i64), `[[null,1],[2,3],[4,5],[6,null]]`)
	for name, example := range map[string]struct {
		values arrow.Array
		kept   bool
	}{
		"whole":              {from(i64, `[1,2,3]`), true},
		"a slice":            {array.NewSlice(from(i64, `[1,2,3,4]`), 1, 3), true},
		"between nulls":      {array.NewSlice(from(i64, `[null,2,3,null]`), 1, 3), true},
		"rows between nulls": {array.NewSlice(pairs, 1, 3), true},
		"no rows":            {array.NewSlice(pairs, 1, 1), true},
		"float16":            {from(arrow.FixedWidthTypes.Float16, `[1,2]`), true},
		"nulls":              {from(i64, `[1,null]`), false},
		"a null row":         {from(arrow.FixedSizeListOf(2, i64), `[[1,2],null]`), false},
		"a null in a row":    {array.NewSlice(pairs, 2, 4), false},
		"a dictionary":       {array.NewDictionaryArray(encoded, from(encoded.IndexType, `[0,1,0]`), from(i64, `[1,null]`)), false},
		"runs":               {array.NewRunEndEncodedArray(from(arrow.PrimitiveTypes.Int32, `[2,3]`), from(i64, `[1,null]`), 3, 0), false},
		"bits":               {from(arrow.FixedWidthTypes.Boolean, `[true,false]`), false},
		"times":              {from(arrow.FixedWidthTypes.Timestamp_ns, `[1]`), false},
		"decimals":           {from(&arrow.Decimal128Type{Precision: 5, Scale: 2}, `["1.25"]`), false},
		"texts":              {from(arrow.BinaryTypes.String, `["x"]`), false},
		"lists":              {from(arrow.ListOf(i64), `[[1],[2]]`), false},
	} {
		schema := arrow.NewSchema([]arrow.Field{{Name: "v", Type: example.values.DataType(), Nullable: true}}, nil)
		batch := array.NewRecordBatch(schema, []arrow.Array{example.values}, int64(example.values.Len()))
		records, err := array.NewRecordReader(schema, []arrow.RecordBatch{batch})
		if err != nil {
			t.Fatal(name, err)
		}
		_, err = c.Put(ctx, name, records, false)
		if !example.kept {
			if reason(err) != "BAD_TENSOR" {
				t.Error(name, err)
			}
			continue
		}
		if err != nil {
			t.Error(name, err)
			continue
		}
		reader, err := c.Get(ctx, name)
		if err != nil {
			t.Fatal(name, err)
		}
		if example.values.Len() == 0 {
			if reader.Next() || reader.Err() != nil || !arrow.TypeEqual(reader.Schema().Field(0).Type, example.values.DataType()) {
				t.Error(name, reader.Schema(), reader.Err())
			}
		} else if !reader.Next() || !array.Equal(reader.RecordBatch().Column(0), example.values) {
			t.Error(name, "is not what was put:", reader.Err())
		}
		reader.Release()
	}
}

func TestASchemaComesBackWhole(t *testing.T) {
	address, _ := hosttest.Start(t)
	c, ctx := dial(t, address), context.Background()
	about := arrow.NewMetadata([]string{"run", "\u00fcber"}, []string{"7", "a\nb"})
	schema := arrow.NewSchema([]arrow.Field{
		{Name: "id", Type: arrow.PrimitiveTypes.Int64, Nullable: true, Metadata: arrow.NewMetadata([]string{"unit"}, []string{"m/s"})},
		{Name: "at", Type: arrow.FixedSizeListOf(2, arrow.PrimitiveTypes.Float32)},
	}, &about)
	batch, _, err := array.RecordFromJSON(memory.DefaultAllocator, schema, strings.NewReader(`[{"id":1,"at":[0.5,1]},{"id":2,"at":[2,3]}]`))
	if err != nil {
		t.Fatal(err)
	}
	records, err := array.NewRecordReader(schema, []arrow.RecordBatch{batch})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Put(ctx, "whole", records, false); err != nil {
		t.Fatal(err)
	}
	reader, err := c.Get(ctx, "whole")
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Release()
	got := reader.Schema()
	if !got.Equal(schema) || !got.Metadata().Equal(about) || !got.Field(0).Metadata.Equal(schema.Field(0).Metadata) {
		t.Errorf("%s\nis not\n%s", got, schema)
	}
	if !reader.Next() || !array.RecordEqual(reader.RecordBatch(), batch) {
		t.Error(reader.Err())
	}
}
