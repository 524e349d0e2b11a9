package remote_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io/fs"
	"math/big"
	"net"
	"testing"
	"time"

	arrowflight "github.com/apache/arrow-go/v18/arrow/flight"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"strait"
)

const token = "strait-0123456789"

// authority issues certificates.
type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) authority {
	t.Helper()
	a := authority{key: must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	text := must(x509.CreateCertificate(rand.Reader, template, template, a.key.Public(), a.key))(t)
	a.certificate = must(x509.ParseCertificate(text))(t)
	return a
}

func (a authority) pem() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.certificate.Raw})
}

func (a authority) issue(t *testing.T, name string, until time.Time) (certificate, key []byte) {
	t.Helper()
	own := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	template := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: until}
	if ip := net.ParseIP(name); ip != nil {
		template.IPAddresses = []net.IP{ip}
	} else {
		template.DNSNames = []string{name}
	}
	text := must(x509.CreateCertificate(rand.Reader, template, a.certificate, own.Public(), a.key))(t)
	secret := must(x509.MarshalPKCS8PrivateKey(own))(t)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: text}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret})
}

// stock is a Flight server that knows a token and one action.
type stock struct{ arrowflight.BaseFlightServer }

func (stock) DoAction(action *arrowflight.Action, stream arrowflight.FlightService_DoActionServer) error {
	said, _ := metadata.FromIncomingContext(stream.Context())
	if got := said.Get("authorization"); len(got) != 1 || got[0] != "Bearer "+token {
		return status.Error(codes.Unauthenticated, "the token is none that is known")
	}
	if action.Type == "stats" {
		return status.Error(codes.PermissionDenied, "this token may not")
	}
	return stream.Send(&arrowflight.Result{Body: []byte(`{"host_id": "h", "inline_bytes": 0}`)})
}

func serve(t *testing.T, certificate, key []byte, clients *x509.CertPool) string {
	t.Helper()
	config := &tls.Config{Certificates: []tls.Certificate{must(tls.X509KeyPair(certificate, key))(t)}}
	if clients != nil {
		config.ClientCAs, config.ClientAuth = clients, tls.RequireAndVerifyClientCert
	}
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(config)))
	arrowflight.RegisterFlightServiceServer(server, &stock{})
	listener := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(server.Stop)
	return "grpc+tls://" + listener.Addr().String()
}

func TestTokensAndCertificates(t *testing.T) {
	ours, other := newAuthority(t), newAuthority(t)
	soon := time.Now().Add(time.Hour)
	certificate, key := ours.issue(t, "127.0.0.1", soon)
	local := serve(t, certificate, key, nil)
	ca := strait.WithCA(ours.pem())
	ctx := t.Context()

	c := connect(t, local, ca, strait.WithToken(token))
	if c.Welcome().HostID != "h" {
		t.Error(c.Welcome())
	}
	if _, err := c.Stats(ctx); !errors.Is(err, fs.ErrPermission) {
		t.Error(err)
	}
	for _, option := range []strait.DialOption{strait.WithToken("another"), strait.WithToken("")} {
		var remote *strait.RemoteError
		if _, err := strait.Connect(ctx, local, ca, option); !errors.Is(err, fs.ErrPermission) || !errors.As(err, &remote) || remote.Code != "UNAUTHENTICATED" {
			t.Error(err)
		}
	}

	var untrusted x509.UnknownAuthorityError
	for _, options := range [][]strait.DialOption{{strait.WithCA(other.pem())}, {}} {
		if _, err := strait.Connect(ctx, local, options...); !errors.Is(err, strait.ErrNoHost) || !errors.As(err, &untrusted) {
			t.Error(err)
		}
	}
	certificate, key = ours.issue(t, "elsewhere.test", soon)
	elsewhere := serve(t, certificate, key, nil)
	var misnamed x509.HostnameError
	if _, err := strait.Connect(ctx, elsewhere, ca, strait.WithToken(token)); !errors.As(err, &misnamed) {
		t.Error(err)
	}
	connect(t, elsewhere, ca, strait.WithToken(token), strait.WithServerName("elsewhere.test"))
	certificate, key = ours.issue(t, "127.0.0.1", time.Now().Add(-time.Hour))
	var invalid x509.CertificateInvalidError
	if _, err := strait.Connect(ctx, serve(t, certificate, key, nil), ca); !errors.As(err, &invalid) || invalid.Reason != x509.Expired {
		t.Error(err)
	}

	pool := x509.NewCertPool()
	pool.AddCert(ours.certificate)
	certificate, key = ours.issue(t, "127.0.0.1", soon)
	strict := serve(t, certificate, key, pool)
	connect(t, strict, ca, strait.WithToken(token), strait.WithClientCertificate(ours.issue(t, "client", soon)))
	if _, err := strait.Connect(ctx, strict, ca, strait.WithToken(token)); !errors.Is(err, strait.ErrNoHost) {
		t.Error(err)
	}
	ended, stop := context.WithCancel(ctx)
	stop()
	if _, err := strait.Connect(ended, local, ca); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
