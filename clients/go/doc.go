// Package strait is the client of a strait host on the same machine: tensors in shared memory, and
// sandboxed kernels by name, with no copy in either direction and no cgo.
//
//	c, err := strait.Dial(ctx, "")
//	x, err := strait.NewTensor[float64](ctx, c, 1000, 1000)
//	for i := range x.Data() {
//		x.Data()[i] = float64(i)
//	}
//	res, err := c.Call(ctx, "zscore", strait.Inputs{"x": x}, strait.Param("axis", 0))
//	y, err := strait.As[float64](res.Tensor("y"))
//	res.Release()
//
// The kernel reads the pages that the loop filled, and y is a view of the pages that the kernel
// wrote. Shapes are row-major and axes count from 0.
//
// # Memory
//
// Tensors are outside the Go heap. Release them, and do not use their slices afterwards: the rules
// are at [Tensor].
//
// # Errors
//
// errors.Is finds [ErrNoHost], [ErrDisconnected], [ErrLeaseExpired], [ErrReleased], [ErrReadOnly],
// [ErrArgument] and [ErrProtocol], and the context's own errors; errors.As finds a [RemoteError] with
// the host's code, reason, request id and the guest's backtrace.
//
// # Concurrency
//
// One [Client] serves any number of goroutines over one connection; calls overtake each other. A
// context that ends cancels the running kernel.
//
//	Client ─▶ conn ── frames ─▶ data.sock
//	  │         ├ reader goroutine: replies to who waits
//	  │         └ upkeep goroutine: renewal of leases, tensors that the collector found
//	  ├─▶ Tensor ─▶ segment: a mapping and the lease that holds it
//	  ├─▶ Prepared ─▶ line: a socket of its own, on which one call at a time sends and waits, perhaps with a ring beside it
//	  │      └ Stream: its calls are chunks, each with any number of answers, or none if they go to a channel
//	  └─▶ Channel ─▶ packets: a socket of its own, on which batches come
//
// Package arrowalloc builds Arrow arrays in shared memory, package flight reads and puts over
// Arrow Flight. docs/protocol.md is the protocol.
package strait
