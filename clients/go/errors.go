package strait

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
)

// What errors.Is tells apart.
var (
	// ErrNoHost: there is nobody to connect to.
	ErrNoHost = errors.New("no strait host")
	// ErrDisconnected: the connection is over, because the host ended it or Close was called. A Prepared or Stream has
	// its own, which can end alone.
	// Slices of mapped tensors stay readable; everything else needs a new Dial.
	ErrDisconnected = errors.New("the connection to the strait host is over")
	// ErrLeaseExpired: the right to a segment is over while the connection is fine. Its pages stay
	// readable until Release; for anything else fetch the flight again.
	ErrLeaseExpired = errors.New("the lease is over")
	// ErrReleased: the tensor has been released.
	ErrReleased = errors.New("the tensor was released")
	// ErrArgument: this client itself refused an argument; nothing was sent.
	ErrArgument = errors.New("bad argument")
	// ErrReadOnly: nobody may write to the tensor, such as a result or a published one.
	ErrReadOnly = errors.New("the tensor is read-only")
	// ErrLocalOnly: only a client on the host's own machine can do that, since memory is shared; the message says what to do
	// instead.
	ErrLocalOnly = errors.New("only a client on the host's machine can do that")
	// ErrProtocol: the host said something that the protocol does not allow. Client and host are
	// probably of different versions.
	ErrProtocol = errors.New("the host broke the protocol")
)

// RemoteError is the host's refusal of a request, or the failure of a kernel.
//
// errors.Is knows some of them by other names as well: ErrLeaseExpired, context.DeadlineExceeded
// (the kernel ran into its deadline), context.Canceled, fs.ErrNotExist, fs.ErrExist, fs.ErrPermission (no right, or a token that the
// host does not take); and from a host that is not on this machine ErrDisconnected and ErrLocalOnly.
type RemoteError struct {
	// Code is the name of a gRPC code: NOT_FOUND.
	Code string `json:"code"`
	// Reason is stable: FLIGHT_NOT_FOUND.
	Reason string `json:"reason"`
	// Message is for people: what, which, by how much, what to do.
	Message string `json:"message"`
	// RequestID names the request in the host's log.
	RequestID string `json:"request_id"`
	// Backtrace is the guest's, after a trap; else empty.
	Backtrace string `json:"backtrace"`
	// Details depend on the reason.
	Details map[string]any `json:"details"`
}

// Error has the message, the code, the reason and the request id.
func (e *RemoteError) Error() string {
	return fmt.Sprintf("strait: %s [%s %s, request %s]", e.Message, e.Code, e.Reason, e.RequestID)
}

// Is lets errors.Is find what a reason stands for in Go.
func (e *RemoteError) Is(target error) bool {
	switch target {
	case ErrLeaseExpired:
		return e.Reason == "LEASE_EXPIRED"
	case context.DeadlineExceeded:
		return e.Code == "DEADLINE_EXCEEDED"
	case context.Canceled:
		return e.Code == "CANCELLED"
	case fs.ErrNotExist:
		return e.Code == "NOT_FOUND"
	case fs.ErrExist:
		return e.Code == "ALREADY_EXISTS"
	case fs.ErrPermission:
		return e.Code == "PERMISSION_DENIED" || e.Code == "UNAUTHENTICATED"
	case ErrDisconnected:
		return e.Reason == "CONNECTION_LOST"
	case ErrLocalOnly:
		return e.Reason == "LOCAL_ONLY"
	case ErrProtocol:
		return e.Reason == "PROTOCOL"
	}
	return false
}

func argumentError(format string, arguments ...any) error {
	return fmt.Errorf("strait: %w: %w", ErrArgument, fmt.Errorf(format, arguments...))
}

func protocolError(format string, arguments ...any) error {
	return fmt.Errorf("strait: %w: %w; check that host and client have the same version",
		ErrProtocol, fmt.Errorf(format, arguments...))
}
