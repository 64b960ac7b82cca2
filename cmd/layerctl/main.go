// Command layerctl keeps layers of file systems: it imports trees and images,
// mounts them, shows what changed, freezes that as new layers and writes them
// out again. This package is flags and wiring; what it does lives in packages
// snapshot, image, layer and mount.
//
// Exit codes: 0 done; 1 an error, or findings of check; 2 wrong usage; 130
// interrupted; of unshare, the command's own.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/containerd/log"

	"github.com/layerctl/layerctl/internal/userns"
)

// The exit codes.
const (
	exitOK          = 0
	exitError       = 1
	exitUsage       = 2
	exitInterrupted = 130
)

// version is set by the linker.
var version = "unknown"

func main() {
	userns.Init()
	os.Exit(run(os.Args[1:]))
}

// run is the program: it returns the exit code.
func run(args []string) int {
	ctx, stop := interruptible()
	defer stop()
	_ = log.SetLevel("error") // of libraries: what matters comes back as an error
	a := newApp()
	cmd := a.command()
	cmd.SetArgs(args)
	err := cmd.ExecuteContext(ctx)
	if cerr := a.Close(); err == nil {
		err = cerr
	}
	return a.report(ctx, err)
}

var (
	errInterrupted = errors.New("interrupted")
	// errFeeder: who reads for us outside of the namespaces failed, and says why.
	errFeeder = errors.New("input failed")
)

// oneSignal is how long a signal is taken for the first one come twice: who
// signals a process and its group (timeout(1) does), sends it two.
const oneSignal = time.Second

// interruptible returns a context that the first SIGINT, SIGTERM or SIGHUP
// ends; the verbs then remove what is half-made. The second ends the program,
// and the next opening of the store cleans up.
func interruptible() (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(context.Background())
	sigs := make(chan os.Signal, 4)
	signal.Notify(sigs, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGUSR1)
	go func() {
		var asked time.Time
		for s := range sigs {
			switch {
			case s == syscall.SIGUSR1:
				cancel(errFeeder)
			case !asked.IsZero() && time.Since(asked) < oneSignal:
			case !asked.IsZero():
				os.Exit(exitInterrupted)
			default:
				asked = time.Now()
				if !userns.Needed() { // else the one inside says so
					fmt.Fprintf(os.Stderr, "layerctl: %v: removing what is half-made; again to stop at once\n", s)
				}
				cancel(errInterrupted)
			}
		}
	}()
	return ctx, func() { signal.Stop(sigs); close(sigs); cancel(nil) }
}
