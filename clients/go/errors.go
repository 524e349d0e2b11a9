package strait

import (
	"context"
	"errors"
	"fmt"
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
	// ErrProtocol: the host said something that the protocol does not allow. Client and host are
	// probably of different versions.
	ErrProtocol = errors.New("the host broke the protocol")
)

// RemoteError is the host's refusal of a request, or the failure of a kernel.
//
// errors.Is knows three of them by other names as well: ErrLeaseExpired, context.DeadlineExceeded
// (the kernel ran into its deadline) and context.Canceled.
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
