// Package socket gives a service its unix socket: one that systemd hands over, or
// one of its own.
//
// # Crash
//
// A socket outlives its process as a file to which nobody listens. Listen tells such
// a file from a living service by two things: the flock on PATH.lock, which the kernel
// drops with the process, and whether somebody accepts a connection. It removes only a
// socket, only when both say that nobody is there. The lock file stays: to remove it
// would let two processes lock two files of that name.
package socket

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/sys"
)

// maxPath is the longest path of a unix socket: sun_path with its NUL.
const maxPath = 107

// Options say whose a socket is. The zero value is one that its owner alone may
// connect to.
type Options struct {
	Mode fs.FileMode // 0 is 0600
	UID  int         // of the socket, if Chown
	GID  int
	// Chown gives the socket to UID and GID; otherwise it is the process's.
	Chown bool
}

// Listener is a unix socket of our own; Close removes it.
type Listener struct {
	*net.UnixListener
	path string
	lock *sys.Lock
	once sync.Once
	err  error
}

// Listen makes a unix socket at path, and the directory that it is in (0711). A file
// that a dead service left is replaced; ErrAlreadyExists if somebody listens there,
// or if the path is anything but a socket.
func Listen(path string, o Options) (*Listener, error) {
	l, err := listen(path, o)
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	return l, nil
}

func listen(path string, o Options) (_ *Listener, err error) {
	if len(path) > maxPath {
		return nil, fmt.Errorf("the path has %d bytes, %d are the most: %w", len(path), maxPath, errdefs.ErrInvalidArgument)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return nil, err
	}
	lock, err := lockFile(path + ".lock")
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			lock.Close()
		}
	}()
	if err := removeStale(path); err != nil {
		return nil, err
	}
	u, err := bind(path, o)
	if err != nil {
		return nil, err
	}
	return &Listener{UnixListener: u, path: path, lock: lock}, nil
}

// lockFile locks the right to the path.
func lockFile(path string) (*sys.Lock, error) {
	l, err := sys.LockFile(path, sys.LockExclusive)
	if sys.IsLocked(err) {
		return nil, fmt.Errorf("another process serves it (it holds %s): %w", path, errdefs.ErrAlreadyExists)
	}
	return l, err
}

// removeStale removes a socket that nobody listens to.
func removeStale(path string) error {
	fi, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if fi.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("there is something else than a socket (%v): %w", fi.Mode(), errdefs.ErrAlreadyExists)
	}
	c, err := net.Dial("unix", path)
	switch {
	case err == nil:
		c.Close()
		return fmt.Errorf("another process listens there: %w", errdefs.ErrAlreadyExists)
	case errors.Is(err, syscall.ECONNREFUSED):
		return os.Remove(path)
	}
	return fmt.Errorf("whether somebody listens there: %w", err)
}

// bind makes the socket under another name and gives it its mode and owner before
// it gets its own: nobody meets it with other ones.
func bind(path string, o Options) (*net.UnixListener, error) {
	if o.Mode == 0 {
		o.Mode = 0o600
	}
	dir, err := os.MkdirTemp(filepath.Dir(path), ".s") // 0700
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	tmp := filepath.Join(dir, "s")
	if len(tmp) > maxPath {
		return nil, fmt.Errorf("the directory's path is too long: %w", errdefs.ErrInvalidArgument)
	}
	u, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	if err != nil {
		return nil, err
	}
	u.SetUnlinkOnClose(false)
	err = os.Chmod(tmp, o.Mode)
	if err == nil && o.Chown {
		err = os.Chown(tmp, o.UID, o.GID)
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		u.Close()
		return nil, err
	}
	return u, nil
}

// Addr is the socket's path: not the name that it was made under.
func (l *Listener) Addr() net.Addr { return &net.UnixAddr{Name: l.path, Net: "unix"} }

// Close stops listening and removes the socket, then lets another have the path.
// Idempotent.
func (l *Listener) Close() error {
	l.once.Do(func() {
		l.err = errors.Join(l.UnixListener.Close(), os.Remove(l.path))
		l.lock.Close()
	})
	return l.err
}

// firstFD is the first descriptor that systemd hands over (sd_listen_fds(3)).
const firstFD = 3

// Activated returns the unix sockets that systemd handed over to this process, by
// their names (FileDescriptorName=, or "unknown"), and takes the variables that say
// so out of the environment: they are not for children. Their files are systemd's to
// remove. Call it once, before anything opens descriptors.
func Activated() (map[string][]net.Listener, error) {
	pid, count, names := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS"), os.Getenv("LISTEN_FDNAMES")
	for _, v := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		os.Unsetenv(v)
	}
	if pid != strconv.Itoa(os.Getpid()) {
		return nil, nil // for another process, which was our parent
	}
	n, err := strconv.Atoi(count)
	if err != nil || n < 0 {
		return nil, fmt.Errorf("LISTEN_FDS=%q is no number: %w", count, errdefs.ErrInvalidArgument)
	}
	all := map[string][]net.Listener{}
	given := strings.Split(names, ":")
	for i := range n {
		name := "unknown"
		if i < len(given) && given[i] != "" {
			name = given[i]
		}
		l, err := inherited(firstFD+i, name)
		if err != nil {
			return nil, err
		}
		all[name] = append(all[name], l)
	}
	return all, nil
}

func inherited(fd int, name string) (net.Listener, error) {
	f := os.NewFile(uintptr(fd), name)
	if f == nil {
		return nil, fmt.Errorf("descriptor %d: %w", fd, errdefs.ErrInvalidArgument)
	}
	defer f.Close() // the listener has a copy, which children do not get
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("descriptor %d (%s) that systemd handed over: %w", fd, name, err)
	}
	u, ok := l.(*net.UnixListener)
	if !ok {
		l.Close()
		return nil, fmt.Errorf("descriptor %d (%s) is %T, not a unix socket: %w", fd, name, l, errdefs.ErrInvalidArgument)
	}
	u.SetUnlinkOnClose(false)
	return u, nil
}
