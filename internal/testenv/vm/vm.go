// Package vm runs programs in a small virtual machine whose kernel has what the
// host's may lack: device-mapper with thin pools, flakey and log-writes, project
// quota on ext4 and xfs, an older overlayfs.
//
// The machine is User Mode Linux: the kernel is an ordinary process, so that
// neither KVM nor root is needed. It is taken from Debian (see Kernel). The guest
// sees the host's root file system read-only; its /tmp, /var/tmp, /run, /mnt and
// /dev/shm are its own, in memory; directories that Config.Share names are those
// of the host, for writing, too. It has one processor.
//
// # Power cuts
//
// A guest that is killed (by the context of Run) leaves its disks as they are:
// what it has flushed is there, what it only had in memory is lost. Run again
// with the same disks is the reboot.
//
// # Life cycle
//
// Run starts Config.Init as the guest's first process; that program must call
// Init before all else. Init makes the guest ready, runs the command, hands its
// exit status back through a file that host and guest share, and powers off.
// The kernel and its helper processes are in a process group of their own,
// which Run kills in the end, or a small shell if Run's process is killed itself.
package vm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Config is one run.
type Config struct {
	Kernel Installed
	// Init is the program that calls Init, by its absolute path on the host.
	Init string
	// Argv is the command; Env and Dir are its environment and its working directory.
	Argv, Env []string
	Dir       string
	// Share are directories that the guest can write to. The others of the
	// host are read-only to it.
	Share []string
	// Disks are files that the guest has as /dev/ubda, /dev/ubdb, ...
	Disks []string
	// Memory of the guest in bytes; 0 means 2 GiB. The host pays for what is used.
	Memory int64
	// Stdout and Stderr get what the command writes.
	Stdout, Stderr io.Writer
}

// ErrDied says that the guest ended without an exit status: a crash of the
// kernel, an oops, a signal from outside.
var ErrDied = errors.New("vm: the guest died")

// task is what the host tells the guest.
type task struct {
	Argv, Env []string
	Dir       string
	Share     []string
	Modules   []string
}

const (
	envRun       = "LAYERCTL_GUEST" // the run's directory, on the guest's kernel command line
	taskFile     = "task"
	statusFile   = "status"
	defaultBytes = 2 << 30
)

// Run runs the command in a guest and returns its exit status, 128 and the
// signal's number if a signal ended it. When ctx ends, the guest is killed, as by
// a power cut, and the error is ctx's cause. Any other error wraps ErrDied, with
// the last words of the guest's kernel, or says what is wrong with c.
func Run(ctx context.Context, c Config) (status int, err error) {
	dir, err := os.MkdirTemp("", "vm")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	if err := writeTask(dir, c); err != nil {
		return 0, err
	}
	console, err := os.Create(filepath.Join(dir, "console"))
	if err != nil {
		return 0, err
	}
	defer console.Close()
	waitErr, err := boot(ctx, c, dir, console)
	if err != nil {
		return 0, err
	}
	if ctx.Err() != nil {
		return 0, fmt.Errorf("vm: the guest was cut off: %w", context.Cause(ctx))
	}
	b, err := os.ReadFile(filepath.Join(dir, statusFile))
	if status, convErr := strconv.Atoi(strings.TrimSpace(string(b))); err == nil && convErr == nil {
		return status, nil
	}
	return 0, fmt.Errorf("%w (%v); its kernel's last words:\n%s", ErrDied, waitErr, lastLines(console.Name(), 40))
}

func writeTask(dir string, c Config) error {
	modules, err := c.Kernel.modules()
	if err != nil {
		return err
	}
	t := task{Argv: c.Argv, Env: c.Env, Dir: c.Dir, Share: c.Share, Modules: modules}
	b, err := json.Marshal(t)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, taskFile), b, 0o600)
}

// boot runs the kernel until it ends and returns how it ended.
func boot(ctx context.Context, c Config, dir string, console *os.File) (ended, err error) {
	cmd := exec.CommandContext(ctx, "./"+kernelFile, arguments(c, dir)...)
	cmd.Dir = c.Kernel.Dir // the kernel's loader is named relative to it
	cmd.Env = append(os.Environ(), "LD_LIBRARY_PATH="+filepath.Join(c.Kernel.Dir, libDir))
	cmd.Stdout, cmd.Stderr = console, console
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return killGroup(cmd.Process) }

	stdout, stopOut, err := pipeTo(c.Stdout)
	if err != nil {
		return nil, err
	}
	stderr, stopErr, err := pipeTo(c.Stderr)
	if err != nil {
		stdout.Close()
		stopOut()
		return nil, err
	}
	cmd.ExtraFiles = []*os.File{stdout, stderr, console}
	if err = cmd.Start(); err == nil {
		release, watchErr := watch(cmd.Process)
		ended = cmd.Wait()
		_ = killGroup(cmd.Process)
		err = errors.Join(watchErr, release())
	}
	stdout.Close()
	stderr.Close()
	return ended, errors.Join(err, stopOut(), stopErr())
}

// arguments is the kernel's command line. Descriptors 3, 4 and 5 are stdout,
// stderr and the console.
func arguments(c Config, dir string) []string {
	memory := c.Memory
	if memory == 0 {
		memory = defaultBytes
	}
	a := []string{
		"mem=" + strconv.FormatInt(memory>>20, 10) + "M",
		"root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro",
		"init=" + c.Init, envRun + "=" + dir,
		"con=null", "con0=null,fd:5", "ssl=null", "ssl0=null,fd:3", "ssl1=null,fd:4",
		"uml_dir=" + dir, "umid=guest",
		"seccomp=auto", // faster than ptrace by far; kernels before 6.16 do not know it
		"oops=panic", "panic=-1", "noreboot",
	}
	for i, d := range c.Disks {
		a = append(a, fmt.Sprintf("ubd%d=%s", i, d))
	}
	return a
}

// watch has the guest killed when this process dies without a word: a signal at the
// death of its parent would reach the kernel's first process alone.
func watch(guest *os.Process) (release func() error, err error) {
	dog := exec.Command("/bin/sh", "-c", `read -r word || kill -9 "-$1"`, "sh", strconv.Itoa(guest.Pid))
	dog.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // what kills the runner's group spares it
	leash, err := dog.StdinPipe()
	if err == nil {
		err = dog.Start()
	}
	if err != nil {
		_ = killGroup(guest)
		return func() error { return nil }, err
	}
	return func() error {
		_, err := io.WriteString(leash, "done\n")
		return errors.Join(err, dog.Wait())
	}, nil
}

func killGroup(p *os.Process) error {
	if err := syscall.Kill(-p.Pid, syscall.SIGKILL); err != nil && err != syscall.ESRCH {
		return err
	}
	return nil
}

// pipeTo returns a descriptor for the kernel, which sets flags on it that must
// not reach what w writes to; stop waits for the end of what comes.
func pipeTo(w io.Writer) (end *os.File, stop func() error, err error) {
	r, end, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	done := make(chan error, 1)
	go func() {
		_, err := io.Copy(w, r)
		if err != nil {
			_, _ = io.Copy(io.Discard, r) // a guest that cannot write does not end
		}
		done <- err
	}()
	return end, func() error {
		defer r.Close()
		select {
		case err := <-done:
			return err
		case <-time.After(time.Minute):
			return errors.New("vm: a process outside the guest holds its output")
		}
	}, nil
}

func lastLines(file string, n int) string {
	b, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	lines := bytes.Split(bytes.TrimSpace(b), []byte("\n"))
	return string(bytes.Join(lines[max(0, len(lines)-n):], []byte("\n")))
}
