package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// envReady names the descriptor by which the server in the background says that
// the mount is up, or why it is not.
const envReady = "FUSE_LAYERFS_READY"

const up = "up"

// readiness is the server's end of that descriptor; a nil one tells nobody.
type readiness struct{ f *os.File }

// readyPipe returns it in the server, and whether this process is that.
func readyPipe() (*readiness, bool) {
	n, err := strconv.ParseUint(os.Getenv(envReady), 10, 31)
	if err != nil {
		return nil, false
	}
	os.Unsetenv(envReady)
	f := sys.NewFd(int(n), "ready")
	_ = f.SetCloexec()
	return &readiness{f.File()}, true
}

// tell says what there is to say, once; false if nobody listens.
func (r *readiness) tell(what string) bool {
	if r == nil || r.f == nil {
		return false
	}
	_, err := io.WriteString(r.f, what)
	r.f.Close()
	r.f = nil
	return err == nil
}

// daemonize runs the program again in the background and waits until its mount
// is up. Go cannot fork, so nothing is opened before.
func daemonize(args []string, c *commandLine) error {
	read, write, err := os.Pipe()
	if err != nil {
		return err
	}
	defer read.Close()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	files := []*os.File{null, null, null, write}
	at := len(files) - 1
	if n, ok := inherited(c.target); ok { // it keeps its number
		dev := os.NewFile(uintptr(n), c.target)
		for len(files) <= n {
			files = append(files, nil)
		}
		if n == at {
			files = append(files, write)
			at = len(files) - 1
		}
		files[n] = dev
	}
	env := append(os.Environ(), envReady+"="+strconv.Itoa(at))
	p, err := os.StartProcess(executable(), append([]string{name}, args...),
		&os.ProcAttr{Env: env, Files: files, Sys: &syscall.SysProcAttr{Setsid: true}})
	write.Close()
	if err != nil {
		return err
	}
	said, err := io.ReadAll(io.LimitReader(read, 1<<16))
	switch {
	case err != nil:
		return err
	case string(said) == up:
		return p.Release()
	case len(said) > 0:
		_, _ = p.Wait()
		return errors.New(string(said))
	}
	state, err := p.Wait()
	if err != nil {
		return err
	}
	return fmt.Errorf("the server ended before the mount was up: %v", state)
}

// executable is a path of this program that gives the process its right name in
// /proc, if there still is one.
func executable() string {
	if path, err := os.Executable(); err == nil && !strings.HasSuffix(path, " (deleted)") {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	return "/proc/self/exe"
}

// inherited reports whether the mountpoint is a descriptor.
func inherited(target string) (int, bool) {
	dir, n := filepath.Split(target)
	if dir != "/dev/fd/" {
		return 0, false
	}
	fd, err := strconv.ParseUint(n, 10, 31)
	return int(fd), err == nil
}
