// Command vm runs a program in a small virtual machine; see package vm.
//
//	go test -exec "$PWD/bin/vm -kernel stable" ./mount
//
// Its exit status is the program's; 124 if the time was up, 125 if there is no
// kernel or the guest died.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/layerctl/layerctl/internal/testenv/vm"
)

const (
	exitTimeout = 124
	exitNoGuest = 125
)

func main() {
	vm.Init() // does not return in the guest
	o := options()
	status, err := run(o)
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		fmt.Fprintf(os.Stderr, "vm: %v (-timeout %v)\n", err, o.timeout)
		os.Exit(exitTimeout)
	case err != nil:
		fmt.Fprintln(os.Stderr, err)
		os.Exit(exitNoGuest)
	}
	os.Exit(status)
}

type flags struct {
	kernel, cache, disks, share string
	memory                      int64
	timeout                     time.Duration
	install                     bool
}

func options() *flags {
	o := &flags{}
	flag.StringVar(&o.kernel, "kernel", "new", "which kernel: new or stable")
	flag.StringVar(&o.cache, "cache", vm.CacheDir(), "`directory` that kernels are kept in")
	flag.StringVar(&o.disks, "disks", "", "`files` that the guest has as /dev/ubda, /dev/ubdb, ...; with commas between")
	flag.StringVar(&o.share, "share", "", "`directories` that the guest can write to, with commas between")
	flag.Int64Var(&o.memory, "memory", 2048, "the guest's memory in `MiB`")
	flag.DurationVar(&o.timeout, "timeout", 15*time.Minute, "after it the guest is killed")
	flag.BoolVar(&o.install, "install", false, "only fetch the kernel if it is not there, and say which it is")
	flag.Parse()
	return o
}

func run(o *flags) (int, error) {
	kernel, err := vm.Install(o.cache, o.kernel)
	if err != nil {
		return 0, err
	}
	if o.install {
		fmt.Printf("vm: kernel %s: %s\n", o.kernel, kernel)
		return 0, nil
	}
	c := vm.Config{Kernel: kernel, Argv: flag.Args(), Env: os.Environ(), Disks: list(o.disks), Share: list(o.share),
		Memory: o.memory << 20, Stdout: os.Stdout, Stderr: os.Stderr}
	if len(c.Argv) == 0 {
		return 0, errors.New("vm: no program to run")
	}
	if c.Init, err = os.Executable(); err != nil {
		return 0, err
	}
	if c.Dir, err = os.Getwd(); err != nil {
		return 0, err
	}
	if strings.HasSuffix(c.Argv[0], ".test") { // a test binary, beside which go test wants its log
		c.Share = append(c.Share, filepath.Dir(c.Argv[0]))
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT, syscall.SIGHUP)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	return vm.Run(ctx, c)
}

func list(s string) []string {
	if s == "" {
		return nil
	}
	return strings.Split(s, ",")
}
