package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
)

// usageError is a command line that makes no sense.
type usageError struct {
	cmd *cobra.Command
	err error
}

func (e usageError) Error() string { return e.err.Error() }
func (e usageError) Unwrap() error { return e.err }

// exitStatus ends the program with a code and no message.
type exitStatus int

func (e exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// hinted is an error that knows what to do about it.
type hinted struct {
	err  error
	hint string
}

func (e hinted) Error() string { return e.err.Error() }
func (e hinted) Unwrap() error { return e.err }

// hintf adds what to do to an error.
func hintf(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return hinted{err, fmt.Sprintf(format, args...)}
}

// report prints err on standard error and returns the exit code.
func (a *app) report(ctx context.Context, err error) int {
	var status exitStatus
	var usage usageError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &status):
		return int(status)
	case context.Cause(ctx) == errFeeder:
		return exitError
	case context.Cause(ctx) == errInterrupted && errors.Is(err, context.Canceled) || errors.Is(err, errInterrupted):
		fmt.Fprintln(a.err, "layerctl: interrupted")
		return exitInterrupted
	case errors.As(err, &usage):
		fmt.Fprintf(a.err, "layerctl: %v\nusage: %s\n", err, strings.TrimSpace(usage.cmd.UseLine()))
		return exitUsage
	}
	for line := range strings.Lines(withHint(err)) { // several errors stand on a line each
		fmt.Fprintf(a.err, "layerctl: %s\n", strings.TrimSuffix(line, "\n"))
	}
	return exitError
}

// withHint returns the error's text and what to do about it, if that is known.
func withHint(err error) string {
	text, hint := err.Error(), hint(err)
	if hint == "" || strings.Contains(text, hint) {
		return text
	}
	return text + ": " + hint
}

// hint says what to do about an error, from what it wraps.
func hint(err error) string {
	var h hinted
	switch {
	case errors.As(err, &h):
		return h.hint
	case limitHint(err) != "":
		return limitHint(err)
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return "make room (`layerctl rm`, `layerctl gc`) and try again"
	case errors.Is(err, syscall.EROFS):
		return "the file system is read-only; choose another --root"
	case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
		return "not permitted; is --root yours?"
	case errdefs.IsDataLoss(err):
		return "the data are damaged; get them again, or see `layerctl check`"
	}
	return ""
}
