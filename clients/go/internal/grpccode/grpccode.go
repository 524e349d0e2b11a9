// Package grpccode has gRPC's codes by the names that the data socket has for them.
package grpccode

import "google.golang.org/grpc/codes"

// Names is what each code is called.
var Names = map[codes.Code]string{
	codes.Unknown:            "UNKNOWN",
	codes.InvalidArgument:    "INVALID_ARGUMENT",
	codes.NotFound:           "NOT_FOUND",
	codes.AlreadyExists:      "ALREADY_EXISTS",
	codes.FailedPrecondition: "FAILED_PRECONDITION",
	codes.ResourceExhausted:  "RESOURCE_EXHAUSTED",
	codes.OutOfRange:         "OUT_OF_RANGE",
	codes.DeadlineExceeded:   "DEADLINE_EXCEEDED",
	codes.Canceled:           "CANCELLED",
	codes.Internal:           "INTERNAL",
	codes.PermissionDenied:   "PERMISSION_DENIED",
	codes.Unauthenticated:    "UNAUTHENTICATED",
	codes.Unavailable:        "UNAVAILABLE",
	codes.Unimplemented:      "UNIMPLEMENTED",
}
