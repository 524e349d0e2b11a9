// Package hosttest starts real hosts for tests.
package hosttest

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// Start starts a host of its own for t, from the program that STRAIT_BIN names; without it t is
// skipped. It answers the host's address and process, and ends it with t. plugins are files in the
// directory that STRAIT_TEST_PLUGINS names; without that, a test that needs some is skipped.
func Start(t testing.TB, plugins ...string) (string, *os.Process) {
	t.Helper()
	binary := os.Getenv("STRAIT_BIN")
	if binary == "" {
		t.Skip("STRAIT_BIN does not name the host's program")
	}
	// Not t.TempDir: with a long test's name in it, it is too long for a socket's path.
	directory, err := os.MkdirTemp("", "strait-go-")
	if err != nil {
		t.Fatal(err)
	}
	arguments := []string{"serve", "--directory", directory, "--log-level", "warn"}
	for _, plugin := range plugins {
		place := os.Getenv("STRAIT_TEST_PLUGINS")
		if place == "" {
			t.Skipf("STRAIT_TEST_PLUGINS does not name a directory with %s", plugin)
		}
		arguments = append(arguments, "--plugin", filepath.Join(place, plugin))
	}
	host := exec.Command(binary, arguments...)
	host.Stderr = os.Stderr
	if err := host.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// One that a test killed has ended already.
		_ = host.Process.Kill()
		_ = host.Wait()
		if err := os.RemoveAll(directory); err != nil {
			t.Error(err)
		}
	})
	for socket, network := range map[string]string{"data.sock": "unixpacket", "flight.sock": "unix"} {
		if err := reachable(network, filepath.Join(directory, socket)); err != nil {
			t.Fatal(err)
		}
	}
	return "unix://" + directory, host.Process
}

func reachable(network, socket string) (err error) {
	for range 600 {
		var c net.Conn
		if c, err = net.Dial(network, socket); err == nil {
			return c.Close()
		}
		time.Sleep(50 * time.Millisecond)
	}
	return fmt.Errorf("the host does not answer: %w", err)
}
