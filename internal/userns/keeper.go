package userns

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/sys"
)

// patience is how long another process may take to start or stop a keeper.
const patience = 10 * time.Second

// Namespaces are a keeper's, and the right to use them: the keeper stays until
// Close.
type Namespaces struct {
	dir       string
	use       *sys.Lock // shared
	user, mnt *sys.Fd
	pid       int
}

// Close gives up the namespaces. Idempotent.
func (n *Namespaces) Close() error {
	return errors.Join(n.user.Close(), n.mnt.Close(), n.use.Close())
}

// enter returns the namespaces of root's keeper, which it starts if start is
// set; nil where there is none.
func enter(root string, start bool) (*Namespaces, error) {
	dir := filepath.Join(root, "keeper")
	if start {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("keeper: %w", err)
		}
	}
	for deadline := time.Now().Add(patience); ; {
		n, err := open(dir)
		if errors.Is(err, os.ErrNotExist) && !start {
			return nil, nil
		}
		if err != nil || n.user != nil {
			return n, err
		}
		if !start {
			return nil, n.Close()
		}
		err = startKeeper(dir)
		n.Close()
		if err != nil {
			return nil, err
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("keeper of %s: started and gone again: %w", root, errdefs.ErrUnavailable)
		}
	}
}

// open takes the right to use dir's keeper. The result's user is nil when there
// is no keeper.
func open(dir string) (*Namespaces, error) {
	use, err := lockWithin(filepath.Join(dir, "use"), patience)
	if err != nil {
		return nil, fmt.Errorf("keeper: %w", err)
	}
	n := &Namespaces{dir: dir, use: use}
	if n.pid = keeperPID(dir); n.pid < 0 {
		return n, nil
	}
	if err := n.openNamespaces(); err != nil {
		n.Close()
		return nil, fmt.Errorf("keeper %d: %w", n.pid, err)
	}
	return n, nil
}

// lockWithin takes the shared lock, which somebody who stops the keeper may hold
// for a moment.
func lockWithin(path string, limit time.Duration) (*sys.Lock, error) {
	for deadline := time.Now().Add(limit); ; time.Sleep(5 * time.Millisecond) {
		l, err := sys.LockFile(path, sys.LockShared)
		if !sys.IsLocked(err) || time.Now().After(deadline) {
			return l, err
		}
	}
}

// openNamespaces opens the keeper's. The pid cannot mean another process as
// long as the keeper holds its lock, so that is looked at again afterwards.
func (n *Namespaces) openNamespaces() error {
	var err error
	dir := fmt.Sprintf("/proc/%d/ns/", n.pid)
	if n.user, err = sys.Open(dir+"user", sys.O_RDONLY, 0); err != nil {
		return err
	}
	if n.mnt, err = sys.Open(dir+"mnt", sys.O_RDONLY, 0); err != nil {
		return err
	}
	if keeperPID(n.dir) != n.pid {
		return fmt.Errorf("killed: %w", errdefs.ErrUnavailable)
	}
	return nil
}

// keeperPID returns the live keeper's process id, -1 if there is none.
func keeperPID(dir string) int {
	f, err := sys.Open(filepath.Join(dir, "pid"), sys.O_RDONLY|sys.O_NOFOLLOW, 0)
	if err != nil {
		return -1
	}
	defer f.Close()
	if l, err := f.TryLock(sys.LockShared); !sys.IsLocked(err) {
		l.Close()
		return -1
	}
	b, err := io.ReadAll(f)
	pid, err2 := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || err2 != nil || pid <= 0 {
		return -1
	}
	return pid
}

// start runs a program inside, with this one's standard descriptors, or stdin
// and stdout instead if they are not nil.
func (n *Namespaces) start(c Command, stdin, stdout *os.File) (*os.Process, error) {
	wd, err := os.Getwd()
	if err != nil {
		return nil, err
	}
	return sys.StartIn(sys.NSExec{
		Namespaces: []*sys.Fd{n.user, n.mnt},
		Dir:        wd,
		Path:       or(c.Path, self),
		Args:       append([]string{or(c.Path, os.Args[0])}, c.Args...),
		Env:        environ(c.Env...),
		Stdin:      stdin,
		Stdout:     stdout,
	})
}

// Output runs this program inside and returns what it prints, once it has ended
// well.
func (n *Namespaces) Output(args ...string) ([]byte, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	p, err := n.start(Command{Args: args}, nil, w)
	w.Close()
	if err != nil {
		return nil, err
	}
	b, rerr := io.ReadAll(r)
	st, err := p.Wait()
	if err == nil && !st.Success() {
		err = fmt.Errorf("%s: %s", strings.Join(args, " "), st)
	}
	return b, errors.Join(err, rerr)
}

// stopIfUnused ends the keeper when no other command is inside and no mount is
// left.
func (n *Namespaces) stopIfUnused(code int, mounts func(*Namespaces, int) (int, error)) error {
	if err := n.use.Change(sys.LockExclusive); err != nil {
		return nil // another command is inside, and sees to it afterwards
	}
	left, err := mounts(n, code)
	if err != nil || left > 0 {
		return err
	}
	if err := syscall.Kill(n.pid, syscall.SIGTERM); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("keeper %d: kill: %w", n.pid, err)
	}
	for deadline := time.Now().Add(patience); keeperPID(n.dir) == n.pid; {
		if time.Now().After(deadline) {
			return fmt.Errorf("keeper %d: does not end: %w", n.pid, errdefs.ErrUnavailable)
		}
		time.Sleep(time.Millisecond)
	}
	return nil
}

// startKeeper starts a keeper and returns when it, or one that was faster, is
// there.
func startKeeper(dir string) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd := exec.Command(self)
	cmd.Args = []string{"layerctl-keeper", dir}
	cmd.Dir = "/"
	cmd.Env = environ(envKeeper + "=" + dir)
	cmd.ExtraFiles = []*os.File{w} // descriptor 3
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = spawn(cmd)
	w.Close()
	if err != nil {
		return err
	}
	msg, err := io.ReadAll(r)
	if err == nil && string(msg) != "ready" {
		err = fmt.Errorf("keeper: %s", msg)
	}
	if err != nil {
		_ = cmd.Wait()
		return err
	}
	return cmd.Process.Release()
}

// keep is the keeper's life: it says when it is ready on descriptor 3, and ends
// at SIGTERM, or when its file has gone with the store.
func keep(dir string) int {
	ready := os.NewFile(3, "ready")
	term := make(chan os.Signal, 1)
	signal.Notify(term, syscall.SIGTERM)
	signal.Ignore(syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT)
	pid, err := lockPID(dir)
	if err != nil {
		fmt.Fprint(ready, err)
		return 1
	}
	fmt.Fprint(ready, "ready")
	ready.Close()
	if pid == nil {
		return 0 // another one is the keeper
	}
	for tick := time.NewTicker(10 * time.Second); ; {
		select {
		case <-term:
			return 0
		case <-tick.C:
			if st, err := pid.Fd().Stat(""); err != nil || st.Nlink == 0 {
				return 0
			}
		}
	}
}

// lockPID takes the keeper's lock and writes who it is; nil if another has it.
func lockPID(dir string) (*sys.Lock, error) {
	l, err := sys.LockFile(filepath.Join(dir, "pid"), sys.LockExclusive)
	if sys.IsLocked(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if err = l.Fd().Truncate(0); err == nil {
		_, err = fmt.Fprintln(l.Fd(), os.Getpid())
	}
	if err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}
