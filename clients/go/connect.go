package strait

import (
	"context"
	"os"
	"strings"
	"time"

	"strait/internal/driver"
)

// retryDefault is for how long what a lost connection interrupted is asked again.
const retryDefault = 10 * time.Second

// Connect is Dial for a host anywhere: unix:///DIRECTORY is one on this machine, with which memory is shared. grpc+tls://HOST:PORT is
// reached over Arrow Flight, as are grpc+tcp://HOST:PORT, which is not encrypted, and grpc+unix:///DIRECTORY/flight.sock. For an empty
// address it is $STRAIT_ADDRESS, or the host that Directory finds.
//
// The client has the same methods, but what travels is copied, and ClientStats counts it: each tensor is in memory of this process's own, which
// a Fetch or a Call fills and a Publish or a Call reads. A call runs once, also if the connection is lost meanwhile, which is made
// anew; what has a socket of its own (Prepared, Stream, Channel) ends with it. A Ring is ErrLocalOnly.
//
// It needs the package remote, which is imported for this alone:
//
//	import _ "strait/remote"
//
// The error is ErrNoHost if nobody answers, and then also what TLS has against the host's certificate (*tls.CertificateVerificationError,
// x509.HostnameError); a RemoteError that is fs.ErrPermission for a token that the host does not take; ErrArgument.
func Connect(ctx context.Context, address string, options ...DialOption) (*Client, error) {
	if address == "" {
		address = os.Getenv("STRAIT_ADDRESS")
	}
	o := defaultOptions()
	for _, option := range options {
		option(&o)
	}
	if !strings.HasPrefix(address, "grpc") {
		if given := o.forRemote(); given != "" {
			return nil, argumentError("%s is for hosts that are reached over the network (grpc+tls://HOST:PORT); this address is %q", given, address)
		}
		return Dial(ctx, address, options...)
	}
	if driver.Open == nil {
		return nil, argumentError("address %q is reached by the package remote, which this program lacks: import _ \"strait/remote\"", address)
	}
	far := o.far
	far.Address = address
	opened, err := driver.Open(ctx, far)
	if err != nil {
		return nil, err
	}
	client, err := greet(ctx, opened.Socket, options)
	if err != nil {
		return nil, err
	}
	client.conn.copiedFar = opened.Copied
	return client, nil
}

// WithToken says who asks, to a host that Connect reaches over the network.
func WithToken(token string) DialOption { return func(o *dialOptions) { o.far.Token = token } }

// WithCA is the authorities whose certificates Connect trusts, in PEM, and not those of the system.
func WithCA(pem []byte) DialOption { return func(o *dialOptions) { o.far.CA = pem } }

// WithClientCertificate is who asks, as a certificate and its key in PEM.
func WithClientCertificate(certificate, key []byte) DialOption {
	return func(o *dialOptions) { o.far.CertPEM, o.far.KeyPEM = certificate, key }
}

// WithServerName is what the host's certificate is issued to, where that is not the name in the address.
func WithServerName(name string) DialOption { return func(o *dialOptions) { o.far.ServerName = name } }

// WithRetry is for how long Connect's client asks again what a lost connection interrupted; the default is 10 s.
func WithRetry(patience time.Duration) DialOption {
	return func(o *dialOptions) { o.far.Retry = patience }
}

// forRemote is an option that a host on this machine has no use for; empty: none was given.
func (o *dialOptions) forRemote() string {
	switch {
	case o.far.Token != "":
		return "WithToken"
	case o.far.CA != nil:
		return "WithCA"
	case o.far.CertPEM != nil || o.far.KeyPEM != nil:
		return "WithClientCertificate"
	case o.far.ServerName != "":
		return "WithServerName"
	}
	return ""
}
