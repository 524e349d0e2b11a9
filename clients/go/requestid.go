package strait

import (
	"context"
	"math"
	"time"
)

// milliseconds rounds up, so that a short time does not become none; 0 stays 0.
func milliseconds(d time.Duration) int64 {
	d = max(d, 0)
	whole := int64(d / time.Millisecond)
	if d%time.Millisecond > 0 {
		whole++
	}
	return whole
}

// duration is milliseconds that the host said; more than there are become as many as there are.
func duration(ms int64) time.Duration {
	return time.Duration(min(max(ms, 0), int64(math.MaxInt64/time.Millisecond))) * time.Millisecond
}

type requestIDKey struct{}

// WithRequestID makes every request under the context carry this id: into the host's log lines, its
// replies and its errors. It needs 1 to 64 characters from A-Z a-z 0-9 . _ : - or the requests fail
// with ErrArgument.
func WithRequestID(ctx context.Context, id string) context.Context {
	return context.WithValue(ctx, requestIDKey{}, id)
}

func requestID(ctx context.Context) (string, error) {
	id, named := ctx.Value(requestIDKey{}).(string)
	if !named {
		return "", nil
	}
	if !isID(id) {
		return "", argumentError("request id %q; it needs 1 to 64 characters from A-Z a-z 0-9 . _ : -", id)
	}
	return id, nil
}

func isID(id string) bool {
	for _, r := range []byte(id) {
		letter := r >= 'A' && r <= 'Z' || r >= 'a' && r <= 'z' || r >= '0' && r <= '9'
		if !letter && r != '.' && r != '_' && r != ':' && r != '-' {
			return false
		}
	}
	return len(id) >= 1 && len(id) <= 64
}
