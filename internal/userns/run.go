package userns

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// Command is a program to run inside.
type Command struct {
	// Path is the program; "" is this one.
	Path string
	Args []string // without the program's name
	Env  []string // beyond this process's environment
	// Root is the store's root, whose keeper is looked for; it need not exist.
	Root string
	// Keep starts a keeper where there is none, so that a mount outlives the
	// command.
	Keep bool
	// Mounts counts the mounts inside that must be kept, after the command ended
	// with status; nil if the command cannot have removed one. The keeper is
	// stopped at 0.
	Mounts func(n *Namespaces, status int) (int, error)
	// Feed, if not nil, writes the command's standard input, from outside of the
	// namespaces. Where that fails the command gets SIGUSR1 instead of an end of
	// input, and Run returns Feed's error.
	Feed func(w io.Writer) error
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
	if ns != nil {
		defer ns.Close()
	}
	code, err := c.run(ns)
	if err == nil && ns != nil && c.Mounts != nil {
		err = ns.stopIfUnused(code, c.Mounts)
	}
	return code, err
}

// run runs c in ns, or in namespaces of its own if ns is nil.
func (c Command) run(ns *Namespaces) (int, error) {
	sigs := catch()
	defer signal.Stop(sigs)
	if c.Feed == nil {
		p, err := c.start(ns, nil)
		if err != nil {
			return 0, err
		}
		return wait(p, sigs)
	}
	r, w, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	p, err := c.start(ns, r)
	r.Close()
	if err != nil {
		w.Close()
		return 0, err
	}
	return c.waitFed(p, w, sigs)
}

// waitFed feeds the command and waits for it. A command that ends by itself
// ends the feeding.
func (c Command) waitFed(p *os.Process, w *os.File, sigs <-chan os.Signal) (int, error) {
	fed := make(chan error, 1)
	go func() {
		err := c.Feed(w)
		if err != nil {
			_ = p.Signal(syscall.SIGUSR1) // first: it must not take this for the end
		} else {
			err = w.Close()
		}
		fed <- err
	}()
	code, err := wait(p, sigs)
	w.Close()
	if ferr := <-fed; ferr != nil && !errors.Is(ferr, syscall.EPIPE) && !errors.Is(ferr, os.ErrClosed) {
		return code, ferr
	}
	return code, err
}

func (c Command) start(ns *Namespaces, stdin *os.File) (*os.Process, error) {
	if ns != nil {
		return ns.start(c, stdin, nil)
	}
	cmd := command(or(c.Path, self), append([]string{or(c.Path, os.Args[0])}, c.Args...))
	cmd.Env = environ(c.Env...)
	if stdin != nil {
		cmd.Stdin = stdin
	}
	if err := spawn(cmd); err != nil {
		return nil, err
	}
	return cmd.Process, nil
}

// RunHere runs a program where this one is, with its whole argument list, and
// returns its exit status as Run does.
func RunHere(path string, args []string) (int, error) {
	sigs := catch()
	defer signal.Stop(sigs)
	cmd := command(path, args)
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	return wait(cmd.Process, sigs)
}

func command(path string, args []string) *exec.Cmd {
	return &exec.Cmd{Path: path, Args: args, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr}
}

func or(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// catch takes the signals that a command is to get. It is called before the
// command starts: one that came in between would end this process alone, and
// leave the command without anybody who waits for it.
func catch() chan os.Signal {
	sigs := make(chan os.Signal, 8)
	signal.Notify(sigs, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGHUP,
		syscall.SIGUSR2)
	return sigs
}

// wait passes signals on and returns the exit status. A terminal sends its
// signals to the whole foreground group, the child with it, so those are only
// passed on when they cannot have come from there. SIGTSTP is left alone: it
// stops parent and child.
func wait(p *os.Process, sigs <-chan os.Signal) (int, error) {
	done := make(chan struct{})
	defer close(done)
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

// Mapping says in words how ids are mapped in the namespace that this process
// runs in, or would be in a new one.
func Mapping() string {
	uid, gid := os.Getuid(), os.Getgid()
	if ids, ok := outerIDs(); ok && Inside() {
		uid, gid = ids[0], ids[1]
		if n := mappedIDs(); n > 1 {
			return fmt.Sprintf("%d ids", n)
		}
	}
	m := mapsOf(uid, gid)
	if m.single != "" {
		return "own id only: " + m.single
	}
	var n int64
	for _, r := range m.uid {
		n += r.size
	}
	return fmt.Sprintf("%d ids", n)
}

// mappedIDs counts the user ids of the namespace that this process runs in.
func mappedIDs() (n int64) {
	b, _ := os.ReadFile("/proc/self/uid_map")
	f := strings.Fields(string(b))
	for i := 2; i < len(f); i += 3 {
		size, _ := strconv.ParseInt(f[i], 10, 64)
		n += size
	}
	return n
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
