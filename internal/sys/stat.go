package sys

import (
	"errors"

	"golang.org/x/sys/unix"
)

// Stat is what statx(2) says of a file.
type Stat struct {
	Mask       uint32 // STATX_* of what the file system filled in
	Mode       uint32 // type and permissions: st_mode
	Nlink      uint32
	UID, GID   uint32
	Ino        uint64
	Size       int64
	Blocks     int64  // of 512 bytes
	Dev        uint64 // major<<32 | minor: only to be compared
	RdevMajor  uint32
	RdevMinor  uint32
	Atime      Time
	Mtime      Time
	Ctime      Time
	Btime      Time // zero where Mask lacks STATX_BTIME
	MountID    uint64
	Attributes uint64
	Blksize    uint32
}

// Time is a kernel timestamp.
type Time struct {
	Sec  int64
	Nsec uint32
}

// TimeOmit leaves a timestamp as it is (Utimes).
var TimeOmit = Time{Nsec: unix.UTIME_OMIT}

// S_IFMT is the type mask of Stat.Mode; the types have the kernel's spelling.
const (
	S_IFMT   = unix.S_IFMT
	S_IFREG  = unix.S_IFREG
	S_IFDIR  = unix.S_IFDIR
	S_IFLNK  = unix.S_IFLNK
	S_IFCHR  = unix.S_IFCHR
	S_IFBLK  = unix.S_IFBLK
	S_IFIFO  = unix.S_IFIFO
	S_IFSOCK = unix.S_IFSOCK
)

// Type returns the S_IFMT part of the mode.
func (s *Stat) Type() uint32 { return s.Mode & S_IFMT }

// IsDir reports whether the file is a directory.
func (s *Stat) IsDir() bool { return s.Mode&S_IFMT == S_IFDIR }

// IsReg reports whether the file is a regular file.
func (s *Stat) IsReg() bool { return s.Mode&S_IFMT == S_IFREG }

// IsWhiteout reports whether the file is an overlayfs whiteout device.
func (s *Stat) IsWhiteout() bool {
	return s.Mode&S_IFMT == S_IFCHR && s.RdevMajor == 0 && s.RdevMinor == 0
}

// IsMountRoot reports whether the file is the root of a mount.
func (s *Stat) IsMountRoot() bool { return s.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0 }

// Attributes of a file that statx(2) shows, with the kernel's spelling.
const (
	STATX_ATTR_COMPRESSED = unix.STATX_ATTR_COMPRESSED
	STATX_ATTR_IMMUTABLE  = unix.STATX_ATTR_IMMUTABLE
	STATX_ATTR_APPEND     = unix.STATX_ATTR_APPEND
	STATX_ATTR_NODUMP     = unix.STATX_ATTR_NODUMP
)

const statxMask = unix.STATX_BASIC_STATS | unix.STATX_BTIME | unix.STATX_MNT_ID

// Stat describes one component below f without following a symlink; name ""
// means f itself, which may be an O_PATH descriptor.
func (f *Fd) Stat(name string) (Stat, error) {
	s, err := statxat(f.n, name, unix.AT_SYMLINK_NOFOLLOW|unix.AT_EMPTY_PATH|unix.AT_NO_AUTOMOUNT)
	return s, f.err("stat", name, err)
}

// StatPath describes a trusted path, following symlinks.
func StatPath(path string) (Stat, error) {
	s, err := statxat(unix.AT_FDCWD, path, unix.AT_NO_AUTOMOUNT)
	return s, pathErr("stat", path, err)
}

// LstatPath describes a trusted path, not following a last symlink.
func LstatPath(path string) (Stat, error) {
	s, err := statxat(unix.AT_FDCWD, path, unix.AT_NO_AUTOMOUNT|unix.AT_SYMLINK_NOFOLLOW)
	return s, pathErr("lstat", path, err)
}

func statxat(dir int, name string, flags int) (Stat, error) {
	var x unix.Statx_t
	if err := retry(func() error { return unix.Statx(dir, name, flags, statxMask, &x) }); err != nil {
		return Stat{}, err
	}
	var s Stat
	s.set(&x)
	return s, nil
}

func (s *Stat) set(x *unix.Statx_t) {
	*s = Stat{
		Mask: x.Mask, Mode: uint32(x.Mode), Nlink: x.Nlink, UID: x.Uid, GID: x.Gid,
		Ino: x.Ino, Size: int64(x.Size), Blocks: int64(x.Blocks),
		Dev:       uint64(x.Dev_major)<<32 | uint64(x.Dev_minor),
		RdevMajor: x.Rdev_major, RdevMinor: x.Rdev_minor,
		Atime: Time{x.Atime.Sec, x.Atime.Nsec}, Mtime: Time{x.Mtime.Sec, x.Mtime.Nsec},
		Ctime: Time{x.Ctime.Sec, x.Ctime.Nsec}, Btime: Time{x.Btime.Sec, x.Btime.Nsec},
		MountID: x.Mnt_id, Attributes: x.Attributes, Blksize: x.Blksize,
	}
}

// Exists reports whether f has name.
func (f *Fd) Exists(name string) (bool, error) {
	_, err := f.Stat(name)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	return err == nil, err
}
