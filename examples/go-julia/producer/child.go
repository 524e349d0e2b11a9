package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
)

// child is a process that answers each line on its standard input by a line of JSON on its standard output.
// Its end of input is its end.
type child struct {
	command *exec.Cmd
	input   io.WriteCloser
	output  *bufio.Reader
}

// startChild waits for the first line, which says that the child is ready.
func startChild(ctx context.Context, program string, arguments ...string) (*child, error) {
	c := &child{command: exec.CommandContext(ctx, program, arguments...)}
	c.command.Stderr = os.Stderr
	// It must not outlive this process, however this one ends.
	c.command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var err error
	if c.input, err = c.command.StdinPipe(); err != nil {
		return nil, err
	}
	output, err := c.command.StdoutPipe()
	if err != nil {
		return nil, err
	}
	c.output = bufio.NewReader(output)
	if err := c.command.Start(); err != nil {
		return nil, err
	}
	if err := c.answer(&struct{}{}); err != nil {
		c.stop(&err)
		return nil, err
	}
	return c, nil
}

// answer decodes the next line, which is one JSON object.
func (c *child) answer(into any) error {
	line, err := c.output.ReadBytes('\n')
	if err != nil {
		return fmt.Errorf("%s ended without an answer: %w", c.command.Path, err)
	}
	if err := json.Unmarshal(line, into); err != nil {
		return fmt.Errorf("%s answered %q: %w", c.command.Path, line, err)
	}
	return nil
}

func (c *child) ask(into any, words ...string) error {
	if _, err := io.WriteString(c.input, strings.Join(words, " ")+"\n"); err != nil {
		return fmt.Errorf("%s takes no more questions: %w", c.command.Path, err)
	}
	return c.answer(into)
}

// stop ends the child; if it fails, that is added to err.
func (c *child) stop(err *error) {
	_ = c.input.Close()
	if failed := c.command.Wait(); failed != nil {
		*err = errors.Join(*err, fmt.Errorf("%s: %w", c.command.Path, failed))
	}
}
