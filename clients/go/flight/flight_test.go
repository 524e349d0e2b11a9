package flight

import (
	"context"
	"errors"
	"net"
	"testing"

	"github.com/apache/arrow-go/v18/arrow"
	"github.com/apache/arrow-go/v18/arrow/array"
	"github.com/apache/arrow-go/v18/arrow/memory"

	"strait"
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
	if !errors.As(err, &remote) || remote.Code != "NOT_FOUND" || remote.Reason != "TENSOR_NOT_FOUND" || remote.RequestID == "" {
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
