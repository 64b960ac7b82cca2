package mount

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/fusermount"
	"github.com/layerctl/layerctl/internal/sys"
)

// served is a FUSE file system whose mount is attached nowhere: the kernel's half
// is made here, and its server is given /dev/fuse as a descriptor, by a
// mountpoint "/dev/fd/3", as servers on libfuse 3 take it, too. The server ends when
// the last descriptor of the mount is gone, so a crash of this process leaves
// nothing.
type served struct {
	cmd    *exec.Cmd
	stderr bytes.Buffer
	ended  chan struct{} // closed once it is reaped
}

// serve starts the server of p, mounts it and waits until it answers.
func (p *plan) serve(ctx context.Context) (root *sys.Fd, s *served, err error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	program, err := serverProgram(p.fstype)
	if err != nil {
		return nil, nil, err
	}
	root, file, err := p.kernelHalf(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer file.Close()
	if s, err = startServer(program, p.words(), file); err != nil {
		root.Close()
		return nil, nil, err
	}
	file.Close() // so that a server that dies ends the mount
	if _, err := root.Stat(""); err != nil {
		root.Close()
		<-s.ended
		return nil, nil, fmt.Errorf("%s: %w: %s", p.fstype, err, strings.TrimSpace(s.stderr.String()))
	}
	return root, s, nil
}

// serverProgram finds a FUSE server: in PATH, or beside this program, as they are
// built and installed.
func serverProgram(name string) (string, error) {
	program, err := exec.LookPath(name)
	if err == nil {
		return program, nil
	}
	if self, e := os.Executable(); e == nil {
		if beside, e := exec.LookPath(filepath.Join(filepath.Dir(self), name)); e == nil {
			return beside, nil
		}
	}
	return "", fmt.Errorf("no program %s in PATH or beside this one: %w: %w", name, errdefs.ErrNotImplemented, err)
}

// words splits the options of a helper, which are given on as they are.
func (p *plan) words() []string {
	var all []string
	for _, o := range p.params {
		all = append(all, o.key)
	}
	return all
}

// attributes are the words that the kernel's half of a FUSE mount is about; without
// "suid" and "dev" it has neither, as a helper would do it.
func attributes(options []string) uint64 {
	attrs := uint64(sys.MOUNT_ATTR_NOSUID | sys.MOUNT_ATTR_NODEV)
	for _, o := range options {
		for word := range strings.SplitSeq(o, ",") {
			switch word {
			case "ro":
				attrs |= sys.MOUNT_ATTR_RDONLY
			case "suid":
				attrs &^= sys.MOUNT_ATTR_NOSUID
			case "dev":
				attrs &^= sys.MOUNT_ATTR_NODEV
			case "noexec":
				attrs |= sys.MOUNT_ATTR_NOEXEC
			}
		}
	}
	return attrs
}

// kernelHalf mounts, attached nowhere, and returns the root and the /dev/fuse to
// serve. An ordinary user has fusermount3 do it.
func (p *plan) kernelHalf(ctx context.Context) (*sys.Fd, *os.File, error) {
	dev, err := sys.Open("/dev/fuse", sys.O_RDWR, 0)
	if err != nil {
		err = fmt.Errorf("FUSE: %w", err)
	} else {
		file := dev.File()
		root, merr := p.fuseMount(int(file.Fd()))
		if merr == nil {
			return root, file, nil
		}
		file.Close()
		err = merr
	}
	if os.Geteuid() == 0 || !errors.Is(err, syscall.EPERM) && !errors.Is(err, syscall.EACCES) {
		return nil, nil, err
	}
	root, file, ferr := p.byFusermount(ctx)
	if ferr != nil {
		return nil, nil, fmt.Errorf("%w; %v", err, ferr)
	}
	return root, file, nil
}

// byFusermount mounts at a directory that it makes and unmounts there at once: the
// mount then is where only the open root leads, and goes with that.
func (p *plan) byFusermount(ctx context.Context) (*sys.Fd, *os.File, error) {
	dir, err := os.MkdirTemp("", "fuse-")
	if err != nil {
		return nil, nil, err
	}
	defer os.Remove(dir)
	options := []string{fusermount.Option("fsname", p.source), "subtype=" + p.fstype, "default_permissions"}
	if attributes(p.words())&sys.MOUNT_ATTR_RDONLY != 0 {
		options = append(options, "ro")
	}
	dev, err := fusermount.Mount(ctx, dir, options)
	if err != nil {
		_ = fusermount.Unmount(dir, true) // it may have been ended when it had mounted
		return nil, nil, err
	}
	root, err := sys.Open(dir, sys.O_PATH|sys.O_DIRECTORY, 0)
	if uerr := fusermount.Unmount(dir, true); err == nil && uerr != nil {
		root.Close()
		err = uerr
	}
	if err != nil {
		dev.Close()
		return nil, nil, err
	}
	return root, dev.File(), nil
}

// fuseMount makes the kernel's half.
func (p *plan) fuseMount(dev int) (*sys.Fd, error) {
	c, err := sys.Fsopen("fuse")
	if err != nil {
		return nil, err
	}
	defer c.Close()
	settings := [][2]string{
		{"source", p.source}, {"subtype", p.fstype}, {"fd", fmt.Sprint(dev)}, {"rootmode", "40000"},
		{"user_id", fmt.Sprint(os.Geteuid())}, {"group_id", fmt.Sprint(os.Getegid())},
	}
	for _, s := range settings {
		if s[1] == "" {
			continue
		}
		if err := c.SetString(s[0], s[1]); err != nil {
			return nil, err
		}
	}
	for _, flag := range []string{"default_permissions", "allow_other"} {
		if err := c.SetFlag(flag); err != nil {
			return nil, err
		}
	}
	if err := c.Create(); err != nil {
		return nil, err
	}
	return c.Mount(attributes(p.words()))
}

// startServer runs a server in the foreground on a mount that is made.
func startServer(program string, options []string, dev *os.File) (*served, error) {
	var args []string
	for _, o := range options {
		args = append(args, "-o", ofParent(o))
	}
	s := &served{cmd: exec.Command(program, append(args, "-f", "/dev/fd/3")...), ended: make(chan struct{})}
	s.cmd.ExtraFiles = []*os.File{dev}
	s.cmd.Stderr = &s.stderr
	// A Ctrl-C is for the program that mounts: it will end the mount itself.
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	s.cmd.WaitDelay = time.Second
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(s.ended)
		_ = s.cmd.Wait()
	}()
	return s, nil
}

// ofParent makes paths of descriptors of this process good in a child.
func ofParent(option string) string {
	return strings.ReplaceAll(option, "/proc/self/fd/", fmt.Sprintf("/proc/%d/fd/", os.Getpid()))
}

// wait waits until the server of a mount that was just closed has gone. Who still
// has a file of it open keeps it.
func (s *served) wait() {
	select {
	case <-s.ended:
	case <-time.After(10 * time.Second):
	}
}

// helperEnv is the environment of a mount helper: it looks for servers in PATH
// alone.
func helperEnv(name string) []string {
	program, err := serverProgram(name)
	if err != nil || errors.Is(err, exec.ErrDot) {
		return nil
	}
	dir := filepath.Dir(program)
	if path := os.Getenv("PATH"); !slices.Contains(filepath.SplitList(path), dir) {
		return append(os.Environ(), "PATH="+path+string(filepath.ListSeparator)+dir)
	}
	return nil
}
