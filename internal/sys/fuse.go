package sys

import (
	"fmt"
	"os"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioctls of /dev/fuse, include/uapi/linux/fuse.h.
const (
	fuseDevIocClone        = 0x8004e500
	fuseDevIocBackingOpen  = 0x4010e501
	fuseDevIocBackingClose = 0x4004e502
)

// View looks at the beginning of b as a T: a message of the kernel's without
// decoding it. T must hold no pointers and be laid out as the kernel's struct;
// b must be long enough (else it panics) and aligned for T.
func View[T any](b []byte) *T {
	if uintptr(len(b)) < unsafe.Sizeof(*(*T)(nil)) {
		panic(fmt.Sprintf("sys.View: %d bytes are no %T", len(b), *new(T)))
	}
	return (*T)(unsafe.Pointer(unsafe.SliceData(b)))
}

// SizeOf returns the size of a T in bytes.
func SizeOf[T any]() int { return int(unsafe.Sizeof(*(*T)(nil))) }

// ReadMessage reads one message of a device: one read(2), its errno bare.
func (f *Fd) ReadMessage(p []byte) (int, syscall.Errno) {
	n, _, e := unix.Syscall(unix.SYS_READ, uintptr(f.n), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)))
	return int(n), e
}

// WriteMessage writes one message to a device: one write(2), its errno bare.
func (f *Fd) WriteMessage(p []byte) syscall.Errno {
	_, _, e := unix.Syscall(unix.SYS_WRITE, uintptr(f.n), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)))
	return e
}

// FuseClone makes f, a /dev/fuse just opened, another channel of the connection
// that session serves (FUSE_DEV_IOC_CLONE).
func (f *Fd) FuseClone(session *Fd) error {
	n := uint32(session.n)
	return f.err("ioctl FUSE_DEV_IOC_CLONE", "", ioctl(f.n, fuseDevIocClone, unsafe.Pointer(&n)))
}

// BackingOpen registers descriptor n with the connection f, for passthrough
// (FUSE_DEV_IOC_BACKING_OPEN): EPERM without CAP_SYS_ADMIN in the first user
// namespace, ELOOP for a file system that is stacked too high. The kernel reads and
// writes the file with the credentials that are registered with it: they are
// without CAP_FSETID, so that a write takes setuid and setgid bits away.
func (f *Fd) BackingOpen(n int) (id int32, err error) {
	runtime.LockOSThread() // capabilities are a thread's
	defer runtime.UnlockOSThread()
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	if err := unix.Capget(&hdr, &caps[0]); err != nil {
		return 0, f.err("capget", "", err)
	}
	if without := caps; caps[0].Effective&(1<<unix.CAP_FSETID) != 0 {
		without[0].Effective &^= 1 << unix.CAP_FSETID
		if err := unix.Capset(&hdr, &without[0]); err != nil {
			return 0, f.err("capset", "", err)
		}
		defer func() {
			if e := unix.Capset(&hdr, &caps[0]); e != nil {
				panic("sys: capabilities of the thread cannot be had back: " + e.Error())
			}
		}()
	}
	arg := struct {
		fd      int32
		flags   uint32
		padding uint64
	}{fd: int32(n)}
	r, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(f.n), fuseDevIocBackingOpen, uintptr(unsafe.Pointer(&arg)))
	if e != 0 {
		return 0, f.err("ioctl FUSE_DEV_IOC_BACKING_OPEN", "", e)
	}
	return int32(r), nil
}

// BackingClose gives a backing id back; files that are open with it go on.
func (f *Fd) BackingClose(id int32) error {
	return f.err("ioctl FUSE_DEV_IOC_BACKING_CLOSE", "", ioctl(f.n, fuseDevIocBackingClose, unsafe.Pointer(&id)))
}

// RecvFd waits for one descriptor on the unix socket f (SCM_RIGHTS), as
// fusermount3 sends it.
func (f *Fd) RecvFd(name string) (*Fd, error) {
	data, oob := make([]byte, 16), make([]byte, unix.CmsgSpace(4))
	var oobn int
	err := retry(func() (err error) {
		_, oobn, _, _, err = unix.Recvmsg(f.n, data, oob, unix.MSG_CMSG_CLOEXEC)
		return err
	})
	if err != nil {
		return nil, f.err("recvmsg", "", err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(messages) != 1 {
		return nil, f.err("recvmsg", "", unix.EBADMSG)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return nil, f.err("recvmsg", "", unix.EBADMSG)
	}
	return NewFd(fds[0], name), nil
}

// Socketpair makes two connected unix stream sockets.
func Socketpair() (a, b *Fd, err error) {
	p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	return NewFd(p[0], "socket"), NewFd(p[1], "socket"), nil
}

// SetName names the calling process as ps(1) shows it, at most 15 bytes.
func SetName(name string) error {
	b := append([]byte(name), 0)
	return unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(&b[0])), 0, 0, 0)
}

// Bytes looks at a T as bytes; see View.
func Bytes[T any](v *T) []byte { return unsafe.Slice((*byte)(unsafe.Pointer(v)), unsafe.Sizeof(*v)) }

// SetCloexec keeps f from programs that are executed.
func (f *Fd) SetCloexec() error {
	_, err := unix.FcntlInt(uintptr(f.n), unix.F_SETFD, unix.FD_CLOEXEC)
	return f.err("fcntl F_SETFD", "", err)
}

// MapAnonymous returns size bytes of zeros outside of the heap, page-aligned,
// which are memory only where they were touched. Unmap gives them back.
func MapAnonymous(size int) ([]byte, error) {
	b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	return b, os.NewSyscallError("mmap", err)
}

// Unmap ends a MapAnonymous.
func Unmap(b []byte) { _ = unix.Munmap(b) }

// Untouch gives back the memory of a part of a MapAnonymous, which is zeros
// again. It must begin and end at a page.
func Untouch(b []byte) { _ = unix.Madvise(b, unix.MADV_DONTNEED) }
