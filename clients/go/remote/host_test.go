package remote_test

import (
	"bufio"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"strait"
)

// tlsHost is a real host with TLS and tokens; it answers its address, its authority and what makes and revokes tokens.
func tlsHost(t *testing.T) (address string, ca []byte, token func(words ...string) string) {
	t.Helper()
	program := os.Getenv("STRAIT_BIN")
	if program == "" {
		t.Skip("STRAIT_BIN does not name the host's program")
	}
	home, err := os.MkdirTemp("", "strait-go-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(home) })
	own := newAuthority(t)
	certificate, key := own.issue(t, "127.0.0.1", time.Now().Add(time.Hour))
	at := func(name string) string { return filepath.Join(home, name) }
	err = errors.Join(os.WriteFile(at("host.pem"), certificate, 0o600), os.WriteFile(at("host.key"), key, 0o600), os.Mkdir(at("run"), 0o700))
	if err != nil {
		t.Fatal(err)
	}
	token = func(words ...string) string {
		t.Helper()
		said, err := exec.Command(program, append(append([]string{"token"}, words...), "--tokens", at("tokens.toml"))...).Output()
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(said))
	}
	token("new", "nobody")
	host := exec.Command(program, "serve", "--directory", at("run"), "--log-level", "error", "--tcp", "127.0.0.1:0",
		"--tls-cert", at("host.pem"), "--tls-key", at("host.key"), "--tokens", at("tokens.toml"))
	ready := must(host.StdoutPipe())(t)
	if err := host.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = host.Process.Kill(); _ = host.Wait() })
	line, err := bufio.NewReader(ready).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return regexp.MustCompile(`grpc\+tls://\S+:\d+`).FindString(line), own.pem(), token
}

func TestAHostWithTLSAndTokens(t *testing.T) {
	address, pem, token := tlsHost(t)
	ctx, ca := t.Context(), strait.WithCA(pem)
	alice := token("new", "alice", "--can", "put,get,call:scale-*")
	var c *strait.Client
	eventually(t, "the host knows the token", func() bool {
		var err error
		c, err = strait.Connect(ctx, address, ca, strait.WithToken(alice))
		return err == nil
	})
	defer c.Close()
	x := numbers(1_000_000)
	must(c.Publish(ctx, "x", strait.Slice(x)))(t)
	result := must(c.Call(ctx, "scale-shift", strait.Inputs{"x": strait.Name("x")}, strait.Param("a", 2.0)))(t)
	if y := read[float64](t, result.Tensor("y")); y[999_999] != 2*x[999_999] {
		t.Fatal(y[999_999])
	}
	result.Release()
	scale := must(c.Prepare(ctx, "scale-shift", strait.Inputs{"x": strait.Each[float64](4)}, strait.Param("a", 2.0)))(t)
	if y := read[float64](t, must(scale.Call(ctx, strait.Inputs{"x": strait.Slice(x[:4])}))(t).Tensor("y")); y[3] != 2*x[3] {
		t.Fatal(y)
	}
	var remote *strait.RemoteError
	_, err := c.Call(ctx, "zscore", strait.Inputs{"x": strait.Name("x")}, strait.Param("axis", 0))
	if !errors.As(err, &remote) || remote.Reason != "NO_RIGHT" || !errors.Is(err, fs.ErrPermission) || remote.Details["right"] != "call:zscore" {
		t.Fatal(err)
	}
	if _, err := c.Fetch(ctx, "y"); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	for given, reason := range map[string]string{"": "TOKEN_MISSING", "guess": "TOKEN_UNKNOWN"} {
		_, err := strait.Connect(ctx, address, ca, strait.WithToken(given))
		if !errors.As(err, &remote) || remote.Reason != reason || !errors.Is(err, fs.ErrPermission) {
			t.Fatal(err)
		}
	}
	token("rm", "alice")
	eventually(t, "the token is revoked", func() bool {
		err := c.Ping(ctx)
		return errors.As(err, &remote) && remote.Reason == "TOKEN_REVOKED"
	})
}
