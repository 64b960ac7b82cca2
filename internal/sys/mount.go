package sys

import (
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Flags of mount(2) and umount2(2), with the kernel's spelling.
const (
	MS_RDONLY      = unix.MS_RDONLY
	MS_NOSUID      = unix.MS_NOSUID
	MS_NODEV       = unix.MS_NODEV
	MS_NOEXEC      = unix.MS_NOEXEC
	MS_SYNCHRONOUS = unix.MS_SYNCHRONOUS
	MS_REMOUNT     = unix.MS_REMOUNT
	MS_MANDLOCK    = unix.MS_MANDLOCK
	MS_DIRSYNC     = unix.MS_DIRSYNC
	MS_NOSYMFOLLOW = unix.MS_NOSYMFOLLOW
	MS_NOATIME     = unix.MS_NOATIME
	MS_NODIRATIME  = unix.MS_NODIRATIME
	MS_BIND        = unix.MS_BIND
	MS_MOVE        = unix.MS_MOVE
	MS_REC         = unix.MS_REC
	MS_SILENT      = unix.MS_SILENT
	MS_UNBINDABLE  = unix.MS_UNBINDABLE
	MS_PRIVATE     = unix.MS_PRIVATE
	MS_SLAVE       = unix.MS_SLAVE
	MS_SHARED      = unix.MS_SHARED
	MS_RELATIME    = unix.MS_RELATIME
	MS_STRICTATIME = unix.MS_STRICTATIME
	MS_LAZYTIME    = unix.MS_LAZYTIME

	MNT_DETACH      = unix.MNT_DETACH
	UMOUNT_NOFOLLOW = unix.UMOUNT_NOFOLLOW
)

// Attributes of one mount, for Fsmount and MountAttr.
const (
	MOUNT_ATTR_RDONLY      = unix.MOUNT_ATTR_RDONLY
	MOUNT_ATTR_NOSUID      = unix.MOUNT_ATTR_NOSUID
	MOUNT_ATTR_NODEV       = unix.MOUNT_ATTR_NODEV
	MOUNT_ATTR_NOEXEC      = unix.MOUNT_ATTR_NOEXEC
	MOUNT_ATTR__ATIME      = unix.MOUNT_ATTR__ATIME
	MOUNT_ATTR_NOATIME     = unix.MOUNT_ATTR_NOATIME
	MOUNT_ATTR_STRICTATIME = unix.MOUNT_ATTR_STRICTATIME
	MOUNT_ATTR_NODIRATIME  = unix.MOUNT_ATTR_NODIRATIME
	MOUNT_ATTR_NOSYMFOLLOW = unix.MOUNT_ATTR_NOSYMFOLLOW
	MOUNT_ATTR_IDMAP       = unix.MOUNT_ATTR_IDMAP
)

// MaxFsconfigString is the longest value that FsContext.SetString takes: the
// kernel copies 256 bytes with the NUL (fs/fsopen.c, 6.18) and answers EINVAL
// to more.
const MaxFsconfigString = 255

// Mount is mount(2): the old interface. Paths are trusted; data is one page.
func Mount(source, target, fstype string, flags uintptr, data string) error {
	return pathErr("mount "+fstype, target, retry(func() error {
		return unix.Mount(source, target, fstype, flags, data)
	}))
}

// Umount is umount2(2). target may be a ProcPath of a mount's root.
func Umount(target string, flags int) error {
	return pathErr("umount2", target, retry(func() error { return unix.Unmount(target, flags) }))
}

// FsContext is a file system being configured: fsopen(2). It has one owner,
// who closes it. Its errors carry what the kernel said in words.
type FsContext struct {
	fd *Fd
	fs string
}

// Fsopen starts configuring a new instance of file system type fs; ENOSYS
// before kernel 5.2, ENODEV when the kernel has no such file system.
func Fsopen(fs string) (*FsContext, error) {
	var n int
	err := retry(func() (err error) { n, err = unix.Fsopen(fs, unix.FSOPEN_CLOEXEC); return err })
	if err != nil {
		return nil, pathErr("fsopen", fs, err)
	}
	return &FsContext{fd: NewFd(n, fs), fs: fs}, nil
}

// Close drops the context; a mount already made from it stays. A second Close
// does nothing.
func (c *FsContext) Close() error { return c.fd.Close() }

// SetFlag sets a parameter that takes no value.
func (c *FsContext) SetFlag(key string) error {
	if err := retry(func() error { return unix.FsconfigSetFlag(c.fd.n, key) }); err != nil {
		return c.err("fsconfig "+key, err)
	}
	return nil
}

// SetString sets a parameter to a value of at most MaxFsconfigString bytes.
func (c *FsContext) SetString(key, value string) error {
	if err := retry(func() error { return unix.FsconfigSetString(c.fd.n, key, value) }); err != nil {
		return c.err("fsconfig "+key+"="+value, err)
	}
	return nil
}

// SetFd sets a parameter to an open file. overlayfs takes its layers so from
// kernel 6.13 on.
func (c *FsContext) SetFd(key string, f *Fd) error {
	if err := retry(func() error { return unix.FsconfigSetFd(c.fd.n, key, f.n) }); err != nil {
		return c.err("fsconfig "+key+"="+f.Name(), err)
	}
	return nil
}

// Create makes the file system instance.
func (c *FsContext) Create() error {
	return c.err("fsconfig create", retry(func() error { return unix.FsconfigCreate(c.fd.n) }))
}

// Reconfigure applies the parameters to the existing instance: a remount.
func (c *FsContext) Reconfigure() error {
	return c.err("fsconfig reconfigure", retry(func() error { return unix.FsconfigReconfigure(c.fd.n) }))
}

// Mount turns the created instance into a mount that is attached nowhere:
// fsmount(2). It vanishes with the descriptor unless MoveTo attaches it.
func (c *FsContext) Mount(attrs uint64) (*Fd, error) {
	var n int
	err := retry(func() (err error) {
		n, err = unix.Fsmount(c.fd.n, unix.FSMOUNT_CLOEXEC, int(attrs))
		return err
	})
	if err != nil {
		return nil, c.err("fsmount", err)
	}
	return NewFd(n, c.fs), nil
}

// Messages takes the kernel's log of this context, oldest first: "e overlay:
// ..." for errors, w and i for warnings and information.
func (c *FsContext) Messages() []string {
	var all []string
	b := make([]byte, 4096)
	for range 64 { // the kernel keeps 8; the bound is against a loop
		n, err := unix.Read(c.fd.n, b)
		if err != nil || n <= 0 {
			return all
		}
		all = append(all, strings.TrimRight(string(b[:n]), "\n"))
	}
	return all
}

func (c *FsContext) err(op string, err error) error {
	if err == nil {
		return nil
	}
	if said := c.Messages(); len(said) > 0 {
		err = &kernelSaid{err: err, log: said}
	}
	return &os.PathError{Op: op, Path: c.fs, Err: err}
}

// kernelSaid is an errno with the words that the kernel logged beside it.
type kernelSaid struct {
	err error
	log []string
}

func (k *kernelSaid) Error() string {
	words := make([]string, len(k.log))
	for i, m := range k.log {
		words[i] = strings.TrimPrefix(m, "e ")
	}
	return k.err.Error() + " (kernel: " + strings.Join(words, "; ") + ")"
}

func (k *kernelSaid) Unwrap() error { return k.err }

// OpenTree opens the mount that f (O_PATH or not) stands in, at f; clone makes
// a private, unattached copy of it that vanishes with the descriptor, recursive
// takes the mounts below along. EINVAL where the mount belongs to another mount
// namespace.
func (f *Fd) OpenTree(clone, recursive bool) (*Fd, error) {
	flags := uint(unix.OPEN_TREE_CLOEXEC | unix.AT_EMPTY_PATH)
	if clone {
		flags |= unix.OPEN_TREE_CLONE
	}
	if recursive {
		flags |= unix.AT_RECURSIVE
	}
	var n int
	err := retry(func() (err error) { n, err = unix.OpenTree(f.n, "", flags); return err })
	if err != nil {
		return nil, f.err("open_tree", "", err)
	}
	return NewFd(n, f.name), nil
}

// MoveTo attaches the mount f (from FsContext.Mount or OpenTree) at target.
func (f *Fd) MoveTo(target *Fd) error {
	err := retry(func() error {
		return unix.MoveMount(f.n, "", target.n, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
	})
	if err != nil {
		return &os.LinkError{Op: "move_mount", Old: f.name, New: target.name, Err: err}
	}
	return nil
}

// MountAttr changes a mount: attributes to set and to clear, a propagation
// (MS_PRIVATE, ...; 0: as it is), and with MOUNT_ATTR_IDMAP in Set the user
// namespace that maps its ids.
type MountAttr struct {
	Set, Clear  uint64
	Propagation uint64
	UserNS      *Fd
}

// SetMountAttr is mount_setattr(2) on the mount whose root f is; recursive
// includes the mounts below. ENOSYS before kernel 5.12.
func (f *Fd) SetMountAttr(a MountAttr, recursive bool) error {
	attr := unix.MountAttr{Attr_set: a.Set, Attr_clr: a.Clear, Propagation: a.Propagation}
	if a.UserNS != nil {
		attr.Userns_fd = uint64(a.UserNS.n)
	}
	flags := uint(unix.AT_EMPTY_PATH)
	if recursive {
		flags |= unix.AT_RECURSIVE
	}
	return f.err("mount_setattr", "", retry(func() error { return unix.MountSetattr(f.n, "", flags, &attr) }))
}
