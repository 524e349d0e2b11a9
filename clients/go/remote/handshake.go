package remote

import (
	"context"
	"net"

	"google.golang.org/grpc/credentials"
)

// ClientHandshake is the transport's.
func (s shaking) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := s.TransportCredentials.ClientHandshake(ctx, authority, raw)
	if err != nil {
		s.of.refusal.Store(&err)
	}
	return conn, info, err
}
