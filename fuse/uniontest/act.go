package uniontest

import (
	"os"

	"golang.org/x/sys/unix"
)

// Actions in the mount that must succeed. Those that may fail are called by
// their system call, with k.is.

func (k *Kit) write(p, content string) {
	k.Helper()
	f := k.open(p, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC)
	_, err := f.WriteString(content)
	k.ok(err)
	k.ok(f.Close())
}

func (k *Kit) appendTo(p, content string) {
	k.Helper()
	f := k.open(p, unix.O_WRONLY|unix.O_APPEND)
	_, err := f.WriteString(content)
	k.ok(err)
	k.ok(f.Close())
}

// open opens a file in the mount; new ones have mode 0644. It is closed at the
// latest with the case.
func (k *Kit) open(p string, flags int) *os.File {
	k.Helper()
	f, err := k.tryOpen(p, flags)
	k.ok(err)
	return f
}

func (k *Kit) tryOpen(p string, flags int) (*os.File, error) {
	fd, err := unix.Open(k.p(p), flags|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), p)
	k.files = append(k.files, f)
	return f, nil
}

func fd(f *os.File) int { return int(f.Fd()) }

func (k *Kit) unlink(p string)       { k.Helper(); k.ok(named("unlink", p, unix.Unlink(k.p(p)))) }
func (k *Kit) rmdir(p string)        { k.Helper(); k.ok(named("rmdir", p, unix.Rmdir(k.p(p)))) }
func (k *Kit) makedir(p string)      { k.Helper(); k.ok(named("mkdir", p, unix.Mkdir(k.p(p), 0o755))) }
func (k *Kit) removeAll(p string)    { k.Helper(); k.ok(os.RemoveAll(k.p(p))) }
func (k *Kit) rename(p, to string)   { k.Helper(); k.is(0, named("rename", p, k.tryRename(p, to, 0))) }
func (k *Kit) exchange(p, to string) { k.Helper(); k.is(0, k.tryRename(p, to, unix.RENAME_EXCHANGE)) }
func (k *Kit) hardlink(p, to string) { k.Helper(); k.ok(named("link", p, unix.Link(k.p(p), k.p(to)))) }
func (k *Kit) symlink(to, p string)  { k.Helper(); k.ok(named("symlink", p, unix.Symlink(to, k.p(p)))) }
func (k *Kit) chmod(p string, m uint32) {
	k.Helper()
	k.ok(named("chmod", p, unix.Chmod(k.p(p), m)))
}

func (k *Kit) chown(p string, uid, gid int) {
	k.Helper()
	k.ok(named("chown", p, unix.Lchown(k.p(p), uid, gid)))
}

func (k *Kit) setxattr(p, name, value string) {
	k.Helper()
	k.ok(named("setxattr", p, setxattr(k.p(p), name, value)))
}

func (k *Kit) truncate(p string, size int64) {
	k.Helper()
	k.ok(named("truncate", p, unix.Truncate(k.p(p), size)))
}

// utimes sets atime and mtime.
func (k *Kit) utimes(p string, sec int64, nsec int64) {
	k.Helper()
	ts := unix.Timespec{Sec: sec, Nsec: nsec}
	k.ok(named("utimes", p, unix.UtimesNanoAt(unix.AT_FDCWD, k.p(p), []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)))
}

func (k *Kit) mknod(p string, mode, major, minor uint32) {
	k.Helper()
	k.ok(named("mknod", p, unix.Mknod(k.p(p), mode, int(unix.Mkdev(major, minor)))))
}

func (k *Kit) tryRename(p, to string, flags uint) error {
	return unix.Renameat2(unix.AT_FDCWD, k.p(p), unix.AT_FDCWD, k.p(to), flags)
}

// named says what failed.
func named(call, p string, err error) error {
	if err == nil {
		return nil
	}
	return &os.PathError{Op: call, Path: p, Err: err}
}
