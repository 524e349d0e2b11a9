package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"strait"
)

func milliseconds(ms int64) time.Duration { return time.Duration(ms) * time.Millisecond }

// channelOf reads the field `channel`.
func channelOf(said any) (name string, options strait.ChannelOptions, err error) {
	if name, ok := said.(string); ok {
		return name, strait.ChannelOptions{Name: name}, nil
	}
	object, _ := said.(map[string]any)
	name, ok := object["name"].(string)
	options.Name = name
	for key, into := range map[string]func(int64){
		"batches":   func(n int64) { options.Batches = int(n) },
		"wait_ms":   func(n int64) { options.Wait = milliseconds(n) },
		"resume_ms": func(n int64) { options.Resume = milliseconds(n) },
	} {
		if value, there := object[key]; there {
			n, isInteger := parameter(value).(int64)
			ok = ok && isInteger
			into(n)
		}
	}
	if !ok {
		return "", options, fmt.Errorf("%w: `channel` is %v", errDriver, said)
	}
	return name, options, nil
}

// keepOpen closes what was made, or keeps it until the session ends.
func (d *driver) keepOpen(made io.Closer, keep bool) error {
	if !keep {
		return made.Close()
	}
	d.kept = append(d.kept, made)
	return nil
}

// channelProduce feeds a stream whose rows go to a channel.
func (d *driver) channelProduce(ctx context.Context, r *request) (answer, error) {
	_, channel, err := channelOf(r.Channel)
	if err != nil {
		return nil, err
	}
	arrays, inputs := map[string]rows{}, strait.Inputs{}
	for port, said := range r.Inputs {
		object, _ := said.(map[string]any)
		name, _ := object["handle"].(string)
		h, err := d.handle(name)
		if err != nil {
			return nil, err
		}
		x, err := h.rows()
		if err != nil {
			return nil, err
		}
		arrays[port] = x
		inputs[port] = strait.EachOf(x.dtype, append([]int{r.Rows}, x.row...)...)
	}
	options := append(r.prepareOptions(), channel)
	if r.ID != "" {
		ctx = strait.WithRequestID(ctx, r.ID)
	}
	stream, err := d.client.PrepareStream(ctx, r.Kernel, inputs, options...)
	if err != nil {
		return nil, err
	}
	if err := r.feed(ctx, stream, arrays); err != nil {
		return nil, errors.Join(err, stream.Close())
	}
	return answer{"chunks": len(r.Cuts)}, d.keepOpen(stream, r.End == "keep")
}

// feed sends the chunks that the request has.
func (r *request) feed(ctx context.Context, stream *strait.Stream, arrays map[string]rows) error {
	last := r.End == "" || r.End == "last"
	if len(r.Cuts) == 0 && last {
		r.Cuts = []int{0}
	}
	from := 0
	for i, cut := range r.Cuts {
		chunk := strait.Inputs{}
		for port, x := range arrays {
			chunk[port] = x.cut(from, from+cut)
		}
		from += cut
		send := stream.Chunk
		if last && i == len(r.Cuts)-1 {
			send = stream.Last
		}
		if _, err := send(ctx, chunk); err != nil {
			return err
		}
	}
	return nil
}

// rows are an array's, of so many bytes each.
type rows struct {
	dtype strait.DType
	row   []int
	bytes []byte
	each  int
}

func (h *handle) rows() (rows, error) {
	x, shape := rows{dtype: h.dtype, bytes: h.bytes}, h.shape
	if h.tensor != nil {
		var err error
		if x.bytes, err = h.tensor.Bytes(); err != nil {
			return x, err
		}
		x.dtype, shape = h.tensor.DType(), h.tensor.Shape()
	}
	if len(shape) == 0 {
		return x, fmt.Errorf("%w: an array without axes has no rows", errDriver)
	}
	x.row = shape[1:]
	if shape[0] > 0 {
		x.each = len(x.bytes) / shape[0]
	}
	return x, nil
}

func (x rows) cut(from, to int) strait.Copied {
	return strait.Raw(x.dtype, x.bytes[from*x.each:to*x.each], append([]int{to - from}, x.row...)...)
}

// channelRead reads as many batches of a channel as the request has, or all.
func (d *driver) channelRead(ctx context.Context, r *request) (answer, error) {
	name, _, err := channelOf(r.Channel)
	if err != nil {
		return nil, err
	}
	if r.ID != "" {
		ctx = strait.WithRequestID(ctx, r.ID)
	}
	reader, err := d.client.ReadChannel(ctx, name)
	if err != nil {
		return nil, err
	}
	read, err := r.read(ctx, reader)
	if err != nil {
		return nil, errors.Join(err, reader.Close())
	}
	return read, d.keepOpen(reader, r.Keep)
}

func (r *request) read(ctx context.Context, reader *strait.Channel) (answer, error) {
	numbers, came, ended := []uint64{}, map[string][]int{}, false
	for _, output := range reader.Outputs() {
		came[output.Name] = []int{}
	}
	for r.Batches == nil || len(numbers) < *r.Batches {
		batch, err := reader.Next(ctx)
		if err == io.EOF {
			ended = true
			break
		}
		if err != nil {
			return nil, err
		}
		numbers = append(numbers, batch.Number)
		for _, t := range batch.Tensors {
			came[t.Name()] = append(came[t.Name()], t.Shape()[0])
			if path, wanted := r.Files[t.Name()]; wanted {
				if err := appendTensor(t, path); err != nil {
					return nil, err
				}
			}
		}
	}
	if r.Acknowledge {
		if err := reader.Acknowledge(ctx); err != nil {
			return nil, err
		}
	}
	return answer{
		"kernel": reader.Kernel(), "outputs": places(reader.Outputs()), "numbers": numbers, "rows": came,
		"ended": ended, "notes": notes(reader.Notes()),
	}, nil
}

func appendTensor(t *strait.Tensor, path string) error {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("%w: %w", errDriver, err)
	}
	_, err = t.WriteTo(file)
	return errors.Join(err, file.Close())
}
