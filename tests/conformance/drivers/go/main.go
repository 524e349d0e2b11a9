// The conformance suite's driver for the Go client: one JSON object a line in, one a line out. The
// README two folders above says what each operation does.
package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"math"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"
	"unsafe"

	"strait"
	_ "strait/remote"
)

func main() {
	d := &driver{handles: map[string]*handle{}, prepared: map[string]*strait.Prepared{}}
	in := bufio.NewReader(os.Stdin)
	for {
		line, err := in.ReadBytes('\n')
		if err == io.EOF && len(bytes.TrimSpace(line)) == 0 {
			return
		}
		if err != nil && err != io.EOF {
			log.Fatal(err)
		}
		answer, end := d.answer(line)
		text, err := json.Marshal(answer)
		if err != nil {
			log.Fatal(err)
		}
		if _, err := os.Stdout.Write(append(text, '\n')); err != nil {
			log.Fatal(err)
		}
		if end {
			return
		}
	}
}

type driver struct {
	client *strait.Client
	// Calls on several goroutines look handles up and keep outputs.
	mu      sync.Mutex
	handles map[string]*handle
	// By names of their own.
	prepared map[string]*strait.Prepared
	// Streams and readers of channels that are to stay open.
	kept []io.Closer
}

// handle is a tensor, or an array of the Go heap.
type handle struct {
	tensor   *strait.Tensor
	dtype    strait.DType
	shape    []int
	bytes    []byte
	released bool
}

type request struct {
	Op       string            `json:"op"`
	Address  string            `json:"address"`
	Renew    *bool             `json:"renew"`
	As       any               `json:"as"`
	DType    strait.DType      `json:"dtype"`
	Shape    []int             `json:"shape"`
	File     string            `json:"file"`
	How      string            `json:"how"`
	Handle   string            `json:"handle"`
	Name     string            `json:"name"`
	Replace  bool              `json:"replace"`
	LeaseMS  int64             `json:"lease_ms"`
	Calls    []request         `json:"calls"`
	Repeat   int               `json:"repeat"`
	Kernel   string            `json:"kernel"`
	Verify   bool              `json:"verify"`
	Inputs   map[string]any    `json:"inputs"`
	Deadline *int64            `json:"deadline_ms"`
	Cancel   int64             `json:"cancel_after_ms"`
	Inline   *int64            `json:"inline_bytes"`
	ID       string            `json:"request_id"`
	Params   map[string]any    `json:"parameters"`
	Files    map[string]string `json:"files"`
	Publish  map[string]string `json:"publish"`
	Prepared string            `json:"prepared"`
	// Of channels: a name, or what one is opened with.
	Channel     any            `json:"channel"`
	Rows        int            `json:"rows"`
	Cuts        []int          `json:"cuts"`
	End         string         `json:"end"`
	Limits      *strait.Limits `json:"limits"`
	Batches     *int           `json:"batches"`
	Acknowledge bool           `json:"acknowledge"`
	Keep        bool           `json:"keep"`
}

type answer map[string]any

var errDriver = errors.New("driver")

func (d *driver) answer(line []byte) (answer, bool) {
	var r request
	decoder := json.NewDecoder(bytes.NewReader(line))
	decoder.UseNumber()
	if err := decoder.Decode(&r); err != nil {
		return failure(fmt.Errorf("%w: %w", errDriver, err)), false
	}
	if r.Op == "exit" {
		return answer{"ok": true}, true
	}
	reply, err := d.operate(context.Background(), &r)
	if err != nil {
		return failure(err), false
	}
	reply["ok"] = true
	return reply, false
}

func failure(err error) answer {
	a := answer{"ok": false, "message": err.Error(), "kind": kind(err)}
	var remote *strait.RemoteError
	if errors.As(err, &remote) {
		a["code"], a["reason"], a["request_id"], a["message"] = remote.Code, remote.Reason, remote.RequestID, remote.Message
		if remote.Backtrace != "" {
			a["backtrace"] = remote.Backtrace
		}
		if len(remote.Details) > 0 {
			a["details"] = remote.Details
		}
	}
	return a
}

func kind(err error) string {
	var remote *strait.RemoteError
	switch {
	case errors.Is(err, strait.ErrLeaseExpired):
		return "lease_expired"
	case errors.As(err, &remote) && !errors.Is(err, strait.ErrDisconnected) && !errors.Is(err, strait.ErrLocalOnly):
		return "remote"
	case errors.Is(err, strait.ErrReleased):
		return "released"
	case errors.Is(err, strait.ErrDisconnected):
		return "disconnected"
	case errors.Is(err, strait.ErrNoHost):
		return "no_host"
	case errors.Is(err, strait.ErrArgument), errors.Is(err, strait.ErrLocalOnly):
		return "argument"
	}
	return "driver"
}

func (d *driver) operate(ctx context.Context, r *request) (answer, error) {
	switch r.Op {
	case "hello":
		return answer{"language": cmp.Or(os.Getenv("STRAIT_DRIVER"), "go"), "client": "strait-go/" + strait.Version, "fork": "unsupported", "channels": true}, nil
	case "fork":
		return answer{"child": "unsupported"}, nil
	case "connect":
		return d.connect(ctx, r)
	}
	if d.client == nil {
		return nil, fmt.Errorf("%w: %s before connect", errDriver, r.Op)
	}
	switch r.Op {
	case "close":
		d.kept = nil
		return answer{}, d.client.Close()
	case "make":
		return d.make(ctx, r)
	case "put":
		return d.put(ctx, r)
	case "get":
		return d.get(ctx, r)
	case "read", "write", "renew", "release", "forget":
		return d.use(ctx, r)
	case "call":
		return d.calls(ctx, r)
	case "concurrent":
		return d.concurrent(ctx, r), nil
	case "prepare":
		return d.prepare(ctx, r)
	case "call_prepared":
		return d.callPrepared(ctx, r)
	case "channel_produce":
		return d.channelProduce(ctx, r)
	case "channel_read":
		return d.channelRead(ctx, r)
	case "close_prepared":
		prepared, err := d.preparedNamed(r.Prepared)
		if err != nil {
			return nil, err
		}
		delete(d.prepared, r.Prepared)
		return answer{}, prepared.Close()
	case "delete":
		return answer{}, d.client.Delete(ctx, r.Name)
	case "list":
		return d.list(ctx)
	case "kernels":
		return d.kernels(ctx)
	case "stats":
		stats, err := d.client.Stats(ctx)
		return answer{"stats": stats.JSON}, err
	case "client_stats":
		stats := d.client.ClientStats()
		return answer{"copied_bytes": stats.CopiedBytes, "calls": stats.Calls, "mappings": stats.Mappings}, nil
	}
	return nil, fmt.Errorf("%w: no operation %q", errDriver, r.Op)
}

func (d *driver) connect(ctx context.Context, r *request) (answer, error) {
	if d.client != nil {
		if err := d.client.Close(); err != nil {
			return nil, err
		}
	}
	var options []strait.DialOption
	if r.Renew != nil && !*r.Renew {
		options = append(options, strait.WithoutRenewal())
	}
	client, err := strait.Connect(ctx, r.Address, options...)
	if err != nil {
		return nil, err
	}
	d.client = client
	// The session that they were of is closed.
	clear(d.prepared)
	d.kept = nil
	welcome := client.Welcome()
	return answer{"host_id": welcome.HostID, "move_min_bytes": welcome.MoveMinBytes, "inline_bytes": welcome.InlineBytes}, nil
}

func (d *driver) make(ctx context.Context, r *request) (answer, error) {
	file, err := os.ReadFile(r.File)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errDriver, err)
	}
	h := &handle{dtype: r.DType, shape: r.Shape, bytes: file}
	if r.How == "segment" {
		tensors, err := d.client.Create(ctx, strait.Spec{Name: "x", DType: r.DType, Shape: r.Shape})
		if err != nil {
			return nil, err
		}
		if _, err := tensors[0].ReadFrom(bytes.NewReader(file)); err != nil {
			return nil, err
		}
		h = &handle{tensor: tensors[0]}
	}
	return d.keep(r.As, h)
}

// keep stores a handle under the name that the runner chose and describes it.
func (d *driver) keep(as any, h *handle) (answer, error) {
	name, ok := as.(string)
	if !ok {
		return nil, fmt.Errorf("%w: `as` is %v", errDriver, as)
	}
	d.mu.Lock()
	before := d.handles[name]
	d.handles[name] = h
	d.mu.Unlock()
	// A repeated call keeps the last run's output only.
	if before != nil {
		before.tensor.Release()
	}
	return h.describe()
}

func (d *driver) handle(name string) (*handle, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	h, known := d.handles[name]
	switch {
	case !known:
		return nil, fmt.Errorf("%w: no handle %q", errDriver, name)
	case h.released && h.tensor == nil:
		return nil, fmt.Errorf("%w: an array of the Go heap", strait.ErrReleased)
	}
	return h, nil
}

func (h *handle) input() strait.Input {
	if h.tensor != nil {
		return h.tensor
	}
	return strait.Raw(h.dtype, h.bytes, h.shape...)
}

func (h *handle) describe() (answer, error) {
	if h.tensor != nil {
		return describe(h.tensor)
	}
	device, inode, err := place(h.bytes)
	return array(h.dtype, h.shape, len(h.bytes), device, inode), err
}

func describe(t *strait.Tensor) (answer, error) {
	var device, inode uint64
	err := t.View(func(bytes []byte) (err error) {
		device, inode, err = place(bytes)
		return err
	})
	return array(t.DType(), t.Shape(), t.ByteLen(), device, inode), err
}

func array(dtype strait.DType, shape []int, length int, device, inode uint64) answer {
	return answer{"dtype": dtype, "shape": append([]int{}, shape...), "bytes": length, "device": device, "inode": inode}
}

// place is what /proc/self/maps says about the first byte's address.
func place(bytes []byte) (device, inode uint64, err error) {
	if len(bytes) == 0 {
		return 0, 0, nil
	}
	at := uint64(uintptr(unsafe.Pointer(unsafe.SliceData(bytes))))
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(maps)) {
		var from, to, offset, major, minor uint64
		var protection string
		if _, err := fmt.Sscanf(line, "%x-%x %s %x %x:%x %d", &from, &to, &protection, &offset, &major, &minor, &inode); err != nil {
			return 0, 0, fmt.Errorf("%w: maps line %q: %w", errDriver, line, err)
		}
		if from <= at && at < to && inode != 0 {
			return major<<8 | minor, inode, nil
		}
	}
	return 0, 0, nil
}

func (d *driver) put(ctx context.Context, r *request) (answer, error) {
	h, err := d.handle(r.Handle)
	if err != nil {
		return nil, err
	}
	var options []strait.PublishOption
	if r.Replace {
		options = append(options, strait.Replace())
	}
	before := d.client.ClientStats().CopiedBytes
	_, err = d.client.Publish(ctx, r.Name, h.input(), options...)
	return answer{"copied_bytes": d.client.ClientStats().CopiedBytes - before}, err
}

func (d *driver) get(ctx context.Context, r *request) (answer, error) {
	var options []strait.FetchOption
	if r.LeaseMS != 0 {
		options = append(options, strait.LeaseFor(time.Duration(r.LeaseMS)*time.Millisecond))
	}
	t, err := d.client.Fetch(ctx, r.Name, options...)
	if err != nil {
		return nil, err
	}
	return d.keep(r.As, &handle{tensor: t})
}

// use is for the operations on one handle.
func (d *driver) use(ctx context.Context, r *request) (answer, error) {
	h, err := d.handle(r.Handle)
	if err != nil {
		return nil, err
	}
	switch r.Op {
	case "release":
		h.released = true
		h.tensor.Release()
		return answer{}, nil
	case "forget":
		d.forget(r.Handle)
		return answer{}, nil
	case "read":
		if err := h.write(r.File); err != nil {
			return nil, err
		}
		return h.describe()
	}
	if h.tensor == nil {
		return nil, fmt.Errorf("%w: %s of an array of the Go heap", errDriver, r.Op)
	}
	if r.Op == "renew" {
		life, err := h.tensor.Renew(ctx, time.Duration(r.LeaseMS)*time.Millisecond)
		return answer{"expires_ms": life.Milliseconds()}, err
	}
	file, err := os.Open(r.File)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errDriver, err)
	}
	defer file.Close()
	if _, err := h.tensor.ReadFrom(file); err != nil {
		return nil, err
	}
	return h.describe()
}

// forget drops a handle and collects garbage until its mapping is gone.
func (d *driver) forget(name string) {
	before := d.client.ClientStats().Mappings
	d.mu.Lock()
	mapped := d.handles[name].tensor != nil
	delete(d.handles, name)
	d.mu.Unlock()
	for range 100 {
		runtime.GC()
		if !mapped || d.client.ClientStats().Mappings < before {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func (h *handle) write(path string) error {
	if h.tensor == nil {
		return os.WriteFile(path, h.bytes, 0o600)
	}
	return writeTensor(h.tensor, path)
}

func writeTensor(t *strait.Tensor, path string) error {
	file, err := os.Create(path)
	if err != nil {
		return fmt.Errorf("%w: %w", errDriver, err)
	}
	_, err = t.WriteTo(file)
	return errors.Join(err, file.Close())
}

func (d *driver) list(ctx context.Context) (answer, error) {
	flights, err := d.client.List(ctx)
	all := []answer{}
	for _, flight := range flights {
		tensors := []answer{}
		for _, t := range flight.Mapping.Tensors {
			tensors = append(tensors, answer{"name": t.Name, "dtype": t.DType, "shape": t.Shape})
		}
		all = append(all, answer{"name": flight.Name, "tensors": tensors})
	}
	return answer{"flights": all}, err
}

func (d *driver) kernels(ctx context.Context) (answer, error) {
	kernels, err := d.client.Kernels(ctx)
	all := []answer{}
	for _, k := range kernels {
		inputs, outputs, parameters := []string{}, []string{}, []string{}
		for _, port := range k.Inputs {
			inputs = append(inputs, port.Name)
		}
		for _, port := range k.Outputs {
			outputs = append(outputs, port.Name)
		}
		for _, parameter := range k.Parameters {
			parameters = append(parameters, parameter.Name)
		}
		all = append(all, answer{"name": k.Name, "plugin": k.Plugin, "doc": k.Doc, "inputs": inputs, "outputs": outputs, "parameters": parameters})
	}
	return answer{"kernels": all}, err
}

// parameter is a value as Go has it: an integer that fits neither int64 nor uint64 is the client's to refuse.
func parameter(value any) any {
	switch value := value.(type) {
	case json.Number:
		if strings.ContainsAny(value.String(), ".eE") {
			f, _ := value.Float64()
			return f
		}
		if i, err := value.Int64(); err == nil {
			return i
		}
		if u, err := strconv.ParseUint(value.String(), 10, 64); err == nil {
			return u
		}
	case string:
		switch value {
		case "nan":
			return math.NaN()
		case "inf":
			return math.Inf(1)
		case "-inf":
			return math.Inf(-1)
		}
	case []any:
		numbers := make([]any, len(value))
		for i, element := range value {
			numbers[i] = parameter(element)
		}
		return numbers
	}
	return value
}

func (d *driver) inputs(said map[string]any) (strait.Inputs, error) {
	inputs := strait.Inputs{}
	for port, value := range said {
		if name, ok := value.(string); ok {
			inputs[port] = strait.Name(name)
			continue
		}
		object, _ := value.(map[string]any)
		if dtype, brought := object["dtype"].(string); brought {
			shape, err := sizes(object["shape"])
			if err != nil {
				return nil, err
			}
			inputs[port] = strait.EachOf(strait.DType(dtype), shape...)
			continue
		}
		name, _ := object["handle"].(string)
		h, err := d.handle(name)
		if err != nil {
			return nil, err
		}
		inputs[port] = h.input()
	}
	return inputs, nil
}

func (r *request) options() []strait.CallOption {
	var options []strait.CallOption
	for name, value := range r.Params {
		options = append(options, strait.Param(name, parameter(value)))
	}
	for port, name := range r.Publish {
		options = append(options, strait.PublishAs(port, name))
	}
	if r.Replace {
		options = append(options, strait.Replace())
	}
	if r.Verify {
		options = append(options, strait.Verify())
	}
	if r.Deadline != nil {
		options = append(options, strait.Deadline(time.Duration(*r.Deadline)*time.Millisecond))
	}
	if r.LeaseMS != 0 {
		options = append(options, strait.LeaseFor(time.Duration(r.LeaseMS)*time.Millisecond))
	}
	if r.Inline != nil {
		options = append(options, strait.InlineBytes(*r.Inline))
	}
	return options
}

// calls runs a call as often as asked; the last run's outputs are kept.
func (d *driver) calls(ctx context.Context, r *request) (answer, error) {
	inputs, err := d.inputs(r.Inputs)
	if err != nil {
		return nil, err
	}
	if r.ID != "" {
		ctx = strait.WithRequestID(ctx, r.ID)
	}
	before := d.client.ClientStats().CopiedBytes
	var result *strait.Result
	seconds := []float64{}
	for range max(r.Repeat, 1) {
		result.Release()
		start := time.Now()
		if result, err = d.call(ctx, r, inputs); err != nil {
			return nil, err
		}
		seconds = append(seconds, time.Since(start).Seconds())
	}
	outputs, err := d.outputs(r, result)
	if err != nil {
		return nil, err
	}
	pages := []answer{}
	for _, page := range result.Pages {
		pages = append(pages, answer{"port": page.Port, "device": page.Device, "inode": page.Inode})
	}
	return answer{
		"outputs": outputs, "notes": notes(result.Notes), "pages": pages, "seconds": seconds, "copied_bytes": result.CopiedBytes,
		"client_copied_bytes": d.client.ClientStats().CopiedBytes - before,
	}, nil
}

func (d *driver) call(ctx context.Context, r *request, inputs strait.Inputs) (*strait.Result, error) {
	ctx, stop := r.cancellable(ctx)
	defer stop()
	return d.client.Call(ctx, r.Kernel, inputs, r.options()...)
}

// cancellable is cancelled when the request says so, and by what it returns.
func (r *request) cancellable(ctx context.Context) (context.Context, func()) {
	if r.Cancel == 0 {
		return ctx, func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	timer := time.AfterFunc(time.Duration(r.Cancel)*time.Millisecond, cancel)
	return ctx, func() {
		timer.Stop()
		cancel()
	}
}

func sizes(said any) ([]int, error) {
	list, ok := said.([]any)
	shape := make([]int, len(list))
	for i, size := range list {
		number, _ := size.(json.Number)
		n, err := strconv.Atoi(number.String())
		shape[i], ok = n, ok && err == nil
	}
	if !ok {
		return nil, fmt.Errorf("%w: `shape` is %v", errDriver, said)
	}
	return shape, nil
}

func (d *driver) prepare(ctx context.Context, r *request) (answer, error) {
	name, ok := r.As.(string)
	if !ok {
		return nil, fmt.Errorf("%w: `as` is %v", errDriver, r.As)
	}
	inputs, err := d.inputs(r.Inputs)
	if err != nil {
		return nil, err
	}
	if r.ID != "" {
		ctx = strait.WithRequestID(ctx, r.ID)
	}
	prepared, err := d.client.Prepare(ctx, r.Kernel, inputs, r.prepareOptions()...)
	if err != nil {
		return nil, err
	}
	if before := d.prepared[name]; before != nil {
		if err := before.Close(); err != nil {
			return nil, err
		}
	}
	d.prepared[name] = prepared
	return answer{"inputs": places(prepared.Inputs()), "outputs": places(prepared.Outputs())}, nil
}

func (r *request) prepareOptions() []strait.PrepareOption {
	var options []strait.PrepareOption
	for name, value := range r.Params {
		options = append(options, strait.Param(name, parameter(value)))
	}
	if r.Deadline != nil {
		options = append(options, strait.Deadline(time.Duration(*r.Deadline)*time.Millisecond))
	}
	if r.Limits != nil {
		options = append(options, *r.Limits)
	}
	return options
}

func places(specs []strait.Spec) []answer {
	all := []answer{}
	for _, spec := range specs {
		all = append(all, answer{"port": spec.Name, "dtype": spec.DType, "shape": append([]int{}, spec.Shape...)})
	}
	return all
}

func (d *driver) preparedNamed(name string) (*strait.Prepared, error) {
	prepared, known := d.prepared[name]
	if !known {
		return nil, fmt.Errorf("%w: nothing prepared is named %q", errDriver, name)
	}
	return prepared, nil
}

// callPrepared runs what is prepared as often as asked.
func (d *driver) callPrepared(ctx context.Context, r *request) (answer, error) {
	prepared, err := d.preparedNamed(r.Prepared)
	if err != nil {
		return nil, err
	}
	inputs, err := d.inputs(r.Inputs)
	if err != nil {
		return nil, err
	}
	before := d.client.ClientStats().CopiedBytes
	var result *strait.Result
	seconds := []float64{}
	for range max(r.Repeat, 1) {
		cancellable, stop := r.cancellable(ctx)
		start := time.Now()
		result, err = prepared.Call(cancellable, inputs)
		stop()
		if err != nil {
			return nil, err
		}
		seconds = append(seconds, time.Since(start).Seconds())
	}
	outputs, err := d.outputs(r, result)
	if err != nil {
		return nil, err
	}
	return answer{
		"outputs": outputs, "notes": notes(result.Notes), "seconds": seconds,
		"client_copied_bytes": d.client.ClientStats().CopiedBytes - before,
	}, nil
}

func notes(said []strait.Note) []answer {
	all := []answer{}
	for _, note := range said {
		all = append(all, answer{"key": note.Key, "text": note.Text})
	}
	return all
}

// outputs describes, writes, keeps or releases what a call gave back.
func (d *driver) outputs(r *request, result *strait.Result) (answer, error) {
	kept, _ := r.As.(map[string]any)
	outputs := answer{}
	for _, t := range result.Tensors {
		if path, wanted := r.Files[t.Name()]; wanted {
			if err := writeTensor(t, path); err != nil {
				return nil, err
			}
		}
		described, err := describe(t)
		if err != nil {
			return nil, err
		}
		outputs[t.Name()] = described
		if name, wanted := kept[t.Name()]; wanted {
			if _, err := d.keep(name, &handle{tensor: t}); err != nil {
				return nil, err
			}
		} else {
			t.Release()
		}
	}
	return outputs, nil
}

func (d *driver) concurrent(ctx context.Context, r *request) answer {
	answers := make([]answer, len(r.Calls))
	var group sync.WaitGroup
	for i := range r.Calls {
		group.Go(func() {
			for range max(r.Repeat, 1) {
				reply, err := d.calls(ctx, &r.Calls[i])
				if err != nil {
					answers[i] = failure(err)
					return
				}
				reply["ok"] = true
				answers[i] = reply
			}
		})
	}
	group.Wait()
	return answer{"answers": answers}
}
