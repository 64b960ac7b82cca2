package userns

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// Command is a program to run inside.
type Command struct {
	// Path is the program; "" is this one.
	Path string
	Args []string // without the program's name
	// Root is the store's root, whose keeper is looked for; it need not exist.
	Root string
	// Keep starts a keeper where there is none, so that a mount outlives the
	// command.
	Keep bool
	// Mounts counts the mounts inside that must be kept, after the command; nil
	// if the command cannot have removed one. The keeper is stopped at 0.
	Mounts func(*Namespaces) (int, error)
}

const self = "/proc/self/exe"

// Run runs c in the keeper's namespaces, or in new ones that end with it, and
// returns its exit status: 128 and the signal's number where one killed it. An
// error that wraps ErrUnavailable means that user namespaces do not work here.
func Run(c Command) (int, error) {
	ns, err := enter(c.Root, c.Keep)
	if err != nil {
		return 0, err
	}
	if ns == nil {
		return runOnce(c)
	}
	defer ns.Close()
	p, err := ns.start(c.Path, c.Args)
	if err != nil {
		return 0, err
	}
	code, err := wait(p)
	if err == nil && c.Mounts != nil {
		err = ns.stopIfUnused(c.Mounts)
	}
	return code, err
}

// runOnce runs c in namespaces of its own.
func runOnce(c Command) (int, error) {
	cmd := exec.Command(or(c.Path, self), c.Args...)
	cmd.Args[0] = or(c.Path, os.Args[0])
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = environ()
	if err := spawn(cmd); err != nil {
		return 0, err
	}
	return wait(cmd.Process)
}

func or(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// wait passes signals on and returns the exit status. A terminal sends its
// signals to the whole foreground group, the child with it, so those are only
// passed on when they cannot have come from there. SIGTSTP is left alone: it
// stops parent and child.
func wait(p *os.Process) (int, error) {
	sigs := make(chan os.Signal, 8)
	signal.Notify(sigs, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGHUP,
		syscall.SIGUSR1, syscall.SIGUSR2)
	done := make(chan struct{})
	defer close(done)
	defer signal.Stop(sigs)
	go func() {
		for {
			select {
			case s := <-sigs:
				if s == syscall.SIGINT || s == syscall.SIGQUIT {
					if sys.Foreground() {
						continue
					}
				}
				_ = p.Signal(s)
			case <-done:
				return
			}
		}
	}()
	st, err := p.Wait()
	if err != nil {
		return 0, fmt.Errorf("user namespace: wait: %w", err)
	}
	if ws, ok := st.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return 128 + int(ws.Signal()), nil
	}
	return st.ExitCode(), nil
}

// Probe reports whether user namespaces work here, by making one, and how ids
// are mapped in it.
func Probe() (mapping string, err error) {
	cmd := exec.Command(self, "--version")
	cmd.Env = environ()
	if err := spawn(cmd); err != nil {
		return "", err
	}
	if err := cmd.Wait(); err != nil {
		return "", fmt.Errorf("user namespace: %w", err)
	}
	return Mapping(), nil
}

// Mapping says in words how ids are mapped for this user.
func Mapping() string {
	m := maps()
	if m.single != "" {
		return "own id only: " + m.single
	}
	var n int64
	for _, r := range m.uid {
		n += r.size
	}
	return fmt.Sprintf("%d ids", n)
}

// ExitNotFound and ExitCannot are a shell's statuses for a program that is not
// there, and one that cannot be run.
const (
	ExitNotFound = 127
	ExitCannot   = 126
)

// StartStatus is the exit status that stands for an error of Run to start the
// program; 0 if err is something else.
func StartStatus(err error) int {
	var se *os.SyscallError
	if !errors.As(err, &se) || se.Syscall != "execve" {
		return 0
	}
	if errors.Is(err, syscall.ENOENT) {
		return ExitNotFound
	}
	return ExitCannot
}
