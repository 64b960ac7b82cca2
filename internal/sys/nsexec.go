package sys

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// NSExec says what StartIn runs, and where.
type NSExec struct {
	// Namespaces are joined in order. A user namespace comes first: it gives the
	// capabilities that the others ask for.
	Namespaces []*Fd
	// Dir is the working directory, by its path in the joined mount namespace.
	// "" stays at the namespace's root.
	Dir  string
	Path string // of the program, in the joined mount namespace
	Args []string
	Env  []string
	// Stdin and Stdout are the program's; nil means the caller's.
	Stdin, Stdout *os.File
}

// StartIn starts a program in existing namespaces and returns its process, a
// child of the caller with its standard descriptors.
//
// setns(2) refuses a user namespace to a process with threads, and a Go program
// always has some (kernel/user_namespace.c:userns_install). A child between
// fork and exec has one thread, and the runtime has the three hooks that make a
// bare fork safe there: those that package syscall uses itself, which the
// runtime promises to keep for others. Nothing that allocates or may grow the
// stack runs in the child.
func StartIn(o NSExec) (*os.Process, error) {
	c, err := newNSChild(o)
	if err != nil {
		return nil, err
	}
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return nil, os.NewSyscallError("pipe2", err)
	}
	defer unix.Close(p[0])
	c.errfd = uintptr(p[1])
	syscall.ForkLock.Lock()
	pid, errno := c.fork()
	syscall.ForkLock.Unlock()
	unix.Close(p[1])
	if errno != 0 {
		return nil, os.NewSyscallError("clone", errno)
	}
	if err := readChildError(p[0]); err != nil {
		var st unix.WaitStatus
		_ = retry(func() error { _, err := unix.Wait4(int(pid), &st, 0, nil); return err })
		return nil, err
	}
	return os.FindProcess(int(pid))
}

// nsChild is what the child needs, made before the fork.
type nsChild struct {
	ns         []uintptr
	dir        *byte // nil: none
	path       *byte
	argv, envv []*byte
	std        [2]uintptr // stdin and stdout; 0 and 1: the caller's
	errfd      uintptr
}

func newNSChild(o NSExec) (*nsChild, error) {
	c := &nsChild{std: [2]uintptr{0, 1}}
	if o.Stdin != nil {
		c.std[0] = o.Stdin.Fd()
	}
	if o.Stdout != nil {
		c.std[1] = o.Stdout.Fd()
	}
	for _, f := range o.Namespaces {
		c.ns = append(c.ns, uintptr(f.Int()))
	}
	var err1, err2, err3, err4 error
	c.path, err1 = unix.BytePtrFromString(o.Path)
	c.argv, err2 = syscall.SlicePtrFromStrings(o.Args)
	c.envv, err3 = syscall.SlicePtrFromStrings(o.Env)
	if o.Dir != "" {
		c.dir, err4 = unix.BytePtrFromString(o.Dir)
	}
	return c, errors.Join(err1, err2, err3, err4)
}

// The steps of the child that can go wrong, in the order of nsStepNames.
const (
	nsStepSetns = iota
	nsStepChdir
	nsStepDup
	nsStepExec
)

var nsStepNames = [...]string{"setns", "chdir", "dup3", "execve"}

// fork makes the child. Like package syscall's own, it calls nothing in the
// child but bare system calls.
//
//go:noinline
//go:norace
//go:nocheckptr
func (c *nsChild) fork() (uintptr, unix.Errno) {
	beforeFork()
	pid, _, errno := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if errno != 0 || pid != 0 {
		afterFork()
		return pid, errno
	}
	afterForkInChild()
	c.child()
	return 0, 0 // not reached
}

// child joins the namespaces and executes the program. nosplit: the runtime has
// forbidden the stack to grow since beforeFork.
//
//go:nosplit
//go:norace
//go:nocheckptr
func (c *nsChild) child() {
	var report [2]uint32
	var errno unix.Errno
	for _, fd := range c.ns {
		if _, _, errno = unix.RawSyscall(unix.SYS_SETNS, fd, 0, 0); errno != 0 {
			report[0] = nsStepSetns
			goto fail
		}
	}
	if c.dir != nil {
		if _, _, errno = unix.RawSyscall(unix.SYS_CHDIR, uintptr(unsafe.Pointer(c.dir)), 0, 0); errno != 0 {
			report[0] = nsStepChdir
			goto fail
		}
	}
	for i, fd := range c.std {
		if uintptr(i) == fd {
			continue
		}
		if _, _, errno = unix.RawSyscall(unix.SYS_DUP3, fd, uintptr(i), 0); errno != 0 {
			report[0] = nsStepDup
			goto fail
		}
	}
	_, _, errno = unix.RawSyscall(unix.SYS_EXECVE, uintptr(unsafe.Pointer(c.path)),
		uintptr(unsafe.Pointer(&c.argv[0])), uintptr(unsafe.Pointer(&c.envv[0])))
	report[0] = nsStepExec
fail:
	report[1] = uint32(errno)
	unix.RawSyscall(unix.SYS_WRITE, c.errfd, uintptr(unsafe.Pointer(&report[0])), unsafe.Sizeof(report))
	for {
		unix.RawSyscall(unix.SYS_EXIT_GROUP, 127, 0, 0)
	}
}

// readChildError reads what the child could not do; nothing once it has exec'd.
func readChildError(fd int) error {
	var report [2]uint32
	buf := unsafe.Slice((*byte)(unsafe.Pointer(&report)), unsafe.Sizeof(report))
	n := 0
	err := retry(func() (err error) { n, err = unix.Read(fd, buf); return err })
	if err != nil {
		return os.NewSyscallError("read", err)
	}
	if n == 0 {
		return nil
	}
	if n != len(buf) || int(report[0]) >= len(nsStepNames) {
		return fmt.Errorf("child died before exec: %w", unix.EIO)
	}
	return os.NewSyscallError(nsStepNames[report[0]], unix.Errno(report[1]))
}

//go:linkname beforeFork syscall.runtime_BeforeFork
func beforeFork()

//go:linkname afterFork syscall.runtime_AfterFork
func afterFork()

//go:linkname afterForkInChild syscall.runtime_AfterForkInChild
func afterForkInChild()
