package sys

import (
	"io"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

func pathErr(op, path string, err error) error {
	if err == nil {
		return nil
	}
	return &os.PathError{Op: op, Path: path, Err: err}
}

// Read reads up to len(p) bytes; io.EOF at the end.
func (f *Fd) Read(p []byte) (int, error) {
	var n int
	err := retry(func() (err error) { n, err = unix.Read(f.n, p); return err })
	if err != nil {
		return 0, f.err("read", "", err)
	}
	if n == 0 && len(p) > 0 {
		return 0, io.EOF
	}
	return n, nil
}

// ReadAt reads at off; io.EOF when fewer than len(p) bytes are there.
func (f *Fd) ReadAt(p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		var n int
		err := retry(func() (err error) { n, err = unix.Pread(f.n, p[done:], off+int64(done)); return err })
		if err != nil {
			return done, f.err("pread", "", err)
		}
		if n == 0 {
			return done, io.EOF
		}
		done += n
	}
	return done, nil
}

// Write writes all of p.
func (f *Fd) Write(p []byte) (int, error) {
	done := 0
	for done < len(p) {
		var n int
		err := retry(func() (err error) { n, err = unix.Write(f.n, p[done:]); return err })
		if err != nil {
			return done, f.err("write", "", err)
		}
		done += n
	}
	return done, nil
}

// WriteAt writes all of p at off.
func (f *Fd) WriteAt(p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		var n int
		err := retry(func() (err error) { n, err = unix.Pwrite(f.n, p[done:], off+int64(done)); return err })
		if err != nil {
			return done, f.err("pwrite", "", err)
		}
		done += n
	}
	return done, nil
}

// Sync flushes the file's data and metadata (fsync; for a directory its names).
func (f *Fd) Sync() error { return f.err("fsync", "", retry(func() error { return unix.Fsync(f.n) })) }

// SyncFS flushes the whole file system that f is on.
func (f *Fd) SyncFS() error {
	return f.err("syncfs", "", retry(func() error { return unix.Syncfs(f.n) }))
}

// Truncate sets the file's size.
func (f *Fd) Truncate(size int64) error {
	return f.err("ftruncate", "", retry(func() error { return unix.Ftruncate(f.n, size) }))
}

// Allocate gives the file the blocks of its first size bytes, and that size if it
// is shorter (fallocate). EOPNOTSUPP where the file system cannot.
func (f *Fd) Allocate(size int64) error {
	return f.err("fallocate", "", retry(func() error { return unix.Fallocate(f.n, 0, 0, size) }))
}

// MemFile makes an empty file in memory, without a name in any directory
// (memfd_create). It goes with its last descriptor.
func MemFile(name string) (*Fd, error) {
	n, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, &os.PathError{Op: "memfd_create", Path: name, Err: err}
	}
	return &Fd{n: n, name: name}, nil
}

// SeekData and SeekHole find the next data or hole at or after off. SeekData
// returns ENXIO when there is no more data.
func (f *Fd) SeekData(off int64) (int64, error) { return f.seek(off, unix.SEEK_DATA) }

// SeekHole: see SeekData.
func (f *Fd) SeekHole(off int64) (int64, error) { return f.seek(off, unix.SEEK_HOLE) }

func (f *Fd) seek(off int64, whence int) (int64, error) {
	n, err := unix.Seek(f.n, off, whence)
	if err != nil {
		return 0, f.err("lseek", "", err)
	}
	return n, nil
}

// Dedupe makes length bytes of dst at off share the blocks of f's, if the kernel
// finds them equal (FIDEDUPERANGE). It may do less: shared says how much. dst may
// be open for reading only where this process has CAP_SYS_ADMIN.
func (f *Fd) Dedupe(dst *Fd, off, length int64) (shared int64, equal bool, err error) {
	r := unix.FileDedupeRange{
		Src_offset: uint64(off), Src_length: uint64(length),
		Info: []unix.FileDedupeRangeInfo{{Dest_fd: int64(dst.n), Dest_offset: uint64(off)}},
	}
	err = retry(func() error { return unix.IoctlFileDedupeRange(f.n, &r) })
	i := r.Info[0]
	if err == nil && i.Status < 0 {
		err = syscall.Errno(-i.Status)
	}
	return int64(i.Bytes_deduped), i.Status == unix.FILE_DEDUPE_RANGE_SAME, f.err("ioctl FIDEDUPERANGE", "", err)
}

// Clone makes f share all blocks of src (FICLONE). EOPNOTSUPP, EXDEV or EINVAL
// where that cannot be.
func (f *Fd) Clone(src *Fd) error {
	return f.err("ioctl FICLONE", "", retry(func() error { return unix.IoctlFileClone(f.n, src.n) }))
}

// CopyRange copies up to n bytes from src at srcOff to f at off
// (copy_file_range) and returns how many; 0 at the end of src.
func (f *Fd) CopyRange(off int64, src *Fd, srcOff int64, n int) (int, error) {
	var done int
	err := retry(func() (err error) {
		s, d := srcOff, off
		done, err = unix.CopyFileRange(src.n, &s, f.n, &d, n, 0)
		return err
	})
	return done, f.err("copy_file_range", "", err)
}

// Mkdir makes a directory below f. umask applies.
func (f *Fd) Mkdir(name string, mode uint32) error {
	return f.err("mkdirat", name, retry(func() error { return unix.Mkdirat(f.n, name, mode) }))
}

// Mknod makes a fifo, socket, device or empty file below f; mode has the type.
func (f *Fd) Mknod(name string, mode uint32, major, minor uint32) error {
	return f.err("mknodat", name, retry(func() error {
		return unix.Mknodat(f.n, name, mode, int(unix.Mkdev(major, minor)))
	}))
}

// Symlink makes a symlink to target, which is content and kept as it is.
func (f *Fd) Symlink(target, name string) error {
	return f.err("symlinkat", name, retry(func() error { return unix.Symlinkat(target, f.n, name) }))
}

// Link makes name in dir another name of oldname in f; a symlink is linked itself.
func (f *Fd) Link(oldname string, dir *Fd, name string) error {
	return dir.err("linkat", name, retry(func() error { return unix.Linkat(f.n, oldname, dir.n, name, 0) }))
}

// Rename renames oldname in f to name in dir, with RENAME_ flags.
func (f *Fd) Rename(oldname string, dir *Fd, name string, flags uint) error {
	return f.err("renameat2", oldname, retry(func() error { return unix.Renameat2(f.n, oldname, dir.n, name, flags) }))
}

// Unlink removes a name below f; flags may be AT_REMOVEDIR.
func (f *Fd) Unlink(name string, flags int) error {
	return f.err("unlinkat", name, retry(func() error { return unix.Unlinkat(f.n, name, flags) }))
}

// Readlink returns a symlink's target; name "" means f itself, an O_PATH
// descriptor of a symlink.
func (f *Fd) Readlink(name string) (string, error) {
	for size := 256; ; size *= 2 {
		b := make([]byte, size)
		var n int
		err := retry(func() (err error) { n, err = unix.Readlinkat(f.n, name, b); return err })
		if err != nil {
			return "", f.err("readlinkat", name, err)
		}
		if n < size {
			return string(b[:n]), nil
		}
	}
}

// Chown sets the owner of a name below f, never following a symlink; name ""
// means f itself.
func (f *Fd) Chown(name string, uid, gid uint32) error {
	return f.err("fchownat", name, retry(func() error {
		return unix.Fchownat(f.n, name, int(uid), int(gid), unix.AT_SYMLINK_NOFOLLOW|unix.AT_EMPTY_PATH)
	}))
}

// Chmod sets the mode (07777) of f itself, which must not be O_PATH.
func (f *Fd) Chmod(mode uint32) error {
	return f.err("fchmod", "", retry(func() error { return unix.Fchmod(f.n, mode) }))
}

// ChmodAt sets the mode of a name below f that is known not to be a symlink.
func (f *Fd) ChmodAt(name string, mode uint32) error {
	return f.err("fchmodat", name, retry(func() error { return unix.Fchmodat(f.n, name, mode, 0) }))
}

// Utimes sets atime and mtime of a name below f, not following a symlink; name
// "" means f itself.
func (f *Fd) Utimes(name string, atime, mtime Time) error {
	ts := []unix.Timespec{{Sec: atime.Sec, Nsec: int64(atime.Nsec)}, {Sec: mtime.Sec, Nsec: int64(mtime.Nsec)}}
	return f.err("utimensat", name, retry(func() error {
		return unix.UtimesNanoAt(f.n, name, ts, unix.AT_SYMLINK_NOFOLLOW|unix.AT_EMPTY_PATH)
	}))
}
