package strait

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"strait/internal/hosttest"
	"strait/internal/shm"
)

// leavesNothing runs a test and holds what is open afterwards against what was before.
func leavesNothing(t *testing.T, name string, run func(t *testing.T)) {
	t.Helper()
	fds, goroutines := openFDs(t), runtime.NumGoroutine()
	t.Run(name, run)
	for range 400 {
		if openFDs(t) == fds && runtime.NumGoroutine() <= goroutines {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	stacks := make([]byte, 1<<16)
	t.Errorf("%s: %d descriptors, %d before; %d goroutines, %d before\n%s", name, openFDs(t), fds,
		runtime.NumGoroutine(), goroutines, stacks[:runtime.Stack(stacks, true)])
}

// lie is an answer that no right host gives.
type lie func(p *peer, asked packet)

// says answers with a body and descriptors.
func says(body string, fds ...int) lie {
	return func(p *peer, asked packet) { p.send(opOK, asked.sequence, body, fds...) }
}

// raw answers with a packet of any form.
func raw(bytes ...byte) lie {
	return func(p *peer, _ packet) {
		if _, err := p.socket.Write(bytes); err != nil {
			p.t.Error(err)
		}
	}
}

// okHeader is one of an OK.
func okHeader(sequence, bytes uint32) []byte {
	header := append([]byte{'S', 'T', protocolVersion, byte(opOK)}, make([]byte, headerBytes-4)...)
	binary.LittleEndian.PutUint32(header[4:], sequence)
	binary.LittleEndian.PutUint32(header[8:], bytes)
	return header
}

// granted is the reply to MAP or CREATE with a tensor changed.
func granted(writers, from, to string) string {
	return `{"mapping":` + strings.Replace(mapping(writers), from, to, 1) + `,"lease":9,"expires_ms":60000}`
}

// drain reads and drops what the client still says, until it or the test ends.
func (p *peer) drain() {
	buffer := make([]byte, 1<<16)
	for {
		if n, err := p.socket.Read(buffer); err != nil || n == 0 {
			return
		}
	}
}

func TestLiesAboutAMappingAreErrors(t *testing.T) {
	good := granted(writersNone, "", "")
	// with sends a file beside the body.
	with := func(body string, open func(p *peer) []int) lie {
		return func(p *peer, asked packet) { p.send(opOK, asked.sequence, body, open(p)...) }
	}
	memory := func(writers string) func(*peer) []int {
		return func(p *peer) []int {
			file, _ := p.memory(writers)
			return []int{int(file.Fd())}
		}
	}
	sealed := memory(writersNone)
	times := func(count int) func(*peer) []int {
		return func(p *peer) []int {
			var all []int
			for range count {
				all = append(all, sealed(p)...)
			}
			return all
		}
	}
	path := func(path string, flags int) func(*peer) []int {
		return func(p *peer) []int {
			file, err := os.OpenFile(path, flags, 0)
			if err != nil {
				p.t.Fatal(err)
			}
			p.t.Cleanup(func() { file.Close() })
			return []int{int(file.Fd())}
		}
	}
	unsealed := func(p *peer) []int {
		file, err := shm.NewFile("unsealed")
		if err != nil {
			p.t.Fatal(err)
		}
		p.t.Cleanup(func() { file.Close() })
		if err := file.Truncate(1 << 17); err != nil {
			p.t.Fatal(err)
		}
		return []int{int(file.Fd())}
	}
	deep := strings.Repeat("[", 30_000) + strings.Repeat("]", 30_000)
	inside := `{"mapping":{"tensors":` + deep[1000:59_000] + `}}`
	for name, answer := range map[string]lie{
		"no descriptor":            says(good),
		"two descriptors":          with(good, times(2)),
		"16 descriptors":           with(good, times(16)),
		"17 descriptors":           with(good, times(17)),
		"not a memory file":        with(good, path("/dev/zero", os.O_RDONLY)),
		"a directory":              with(good, path("/", os.O_RDONLY)),
		"a file that can shrink":   with(good, unsealed),
		"a file others write to":   with(good, memory(writersCreator)),
		"longer than its file":     with(granted(writersNone, "131072", "131073"), sealed),
		"no bytes":                 with(granted(writersNone, "131072", "0"), sealed),
		"negative bytes":           with(granted(writersNone, "131072", "-131072"), sealed),
		"2^63-1 bytes":             with(granted(writersNone, "131072", "9223372036854775807"), sealed),
		"2^63 bytes":               with(granted(writersNone, "131072", "9223372036854775808"), sealed),
		"half a byte":              with(granted(writersNone, "131072", "131072.5"), sealed),
		"an offset behind the end": with(granted(writersNone, "65536", "131072"), sealed),
		"a negative offset":        with(granted(writersNone, "65536", "-64"), sealed),
		"an offset that overflows": with(granted(writersNone, "65536", "9223372036854775744"), sealed),
		"an odd offset":            with(granted(writersNone, "65536", "65537"), sealed),
		"a wrong length":           with(granted(writersNone, ":48", ":47"), sealed),
		"a negative length":        with(granted(writersNone, ":48", ":-48"), sealed),
		"a length of 2^64":         with(granted(writersNone, ":48", ":18446744073709551616"), sealed),
		"a product that overflows": with(granted(writersNone, "[2,3]", "[4294967296,4294967296,2]"), sealed),
		"a product that wraps":     with(granted(writersNone, "[2,3]", "[6,2305843009213693952,8]"), sealed),
		"a negative size":          with(granted(writersNone, "[2,3]", "[-2,-3]"), sealed),
		"nine axes":                with(granted(writersNone, "[2,3]", "[1,1,1,1,1,1,1,2,3]"), sealed),
		"a size of 2^64":           with(granted(writersNone, "[2,3]", "[18446744073709551616,0]"), sealed),
		"a shape that is a text":   with(granted(writersNone, "[2,3]", `"2x3"`), sealed),
		"a type that is unknown":   with(granted(writersNone, "float64", "float7"), sealed),
		"no type":                  with(granted(writersNone, "float64", ""), sealed),
		"another version":          with(granted(writersNone, `mmap":1`, `mmap":2`), sealed),
		"somebody can still write": with(granted(writersAnyone, "", ""), memory(writersAnyone)),
		"no lease":                 with(`{"mapping":`+mapping(writersNone)+`}`, sealed),
		"lease 0":                  with(`{"mapping":`+mapping(writersNone)+`,"lease":0}`, sealed),
		"a negative lease":         with(`{"mapping":`+mapping(writersNone)+`,"lease":-1}`, sealed),
		"a lease of 2^64":          with(`{"mapping":`+mapping(writersNone)+`,"lease":18446744073709551616}`, sealed),
		"no mapping":               with(`{"lease":9}`, sealed),
		"a mapping of null":        with(`{"mapping":null,"lease":9}`, sealed),
		"a mapping that is a text": with(`{"mapping":"x","lease":9}`, sealed),
		"null":                     with(`null`, sealed),
		"a list":                   with(`[]`, sealed),
		"deep":                     raw(append(okHeader(2, uint32(len(deep))), deep...)...),
		"deep inside":              raw(append(okHeader(2, uint32(len(inside))), inside...)...),
		"half an object":           raw(append(okHeader(2, 1), '{')...),
		"no UTF-8":                 raw(append(okHeader(2, 5), '{', '"', 0xff, '"', '}')...),
		"an empty body":            raw(okHeader(2, 0)...),
		"half a header":            raw(okHeader(2, 0)[:headerBytes/2]...),
		"an empty packet":          raw(),
		"a body that is missing":   raw(okHeader(2, 7)...),
		"a body of 4 GiB":          raw(append(okHeader(2, 1<<32-1), '{', '}')...),
		"a frame that is too long": raw(append(okHeader(2, bodyBytesMax+1), make([]byte, bodyBytesMax+1)...)...),
		"another's sequence":       raw(append(okHeader(7, 2), '{', '}')...),
		"sequence 0":               raw(append(okHeader(0, 2), '{', '}')...),
		"the greeting once more":   func(p *peer, asked packet) { p.send(opWelcome, asked.sequence, good) },
		"an op for hosts":          func(p *peer, asked packet) { p.send(opMap, asked.sequence, good) },
		"a chunk":                  func(p *peer, asked packet) { p.send(64, asked.sequence, `{}`) },
		"a push that is none":      func(p *peer, _ packet) { p.send(opGone, 0, `{"lease":"x"}`) },
		"an error that is none":    func(p *peer, asked packet) { p.send(opError, asked.sequence, `[]`) },
		"the end":                  func(p *peer, _ packet) { p.socket.Close() },
	} {
		leavesNothing(t, name, func(t *testing.T) {
			c, p := scripted(t)
			go func() {
				answer(p, p.receive())
				p.drain()
			}()
			x, err := c.Fetch(context.Background(), "x")
			if err == nil {
				t.Error("taken:", x.Mapping())
			}
			if stats := c.ClientStats(); stats.Mappings != 0 {
				t.Error(stats)
			}
			// What was refused is refused for good, and what ended has ended.
			if end := c.conn.end(); end != nil && !errors.Is(end, ErrProtocol) && !errors.Is(end, ErrDisconnected) {
				t.Error(end)
			}
		})
	}
}

func TestLiesAboutWhatWasMadeAreErrors(t *testing.T) {
	for name, example := range map[string]struct {
		body string
		file string
	}{
		"another type":       {granted(writersAnyone, "float64", "int64"), writersAnyone},
		"another shape":      {granted(writersAnyone, "[2,3]", "[3,2]"), writersAnyone},
		"another name":       {granted(writersAnyone, `"x"`, `"y"`), writersAnyone},
		"one too few":        {`{"mapping":{"strait-mmap":1,"bytes":131072,"writers":"anyone","tensors":[]},"lease":9}`, writersAnyone},
		"one too many":       {granted(writersAnyone, `[{`, `[{"name":"z","dtype":"int8","shape":[],"offset":0,"length":1},{`), writersAnyone},
		"nobody can write":   {granted(writersAnyone, "", ""), writersNone},
		"only those who did": {granted(writersAnyone, "", ""), writersCreator},
	} {
		leavesNothing(t, name, func(t *testing.T) {
			c, p := scripted(t)
			go func() {
				file, _ := p.memory(example.file)
				p.send(opOK, p.receive().sequence, example.body, int(file.Fd()))
				p.drain()
			}()
			if made, err := c.Create(context.Background(), Spec{"x", Float64, []int{2, 3}}); err == nil {
				t.Error("taken:", made[0].Mapping())
			}
			if stats := c.ClientStats(); stats.Mappings != 0 {
				t.Error(stats)
			}
		})
	}
}

func TestLiesAboutResultsAreErrors(t *testing.T) {
	result := func(port, more string) string {
		return `{"port":"` + port + `","mapping":` + strings.Replace(mapping(writersHost), `"x"`, `"`+port+`"`, 1) + `,"expires_ms":60000` + more + `}`
	}
	for name, example := range map[string]struct {
		results []string
		files   int
	}{
		"no descriptor":         {[]string{result("y", `,"lease":9,"fd":0`)}, 0},
		"the next descriptor":   {[]string{result("y", `,"lease":9,"fd":1`)}, 1},
		"a negative descriptor": {[]string{result("y", `,"lease":9,"fd":-1`)}, 1},
		"no index":              {[]string{result("y", `,"lease":9`)}, 1},
		"an index of 2^64":      {[]string{result("y", `,"lease":9,"fd":18446744073709551616`)}, 1},
		"one index twice":       {[]string{result("y", `,"lease":9,"fd":0`), result("z", `,"lease":10,"fd":0`)}, 2},
		"a second one is bad":   {[]string{result("y", `,"lease":9,"fd":0`), strings.Replace(result("z", `,"lease":10,"fd":1`), ":48", ":49", 1)}, 2},
		"another port's":        {[]string{strings.Replace(result("y", `,"lease":9,"fd":0`), `"port":"y"`, `"port":"z"`, 1)}, 1},
		"no tensor":             {[]string{`{"port":"y","mapping":{"strait-mmap":1,"bytes":131072,"writers":"host","tensors":[]},"lease":9,"fd":0}`}, 1},
		"results that are none": {[]string{`7`}, 1},
	} {
		leavesNothing(t, name, func(t *testing.T) {
			c, p := scripted(t)
			released := make(chan struct{})
			go func() {
				defer close(released)
				var fds []int
				for range example.files {
					file, _ := p.memory(writersCreator)
					fds = append(fds, int(file.Fd()))
				}
				p.send(opOK, p.receive().sequence, `{"results":[`+strings.Join(example.results, ",")+`]}`, fds...)
				p.drain()
			}()
			if res, err := c.Call(context.Background(), "k", nil); err == nil {
				t.Error("taken:", res.Tensors)
			}
			if stats := c.ClientStats(); stats.Mappings != 0 {
				t.Error(stats)
			}
			c.Close()
			<-released
		})
	}
}

// everyRequest is one of each kind.
var everyRequest = map[string]func(context.Context, *Client) error{
	"create": func(ctx context.Context, c *Client) error { _, err := NewTensor[int8](ctx, c, 3); return err },
	"copy": func(ctx context.Context, c *Client) error {
		_, err := c.Call(ctx, "k", Inputs{"x": Scalar(1)})
		return err
	},
	"fetch":   func(ctx context.Context, c *Client) error { _, err := c.Fetch(ctx, "x"); return err },
	"call":    func(ctx context.Context, c *Client) error { _, err := c.Call(ctx, "k", nil); return err },
	"publish": func(ctx context.Context, c *Client) error { _, err := c.Publish(ctx, "x", Scalar(1)); return err },
	"lookup":  func(ctx context.Context, c *Client) error { _, err := c.Lookup(ctx, "x"); return err },
	"list":    func(ctx context.Context, c *Client) error { _, err := c.List(ctx); return err },
	"kernels": func(ctx context.Context, c *Client) error { _, err := c.Kernels(ctx); return err },
	"stats":   func(ctx context.Context, c *Client) error { _, err := c.Stats(ctx); return err },
	"delete":  func(ctx context.Context, c *Client) error { return c.Delete(ctx, "x") },
	"ping":    func(ctx context.Context, c *Client) error { return c.Ping(ctx) },
	"adopt": func(ctx context.Context, c *Client) error {
		file, err := shm.NewFile("own")
		if err != nil {
			return err
		}
		defer file.Close()
		_, err = c.Adopt(ctx, file, nil, "")
		return err
	},
}

func TestTheEndComesAtEveryStep(t *testing.T) {
	leavesNothing(t, "greeting", func(t *testing.T) {
		near, far := unixPair(t)
		far.Close()
		if _, err := greet(context.Background(), near, nil); !errors.Is(err, ErrDisconnected) {
			t.Error(err)
		}
	})
	for name, ask := range everyRequest {
		leavesNothing(t, name, func(t *testing.T) {
			c, p := scripted(t)
			go func() {
				p.receive()
				p.socket.Close()
			}()
			if err := ask(context.Background(), c); !errors.Is(err, ErrDisconnected) {
				t.Error(err)
			}
			if err := ask(context.Background(), c); !errors.Is(err, ErrDisconnected) {
				t.Error("afterwards:", err)
			}
		})
	}
}

func TestNonsenseAnswersEveryRequest(t *testing.T) {
	for name, ask := range everyRequest {
		for _, body := range []string{`[]`, `7`, `"x"`, `{"mapping":[],"flights":{},"kernels":1,"results":"x","lease":"9"}`} {
			leavesNothing(t, name+" "+body, func(t *testing.T) {
				c, p := scripted(t)
				go func() {
					file, _ := p.memory(writersNone)
					p.send(opOK, p.receive().sequence, body, int(file.Fd()))
					p.drain()
				}()
				err := ask(context.Background(), c)
				// A reply without anything to read is only looked at for being one.
				if quiet := name == "ping" || name == "delete" || name == "stats" && strings.HasPrefix(body, "{"); err == nil && !quiet {
					t.Error("taken")
				}
				if stats := c.ClientStats(); stats.Mappings != 0 {
					t.Error(stats)
				}
			})
		}
	}
}

func TestPagesThatNeverEnd(t *testing.T) {
	for name, page := range map[string]string{
		"list":    `{"flights":[{"name":"a"}],"more":true}`,
		"kernels": `{"kernels":[{"name":"a","plugin":"p"}],"more":true}`,
	} {
		leavesNothing(t, name, func(t *testing.T) {
			c, p := scripted(t)
			go func() {
				for range 2 {
					p.send(opOK, p.receive().sequence, page)
				}
			}()
			if err := everyRequest[name](context.Background(), c); !errors.Is(err, ErrProtocol) {
				t.Error(err)
			}
		})
	}
}

func TestPushesAboutNothingAreHarmless(t *testing.T) {
	leavesNothing(t, "pushes", func(t *testing.T) {
		c, p := scripted(t)
		file, _ := p.memory(writersNone)
		go func() {
			p.send(opShutdown, 0, `{"drain_ms":9223372036854775807}`)
			for lease := range 3 * earlyGoneMax {
				p.send(opGone, 0, fmt.Sprintf(`{"lease":%d,"segment":7,"reason":"so"}`, uint64(lease)<<40), int(file.Fd()))
			}
			p.send(opOK, p.receive().sequence, `{}`, int(file.Fd()), int(file.Fd()))
		}()
		if err := c.Ping(context.Background()); err != nil {
			t.Error(err)
		}
		if end, draining := c.Draining(); !draining || end.Before(time.Now()) {
			t.Error(end, draining)
		}
	})
}

func TestLivesOfAnyLength(t *testing.T) {
	for _, life := range []string{"-9223372036854775808", "0", "9223372036854775807"} {
		leavesNothing(t, life, func(t *testing.T) {
			c, p := scripted(t)
			released := make(chan struct{})
			go func() {
				defer close(released)
				file, _ := p.memory(writersNone)
				p.send(opOK, p.receive().sequence, `{"mapping":`+mapping(writersNone)+`,"lease":3,"expires_ms":`+life+`}`, int(file.Fd()))
				for {
					switch asked := p.receive(); asked.op {
					case opRenew:
						p.send(opOK, asked.sequence, `{"expires_ms":`+life+`}`)
					case opRelease:
						p.send(opOK, asked.sequence, `{}`)
						return
					}
				}
			}()
			x, err := c.Fetch(context.Background(), "x")
			if err != nil {
				t.Fatal(err)
			}
			if granted, err := x.Renew(context.Background(), time.Minute); err != nil || granted < 0 {
				t.Error(granted, err)
			}
			x.Release()
			<-released
		})
	}
}

func TestAProcessThatMayOpenNoMore(t *testing.T) {
	c, p := scripted(t)
	file, _ := p.memory(writersNone)
	go func() {
		for maps := 0; maps < 2; {
			asked := p.receive()
			if asked.op == opMap {
				maps++
				p.send(opOK, asked.sequence, granted(writersNone, "", ""), int(file.Fd()))
			} else {
				p.send(opOK, asked.sequence, `{}`)
			}
		}
		p.drain()
	}()
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	none := limit
	none.Cur = 3
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &none); err != nil {
		t.Fatal(err)
	}
	_, err := c.Fetch(context.Background(), "x")
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if !errors.Is(err, unix.EMFILE) || !strings.Contains(err.Error(), "ulimit -n") {
		t.Error(err)
	}
	x, err := c.Fetch(context.Background(), "x")
	if err != nil {
		t.Fatal("the connection was to stay:", err)
	}
	x.Release()
}

func TestAChildInheritsNothing(t *testing.T) {
	c, ctx := dial(t), context.Background()
	x := must[TensorOf[int8]](t)(NewTensor[int8](ctx, c, 3))
	defer x.Release()
	must[Flight](t)(c.Publish(ctx, "go child", Slice([]int8{1})))
	defer c.Delete(ctx, "go child")
	y := must[*Tensor](t)(c.Fetch(ctx, "go child"))
	defer y.Release()
	seen := must[[]byte](t)(exec.Command("sh", "-c", "ls -l /proc/self/fd; cat /proc/self/maps").Output())
	for _, word := range []string{"memfd", "socket"} {
		if strings.Contains(string(seen), word) {
			t.Errorf("a child has a %s:\n%s", word, seen)
		}
	}
}

func TestAMappingIsTheCallersOwn(t *testing.T) {
	c, ctx := dial(t), context.Background()
	x := must[TensorOf[int8]](t)(NewTensor[int8](ctx, c, 3))
	defer x.Release()
	said := x.Mapping()
	said.Tensors[0].Offset, said.Tensors[0].Length, said.Tensors[0].Shape[0] = 1<<40, 1<<40, 1<<40
	if len(x.Data()) != 3 || x.Shape()[0] != 3 {
		t.Error("changed from outside:", x.Mapping())
	}
}

func TestReleaseMeetsEveryUse(t *testing.T) {
	address, _ := hosttest.Start(t)
	c, ctx := dialAt(t, address), context.Background()
	for range 20 {
		x := must[TensorOf[float64]](t)(NewTensor[float64](ctx, c, 1000))
		var group sync.WaitGroup
		for name, use := range map[string]func() error{
			"view":    func() error { return x.View(func(bytes []byte) error { _ = bytes[7999]; return nil }) },
			"read":    func() error { _, err := x.ReadFrom(strings.NewReader(strings.Repeat("x", 8000))); return err },
			"renew":   func() error { _, err := x.Renew(ctx, time.Minute); return err },
			"err":     x.Err,
			"shape":   func() error { _, _, _ = x.Shape(), x.Writable(), x.Mapping(); return nil },
			"release": func() error { x.Release(); return nil },
			"call": func() error {
				res, err := c.Call(ctx, "scale-shift", Inputs{"x": x})
				res.Release()
				return err
			},
			"publish": func() error { _, err := c.Publish(ctx, "go raced", x, Replace()); return err },
		} {
			group.Go(func() {
				for range 5 {
					err := use()
					allowed := err == nil || errors.Is(err, ErrReleased) || errors.Is(err, ErrReadOnly) || errors.Is(err, ErrLeaseExpired) ||
						name == "publish" && errors.Is(err, ErrArgument)
					if !allowed {
						t.Error(name, err)
					}
				}
			})
		}
		group.Wait()
	}
	if stats := c.ClientStats(); stats.Mappings != 0 {
		t.Error(stats)
	}
}
