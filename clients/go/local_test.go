package strait

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// asProgram is the environment variable by which this test binary is told to be one of the programs below.
const asProgram = "STRAIT_TEST_PROGRAM"

type facts struct {
	PID, Hosts int
	Directory  string
}

// programs start a host and tell of it.
var programs = map[string]func(context.Context) error{
	"waits": func(ctx context.Context) error {
		c, err := Local(ctx)
		if err != nil {
			return err
		}
		// A child that is not waited for does not keep the host.
		if err := exec.Command("sleep", "60").Start(); err != nil {
			return err
		}
		pid, err := peerOf(c)
		if err != nil {
			return err
		}
		if err := json.NewEncoder(os.Stdout).Encode(facts{PID: pid, Directory: c.Welcome().Directory}); err != nil {
			return err
		}
		for {
			time.Sleep(100 * time.Millisecond)
			if err := c.Ping(ctx); err != nil {
				return err
			}
		}
	},
	"shares": func(ctx context.Context) error {
		var running sync.WaitGroup
		var mu sync.Mutex
		found, failed := map[string]bool{}, []error{}
		for range 16 {
			running.Go(func() {
				c, err := Local(ctx)
				mu.Lock()
				defer mu.Unlock()
				failed = append(failed, err)
				if err == nil {
					found[c.Welcome().HostID] = true
					failed = append(failed, c.Close())
				}
			})
		}
		running.Wait()
		return errors.Join(errors.Join(failed...), json.NewEncoder(os.Stdout).Encode(facts{Hosts: len(found)}))
	},
}

func peerOf(c *Client) (int, error) {
	var peer *syscall.Ucred
	var err error
	controlled := c.conn.raw.Control(func(fd uintptr) {
		peer, err = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	})
	if err := errors.Join(controlled, err); err != nil {
		return 0, err
	}
	return int(peer.Pid), nil
}

// run runs one of the programs in a process group of its own.
func run(t *testing.T, name, place string) (*exec.Cmd, facts) {
	t.Helper()
	if os.Getenv("STRAIT_BIN") == "" {
		t.Skip("STRAIT_BIN does not name the host's program")
	}
	program := exec.Command(os.Args[0])
	program.Env = append(os.Environ(), asProgram+"="+name, "TMPDIR="+place)
	program.Stderr = os.Stderr
	program.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	stdout := must[interface {
		Read([]byte) (int, error)
		Close() error
	}](t)(program.StdoutPipe())
	if err := program.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// It, and what it started and left, may have ended.
		_ = syscall.Kill(-program.Process.Pid, syscall.SIGKILL)
		_ = program.Wait()
	})
	var told facts
	line := must[string](t)(bufio.NewReader(stdout).ReadString('\n'))
	if err := json.Unmarshal([]byte(line), &told); err != nil {
		t.Fatalf("%q: %v", line, err)
	}
	return program, told
}

// shortPlace is an empty directory whose path leaves room for a socket's.
func shortPlace(t *testing.T) string {
	t.Helper()
	place := must[string](t)(os.MkdirTemp("", "strait-go-"))
	t.Cleanup(func() {
		if err := os.RemoveAll(place); err != nil {
			t.Error(err)
		}
	})
	return place
}

func soon(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for range 1000 {
		if holds() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("never: ", what)
}

// runs says whether a process is there, and not a zombie that only waits for whoever reaps orphans here.
func runs(pid int) bool {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return false
	}
	after := string(stat[strings.LastIndexByte(string(stat), ')')+1:])
	return strings.Fields(after)[0] != "Z"
}

func isEmpty(directory string) bool {
	entries, err := os.ReadDir(directory)
	return err == nil && len(entries) == 0
}

func TestALocalHostEndsWhateverItsProgramDiesOf(t *testing.T) {
	for _, signal := range []syscall.Signal{syscall.SIGKILL, syscall.SIGINT, syscall.SIGTERM} {
		place := shortPlace(t)
		program, host := run(t, "waits", place)
		if filepath.Dir(host.Directory) != place || !runs(host.PID) {
			t.Fatalf("%+v", host)
		}
		// To the whole group, as a terminal does.
		if err := syscall.Kill(-program.Process.Pid, signal); err != nil {
			t.Fatal(err)
		}
		soon(t, "the host ends", func() bool { return !runs(host.PID) && isEmpty(place) })
	}
}

func TestGoroutinesThatAskAtOnceGetOneLocalHost(t *testing.T) {
	program, told := run(t, "shares", shortPlace(t))
	if err := program.Wait(); err != nil || told.Hosts != 1 {
		t.Fatal(err, told)
	}
}

// localHere lets hosts of this very process end with the test, and checks that it leaves nothing.
func localHere(t *testing.T) (place string) {
	t.Helper()
	place = shortPlace(t)
	t.Setenv("TMPDIR", place)
	before := localHosts.byKey
	localHosts.byKey = map[string]*localHost{}
	fds := openFDs(t)
	t.Cleanup(func() {
		for _, host := range localHosts.byKey {
			if host.process != nil {
				_ = host.process.stdin.Close()
				if !host.process.endsWithin(time.Minute) {
					t.Error("a host does not end")
				}
				host.process.close()
			}
		}
		localHosts.byKey = before
		if left := must[[]string](t)(filepath.Glob(filepath.Join(place, "strait-*-*"))); len(left) != 0 {
			t.Error("left behind:", left)
		}
		soon(t, "no descriptor is left", func() bool {
			// What is only forgotten is closed by finalizers.
			runtime.GC()
			return openFDs(t) <= fds
		})
	})
	return place
}

func TestALocalHostIsShared(t *testing.T) {
	if os.Getenv("STRAIT_BIN") == "" {
		t.Skip("STRAIT_BIN does not name the host's program")
	}
	place, ctx := localHere(t), context.Background()
	local := func(options ...LocalOption) *Client {
		t.Helper()
		c := must[*Client](t)(Local(ctx, options...))
		t.Cleanup(func() { c.Close() })
		return c
	}
	first, second := local(), local(WithName("second"))
	x := must[TensorOf[float64]](t)(NewTensor[float64](ctx, first, 1000, 100))
	x.Data()[7] = 7
	res := must[*Result](t)(first.Call(ctx, "scale-shift", Inputs{"x": x}, Param("a", 2), Param("b", 1)))
	y := must[[]float64](t)(As[float64](res.Tensor("y")))
	if y[7] != 15 || y[8] != 1 || res.CopiedBytes != 0 {
		t.Error(y[:9], res.CopiedBytes)
	}
	res.Release()
	if _, err := first.Publish(ctx, "x", x); err != nil {
		t.Fatal(err)
	}
	x.Release()
	again := must[*Tensor](t)(second.Fetch(ctx, "x"))
	again.Release()
	limited := local(Setting("limits.deadline_ms_default", "4321"))
	if limited.Welcome().DeadlineMSDefault != 4321 || limited.Welcome().HostID == first.Welcome().HostID {
		t.Errorf("%+v", limited.Welcome())
	}
	if guests := os.Getenv("STRAIT_TEST_PLUGINS"); guests != "" {
		plugin := filepath.Join(place, "plugin.wasm")
		install := func(guest string) {
			bytes := must[[]byte](t)(os.ReadFile(filepath.Join(guests, guest)))
			if err := os.WriteFile(plugin+".new", bytes, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(plugin+".new", plugin); err != nil {
				t.Fatal(err)
			}
		}
		install("counts_runs.wasm")
		one, same := local(Plugin(plugin)), local(Plugin(plugin))
		install("copies.wasm")
		other := local(Plugin(plugin))
		if one.Welcome().HostID != same.Welcome().HostID || one.Welcome().HostID == other.Welcome().HostID {
			t.Error("a plugin's file tells hosts apart")
		}
	}

	pid := must[int](t)(peerOf(first))
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_, err := first.Call(ctx, "scale-shift", Inputs{"x": Name("x")}, Param("a", 2))
	if !errors.Is(err, ErrDisconnected) || !strings.Contains(err.Error(), "was ended by a signal: killed") {
		t.Error(err)
	}
	if runs(pid) {
		t.Error("it is there still")
	}
	// What a host that is killed leaves behind.
	if err := os.RemoveAll(first.Welcome().Directory); err != nil {
		t.Fatal(err)
	}
	successor := local()
	if flights := must[[]Flight](t)(successor.List(ctx)); len(flights) != 0 {
		t.Error(flights)
	}
}

func script(t *testing.T, place, text string) string {
	t.Helper()
	path := filepath.Join(place, "strait")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestProgramsThatAreNoLocalHost(t *testing.T) {
	for text, parts := range map[string][]string{
		"exit 3":                          {"ended with exit code 3", "wrote nothing to stderr"},
		"echo out of order >&2; exit 1":   {"ended with exit code 1", "stderr ends with:\nout of order"},
		"kill -9 $$":                      {"was ended by a signal: killed"},
		"echo hello; exec cat":            {"does not say that it is ready", `said "hello"`, "STRAIT_BIN"},
		"printf half; exec >&-; exec cat": {`said "half"`},
		"exec cat /dev/zero":              {`said "\x00`},
		"echo '{}'; exec cat":             {`said "{}"`},
		`echo '{"address": 3}'; exec cat`: {"does not say that it is ready"},
		`echo '{"version": "9.9.9", "protocol": 1, "address": "unix:///no/such"}'; exec cat`: {
			"strait 9.9.9", "protocol 1", fmt.Sprint("protocol ", protocolVersion), "STRAIT_BIN"},
		`echo '{"version": "9.9.9", "protocol": 2, "address": "unix:///no/such"}'; exec cat`: {"no/such/data.sock"},
	} {
		t.Run(text, func(t *testing.T) {
			place := localHere(t)
			t.Setenv("STRAIT_BIN", script(t, place, text))
			_, err := Local(context.Background())
			if !errors.Is(err, ErrNoHost) {
				t.Error(err)
			}
			for _, part := range parts {
				if !strings.Contains(fmt.Sprint(err), part) {
					t.Errorf("%v lacks %s", err, part)
				}
			}
		})
	}
}

func TestALocalHostThatIsNeverReady(t *testing.T) {
	place := localHere(t)
	t.Setenv("STRAIT_BIN", script(t, place, "echo waits >&2; sleep 60"))
	ctx, stop := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer stop()
	_, err := Local(ctx)
	if !errors.Is(err, ErrNoHost) || !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	for _, part := range []string{"not ready within 0.", "waits"} {
		if !strings.Contains(fmt.Sprint(err), part) {
			t.Error(err)
		}
	}
	cancelled, cancel := context.WithCancel(context.Background())
	time.AfterFunc(100*time.Millisecond, cancel)
	if _, err := Local(cancelled); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestWhatIsNoLocalHostsPlugin(t *testing.T) {
	place, ctx := localHere(t), context.Background()
	for _, option := range []LocalOption{
		Plugin(filepath.Join(place, "missing.wasm")), Setting("deadline", "1"), Setting("server.tcp", "127.0.0.1:1"), Setting("", ""),
	} {
		if _, err := Local(ctx, option); !errors.Is(err, ErrArgument) {
			t.Error(err)
		}
	}
	if _, err := Local(ctx, Plugin("missing.wasm")); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	program := os.Getenv("STRAIT_BIN")
	t.Setenv("PATH", place)
	t.Setenv("STRAIT_BIN", "")
	for _, part := range []string{"on the PATH", "STRAIT_BIN", "cargo install"} {
		if _, err := Local(ctx); !errors.Is(err, ErrNoHost) || !strings.Contains(err.Error(), part) {
			t.Error(err)
		}
	}
	t.Setenv("STRAIT_BIN", filepath.Join(place, "missing"))
	if _, err := Local(ctx); !errors.Is(err, ErrNoHost) || !strings.Contains(err.Error(), "STRAIT_BIN names") {
		t.Error(err)
	}
	if program == "" {
		return
	}
	t.Setenv("STRAIT_BIN", program)
	if err := os.WriteFile(filepath.Join(place, "not.wasm"), []byte("not a component"), 0o600); err != nil {
		t.Fatal(err)
	}
	for text, option := range map[string]LocalOption{
		"not.wasm": Plugin(filepath.Join(place, "not.wasm")), "no_such": Setting("limits.no_such", "1"),
	} {
		if _, err := Local(ctx, option); !errors.Is(err, ErrNoHost) || !strings.Contains(err.Error(), text) {
			t.Error(err)
		}
	}
}
