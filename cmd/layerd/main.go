// Command layerd serves a store as containerd's snapshotters and differ, on unix
// sockets: package snapshot/service over the drivers of the root package. This
// package is flags, configuration and wiring.
//
// Exit codes: 0 done; 1 an error; 2 wrong usage.
package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/containerd/log"
)

// The exit codes.
const (
	exitOK    = 0
	exitError = 1
	exitUsage = 2
)

// version is set by the linker.
var version = "unknown"

func main() { os.Exit(run(os.Args[1:])) }

// run is the program: it returns the exit code.
func run(args []string) int {
	_ = log.SetLevel("error") // of libraries: what matters comes back as an error
	cmd := newCommand()
	cmd.SetArgs(args)
	err := cmd.Execute()
	if err == nil {
		return exitOK
	}
	fmt.Fprintf(os.Stderr, "layerd: %v\n", err)
	var usage usageError
	if errors.As(err, &usage) {
		fmt.Fprintf(os.Stderr, "Try '%s --help'.\n", usage.command)
		return exitUsage
	}
	return exitError
}

// usageError is a command line that makes no sense.
type usageError struct {
	command string
	error
}

func (e usageError) Unwrap() error { return e.error }
