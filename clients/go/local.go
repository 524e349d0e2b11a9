package strait

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	// What a host may take to become ready, where the context sets no deadline.
	localStart = 60 * time.Second
	// For so long a program that is not wanted may take to end after its stdin has.
	localEnd = 3 * time.Second
	// After the end of a connection the end of the host's process is not far, if it has one.
	localDeath = time.Second
	// Longest ready line, and what is shown of one that is wrong and of stderr's end.
	localLineMax  = 64 << 10
	localShown    = 200
	localTailSize = 2 << 10
)

// LocalOption changes the host that Local starts: Plugin, Setting. Every DialOption is one, too, and
// changes the client.
type LocalOption interface {
	local(*localOptions)
}

type localOptions struct {
	plugins  []string
	settings map[string]string
	dial     []DialOption
}

type localOption func(*localOptions)

func (o localOption) local(l *localOptions) { o(l) }
func (o DialOption) local(l *localOptions)  { l.dial = append(l.dial, o) }

// Plugin has the host load this file beside the standard plugin.
func Plugin(path string) LocalOption {
	return localOption(func(l *localOptions) { l.plugins = append(l.plugins, path) })
}

// Setting is one of docs/operations.md: Setting("limits.deadline_ms_default", "5000"). Those of the
// environment (STRAIT__SECTION__KEY) hold, too.
func Setting(key, value string) LocalOption {
	return localOption(func(l *localOptions) { l.settings[key] = value })
}

// Local connects to a host of this program's own, which is started if it is not running yet. It is
// private to the program and ends with it, however that ends.
//
// Calls with the same plugins and settings share one host: what one client publishes, the others see.
// Other plugins or settings, or a plugin's file that has changed, are another host's. Close ends the
// client, not the host. A host that has died is succeeded by a new, empty one in the next call.
//
// The host's program is $STRAIT_BIN, else strait on the PATH. ctx is for starting and dialling; without
// a deadline the host has a minute to become ready.
//
// The error is ErrNoHost if there is no such program or it does not become a host of this client's
// protocol, with the end of what it wrote to stderr, and ErrArgument for a plugin or setting that
// cannot be one.
func Local(ctx context.Context, options ...LocalOption) (*Client, error) {
	o := localOptions{settings: map[string]string{}}
	for _, option := range options {
		option.local(&o)
	}
	arguments, key, err := o.plugged()
	if err != nil {
		return nil, err
	}
	environment, err := o.environment()
	if err != nil {
		return nil, err
	}
	key = append(key, environment...)
	host, err := localHosts.of(strings.Join(key, "\x00")).running(ctx, arguments, environment)
	if err != nil {
		return nil, err
	}
	dying := DialOption(func(o *dialOptions) { o.epitaph = host.epitaph })
	return Dial(ctx, "unix://"+host.directory, append(o.dial, dying)...)
}

// plugged is the host's options for the plugins, and what tells these from others and from other
// versions of themselves.
func (o *localOptions) plugged() (arguments, key []string, err error) {
	for _, plugin := range o.plugins {
		path, err := filepath.Abs(plugin)
		if err != nil {
			return nil, nil, argumentError("plugin %s: %w", plugin, err)
		}
		info, err := os.Stat(path)
		if err != nil {
			return nil, nil, argumentError("plugin %s: %w", plugin, err)
		}
		arguments = append(arguments, "--plugin", path)
		inode := info.Sys().(*syscall.Stat_t).Ino
		key = append(key, fmt.Sprint(path, inode, info.Size(), info.ModTime().UnixNano()))
	}
	return arguments, key, nil
}

var isSetting = regexp.MustCompile(`^[a-z]+\.[a-z_]+$`).MatchString

// environment is the settings as the host's environment has them, sorted.
func (o *localOptions) environment() ([]string, error) {
	var environment []string
	for key, value := range o.settings {
		if !isSetting(key) {
			return nil, argumentError("setting %q is not of the form \"section.key\", such as \"limits.deadline_ms_default\"", key)
		}
		if slices.Contains([]string{"server.directory", "server.tcp", "server.plugins"}, key) {
			return nil, argumentError("setting %q is not for a local host, which has a directory of its own and takes Plugin", key)
		}
		name := "STRAIT__" + strings.ToUpper(strings.ReplaceAll(key, ".", "__"))
		environment = append(environment, name+"="+value)
	}
	slices.Sort(environment)
	return environment, nil
}

// hosts are those that this program started, by what tells them apart.
type hosts struct {
	mu    sync.Mutex
	byKey map[string]*localHost
}

var localHosts = hosts{byKey: map[string]*localHost{}}

func (h *hosts) of(key string) *localHost {
	h.mu.Lock()
	defer h.mu.Unlock()
	host, known := h.byKey[key]
	if !known {
		host = &localHost{starting: make(chan struct{}, 1)}
		h.byKey[key] = host
	}
	return host
}

// localHost is started when it is asked for and not running.
type localHost struct {
	// Held to look at the process and to start one. A channel, so that a context can end the wait for it.
	starting chan struct{}
	process  *hostProcess
}

func (h *localHost) running(ctx context.Context, arguments, environment []string) (*hostProcess, error) {
	select {
	case h.starting <- struct{}{}:
		defer func() { <-h.starting }()
	case <-ctx.Done():
		return nil, ended(ctx)
	}
	if h.process != nil && h.process.isAlive() {
		return h.process, nil
	}
	if h.process != nil {
		// Nobody reads it any more; its clients may still quote the end of its stderr.
		h.process.last()
		h.process.close()
	}
	process, err := startHost(ctx, arguments, environment)
	if err != nil {
		return nil, err
	}
	h.process = process
	return process, nil
}

// hostProcess is a host from its start on.
//
// It ends when its stdin does. Linux closes the other end whatever this program dies of, and no other
// process has it: it is closed on exec.
type hostProcess struct {
	name      string
	directory string
	command   *exec.Cmd
	stdin     *os.File
	stdout    *os.File
	// Unlinked: it is gone with the last process that has it open.
	stderr *os.File
	// Closed once the process has ended and nothing is left of it.
	ended chan struct{}
	// The end of stderr, once it has ended.
	last func() string
}

func startHost(ctx context.Context, arguments, environment []string) (*hostProcess, error) {
	program, source, err := hostProgram()
	if err != nil {
		return nil, err
	}
	p := &hostProcess{name: program + " (" + source + ")", ended: make(chan struct{})}
	p.last = sync.OnceValue(p.tail)
	p.command = exec.Command(program, append([]string{
		"serve", "--temporary", "--until-stdin-ends", "--json", "--log-level", "warn"}, arguments...)...)
	p.command.Env = append(os.Environ(), environment...)
	// A Ctrl-C is for this program: the host must live to tell it what became of its calls.
	p.command.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := p.start(); err != nil {
		return nil, fmt.Errorf("strait: %w: %s cannot be started: %w", ErrNoHost, p.name, err)
	}
	// Takes note of its end at once, so that nothing is left of a host that dies early.
	go func() {
		// How it ended is in ProcessState.
		_ = p.command.Wait()
		close(p.ended)
	}()
	if err := p.becomeReady(ctx); err != nil {
		p.kill()
		return nil, err
	}
	return p, nil
}

// start leaves nothing open if it fails.
func (p *hostProcess) start() error {
	var theirs []*os.File
	defer func() {
		for _, file := range theirs {
			_ = file.Close()
		}
	}()
	stdin, ours, err := os.Pipe()
	if err != nil {
		return err
	}
	theirs, p.stdin = append(theirs, stdin), ours
	ours, stdout, err := os.Pipe()
	if err == nil {
		theirs, p.stdout = append(theirs, stdout), ours
		p.stderr, err = unlinked()
	}
	if err == nil {
		p.command.Stdin, p.command.Stdout, p.command.Stderr = stdin, stdout, p.stderr
		err = p.command.Start()
	}
	if err != nil {
		p.close()
	}
	return err
}

func unlinked() (*os.File, error) {
	file, err := os.CreateTemp("", "strait-stderr-")
	if err != nil {
		return nil, err
	}
	return file, os.Remove(file.Name())
}

func (p *hostProcess) close() {
	for _, file := range []*os.File{p.stdin, p.stdout, p.stderr} {
		if file != nil {
			_ = file.Close()
		}
	}
}

// kill ends one that is not ready.
func (p *hostProcess) kill() {
	_ = p.stdin.Close()
	// A real host removes its directory.
	if !p.endsWithin(localEnd) {
		// With whatever it started: it has a process group of its own.
		_ = syscall.Kill(-p.command.Process.Pid, syscall.SIGKILL)
		<-p.ended
	}
	p.close()
}

func (p *hostProcess) isAlive() bool { return !p.endsWithin(0) }

func (p *hostProcess) endsWithin(patience time.Duration) bool {
	select {
	case <-p.ended:
		return true
	default:
	}
	select {
	case <-p.ended:
		return true
	case <-time.After(patience):
		return false
	}
}

// becomeReady waits for the line that says that it is, which has its directory.
func (p *hostProcess) becomeReady(ctx context.Context) error {
	began := time.Now()
	if _, limited := ctx.Deadline(); !limited {
		var stop context.CancelFunc
		ctx, stop = context.WithTimeout(ctx, localStart)
		defer stop()
	}
	stop := context.AfterFunc(ctx, func() { _ = p.stdout.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	line, err := bufio.NewReaderSize(p.stdout, localLineMax).ReadSlice('\n')
	_ = p.stdout.Close()
	line = bytes.TrimSuffix(line, []byte("\n"))
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("strait: %w: %s was not ready within %.1f s; a context with a later deadline waits longer%s: %w",
			ErrNoHost, p.name, time.Since(began).Seconds(), p.tail(), ended(ctx))
	}
	var ready struct {
		Version  string          `json:"version"`
		Protocol int             `json:"protocol"`
		Address  string          `json:"address"`
		Error    json.RawMessage `json:"error"`
	}
	parsed := json.Unmarshal(line, &ready) == nil
	directory, isAddress := strings.CutPrefix(ready.Address, "unix://")
	if parsed && isAddress && strings.HasPrefix(directory, "/") && ready.Protocol != 0 {
		if ready.Protocol != protocolVersion {
			return fmt.Errorf("strait: %w: %s is strait %s and speaks protocol %d, this client, %s, protocol %d; use versions that belong "+
				"together: install the same one of both, or name its program in STRAIT_BIN",
				ErrNoHost, p.name, ready.Version, ready.Protocol, Version, protocolVersion)
		}
		p.directory = directory
		return nil
	}
	said := ""
	if len(line) > 0 && (!parsed || ready.Error == nil) {
		said = fmt.Sprintf("; it said %q", line[:min(len(line), localShown)])
	}
	if !p.endsWithin(localDeath) {
		return fmt.Errorf("strait: %w: %s does not say that it is ready as strait %s does%s; name the right program in STRAIT_BIN%s",
			ErrNoHost, p.name, Version, said, p.tail())
	}
	return fmt.Errorf("strait: %w: %s started no host: it %s%s%s", ErrNoHost, p.name, p.how(), said, p.tail())
}

// how it ended.
func (p *hostProcess) how() string {
	if status, ok := p.command.ProcessState.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return "was ended by a signal: " + status.Signal().String()
	}
	return fmt.Sprintf("ended with exit code %d", p.command.ProcessState.ExitCode())
}

// tail is the end of what it has written to stderr.
func (p *hostProcess) tail() string {
	info, err := p.stderr.Stat()
	if err != nil || info.Size() == 0 {
		return "; it wrote nothing to stderr"
	}
	start := max(0, info.Size()-localTailSize)
	text := make([]byte, info.Size()-start)
	n, _ := p.stderr.ReadAt(text, start)
	cut := ""
	if start > 0 {
		cut = "..."
	}
	return "; its stderr ends with:\n" + cut + strings.TrimSpace(strings.ToValidUTF8(string(text[:n]), "\uFFFD"))
}

// epitaph is how the host died, if it did.
func (p *hostProcess) epitaph() string {
	if !p.endsWithin(localDeath) {
		return ""
	}
	return fmt.Sprintf("; the host, %s, %s%s", p.name, p.how(), p.last())
}

// hostProgram is the host's program, and where it was found.
func hostProgram() (program, source string, err error) {
	if named := os.Getenv("STRAIT_BIN"); named != "" {
		program, err := exec.LookPath(named)
		if err != nil {
			return "", "", fmt.Errorf("strait: %w: STRAIT_BIN names %s, which is not a program that can be run (%w); name the `strait` "+
				"program, or unset it", ErrNoHost, named, err)
		}
		return program, "from STRAIT_BIN", nil
	}
	program, err = exec.LookPath("strait")
	if err != nil {
		return "", "", fmt.Errorf("strait: %w: there is no `strait` program on the PATH to start a host with; build it in strait's checkout "+
			"(cargo install --path .), or name it in STRAIT_BIN", ErrNoHost)
	}
	return program, "from the PATH", nil
}
