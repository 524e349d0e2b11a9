// Package driver is where the package remote leaves how a host is reached that is not on this machine, so that who needs
// none does not link it.
package driver

import (
	"context"
	"net"
	"time"
)

// Options is where the host is, who asks, and whom to believe.
type Options struct {
	Address    string
	Token      string
	CA         []byte
	CertPEM    []byte
	KeyPEM     []byte
	ServerName string
	// Retry is for how long what a lost connection interrupted is asked again.
	Retry time.Duration
}

// Opened is a connection.
type Opened struct {
	// Socket is a data socket of the host's, as a client sees it.
	Socket *net.UnixConn
	// Copied is how many bytes of tensors went to the host and came from it, beside those in frames.
	Copied func() int64
}

// Open connects; nil as long as the program does not import the package remote.
var Open func(ctx context.Context, o Options) (Opened, error)
