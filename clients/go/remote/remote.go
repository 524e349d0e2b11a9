// Package remote reaches hosts that are not on this machine, for strait.Connect: import it for that alone.
//
//	strait.Client ── frames ──▶ gateway ── Arrow Flight ──▶ host
//	                              └─ memory files of this process: what travels is copied into them, and out
//
// The gateway is to a Client what a host's data socket is. So everything that a Client does and promises holds, and what is shared
// memory with a host on this machine is a copy here.
package remote

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"time"

	arrowflight "github.com/apache/arrow-go/v18/arrow/flight"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"strait"
	"strait/internal/driver"
	"strait/internal/grpccode"
)

func init() { driver.Open = open }

const (
	// With HTTP/2's default of 64 KiB a stream runs at less than half the speed.
	windowBytes = 16 << 20
	// On a connection on which nothing comes for so long, the other side is asked whether it is there.
	keepaliveTime = 30 * time.Second
	// Between attempts, at first and at most.
	pauseMin, pauseMax = 20 * time.Millisecond, time.Second

	requestIDKey = "x-request-id"
	reasonKey    = "x-strait-reason"
	detailsKey   = "grpc-status-details-bin"
)

// Reasons of errors that are not the host's.
const (
	reasonLost  = "CONNECTION_LOST"
	reasonLocal = "LOCAL_ONLY"
	// The host broke it.
	reasonProtocol = "PROTOCOL"
)

// connection is a host's Flight service.
type connection struct {
	arrowflight.Client
	address  string
	token    string
	patience time.Duration
	// The host has answered before.
	met atomic.Bool
	// What TLS had against the host's certificate the last time.
	refusal atomic.Pointer[error]
}

func connect(o driver.Options) (*connection, error) {
	c := &connection{address: o.Address, token: o.Token, patience: o.Retry}
	target, secure, near, err := split(o.Address)
	if err != nil {
		return nil, err
	}
	transport := insecure.NewCredentials()
	switch {
	case secure:
		if transport, err = c.tls(o); err != nil {
			return nil, err
		}
	case o.CA != nil || o.CertPEM != nil || o.KeyPEM != nil || o.ServerName != "":
		return nil, argument("certificates and names are for TLS, which %q is without; use grpc+tls://HOST:PORT", o.Address)
	case o.Token != "" && !near:
		return nil, argument("the token would cross the network to %q in the clear; use grpc+tls://HOST:PORT", o.Address)
	}
	if !regexp.MustCompile(`^[\x21-\x7e]*$`).MatchString(o.Token) {
		return nil, argument("the token has characters that no token has; give it without line breaks and spaces")
	}
	again := backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second}
	c.Client, err = arrowflight.NewClientWithMiddleware(target, nil, nil,
		grpc.WithTransportCredentials(transport),
		grpc.WithInitialWindowSize(windowBytes),
		grpc.WithInitialConnWindowSize(windowBytes),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: again, MinConnectTimeout: 5 * time.Second}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: keepaliveTime}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(math.MaxInt32), grpc.MaxCallSendMsgSize(math.MaxInt32)))
	if err != nil {
		return nil, argument("%w", err)
	}
	return c, nil
}

// split is gRPC's name for an address, whether it is encrypted, and whether nobody else on the way can listen.
func split(address string) (target string, secure, near bool, err error) {
	scheme, place, found := strings.Cut(address, "://")
	switch {
	case !found || place == "":
	case scheme == "grpc+tls":
		return "dns:///" + place, true, false, nil
	case scheme == "grpc+tcp" || scheme == "grpc":
		return "dns:///" + place, false, loopback.MatchString(place), nil
	case scheme == "grpc+unix" && strings.HasPrefix(place, "/"):
		return "unix://" + filepath.Clean(place), false, true, nil
	}
	return "", false, false, argument("address %q is none of unix:///DIRECTORY (this machine), grpc+tls://HOST:PORT, grpc+tcp://HOST:PORT and "+
		"grpc+unix:///DIRECTORY/flight.sock", address)
}

var loopback = regexp.MustCompile(`^(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?$`)

func (c *connection) tls(o driver.Options) (credentials.TransportCredentials, error) {
	config := &tls.Config{ServerName: o.ServerName, MinVersion: tls.VersionTLS12}
	if o.CA != nil {
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(o.CA) {
			return nil, argument("WithCA has no certificate in PEM")
		}
	}
	if o.CertPEM != nil || o.KeyPEM != nil {
		own, err := tls.X509KeyPair(o.CertPEM, o.KeyPEM)
		if err != nil {
			return nil, argument("WithClientCertificate: %w", err)
		}
		config.Certificates = []tls.Certificate{own}
	}
	return shaking{credentials.NewTLS(config), c}, nil
}

// shaking keeps why a handshake failed, of which gRPC says words only.
type shaking struct {
	credentials.TransportCredentials
	of *connection
}

func (s shaking) Clone() credentials.TransportCredentials {
	return shaking{s.TransportCredentials.Clone(), s.of}
}

// context has what goes with each call.
func (c *connection) context(ctx context.Context, headers ...string) context.Context {
	if c.token != "" {
		headers = append(headers, "authorization", "Bearer "+c.token)
	}
	return metadata.AppendToOutgoingContext(ctx, headers...)
}

// ask makes a call of Flight's, again after a lost connection, as often as there is time for.
func (c *connection) ask(ctx context.Context, again bool, call func(context.Context) error) error {
	var until time.Time
	for pause := pauseMin; ; pause = min(2*pause, pauseMax) {
		err := call(ctx)
		if err == nil {
			c.met.Store(true)
			return nil
		}
		var lost *strait.RemoteError
		if !errors.As(err, &lost) || lost.Reason != reasonLost || !again || !c.met.Load() {
			return err
		}
		if until.IsZero() {
			until = time.Now().Add(c.patience)
		}
		if time.Now().Add(pause).After(until) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(pause/2 + rand.N(pause/2)):
		}
	}
}

// failed is a call's error as a Client has it. trailer is what the host said beside it.
func (c *connection) failed(err error, trailer metadata.MD) error {
	if err == nil || err == io.EOF {
		return err
	}
	found, ok := status.FromError(err)
	if !ok {
		return err
	}
	e := &strait.RemoteError{Code: grpccode.Names[found.Code()], Reason: "HOST", Message: found.Message(), RequestID: "-"}
	if details := trailer.Get(detailsKey); len(details) > 0 {
		// Whatever is not there stays as it is.
		_ = json.Unmarshal([]byte(details[0]), e)
	}
	if id := trailer.Get(requestIDKey); len(id) > 0 {
		e.RequestID = id[0]
	}
	if reason := trailer.Get(reasonKey); len(reason) > 0 {
		c.met.Store(true)
		e.Reason = reason[0]
		return e
	}
	// Nobody has answered, or nobody of strait's.
	switch found.Code() {
	case codes.Unavailable:
		e.Reason = reasonLost
		e.Message = fmt.Sprintf("the connection to %s was lost: %s", c.address, e.Message)
	case codes.Canceled:
		e.Reason = "CANCELLED"
	case codes.DeadlineExceeded:
		e.Reason = "DEADLINE"
	}
	return e
}

// act is an action's results.
func (c *connection) act(ctx context.Context, again bool, kind string, body []byte, headers ...string) ([][]byte, error) {
	var results [][]byte
	err := c.ask(c.context(ctx, headers...), again, func(ctx context.Context) error {
		results = nil
		ctx, stop := context.WithCancel(ctx)
		defer stop()
		stream, err := c.DoAction(ctx, &arrowflight.Action{Type: kind, Body: body})
		if err != nil {
			return c.failed(err, nil)
		}
		for {
			result, err := stream.Recv()
			if err == io.EOF {
				return nil
			}
			if err != nil {
				return c.failed(err, stream.Trailer())
			}
			results = append(results, result.Body)
		}
	})
	return results, err
}

func argument(format string, arguments ...any) error {
	return fmt.Errorf("strait: %w: %w", strait.ErrArgument, fmt.Errorf(format, arguments...))
}

func protocol(format string, arguments ...any) error {
	return fmt.Errorf("strait: %w: %w", strait.ErrProtocol, fmt.Errorf(format, arguments...))
}

// localOnly is what cannot be had from afar; the rest says what to do instead.
func (c *connection) localOnly(format string, arguments ...any) error {
	message := fmt.Sprintf(format, arguments...)
	return &strait.RemoteError{Code: "UNIMPLEMENTED", Reason: reasonLocal, RequestID: "-",
		Message: fmt.Sprintf("%s, and the host is at %s", message, c.address)}
}

// open is driver.Open.
func open(ctx context.Context, o driver.Options) (driver.Opened, error) {
	c, err := connect(o)
	if err != nil {
		return driver.Opened{}, err
	}
	welcome, err := c.act(ctx, false, "welcome", nil)
	if err == nil && len(welcome) != 1 {
		err = protocol("the action welcome gave %d results instead of 1", len(welcome))
	}
	if err != nil {
		var remote *strait.RemoteError
		refusal := c.refusal.Load()
		switch {
		case ctx.Err() != nil:
			err = context.Cause(ctx)
		case errors.As(err, &remote) && remote.Reason == reasonLost && refusal != nil:
			err = fmt.Errorf("strait: %w at %s: %w", strait.ErrNoHost, o.Address, *refusal)
		case errors.As(err, &remote) && remote.Reason == reasonLost:
			err = fmt.Errorf("strait: %w at %s: %s", strait.ErrNoHost, o.Address, remote.Message)
		}
		return driver.Opened{}, errors.Join(err, c.Close())
	}
	return newGateway(c, welcome[0])
}
