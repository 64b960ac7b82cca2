package sys

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The calls in bare*.go are for who makes millions of them: they take bare
// descriptor numbers that somebody else owns, allocate nothing, and their errors
// are bare syscall.Errno values (nil, never Errno 0). A name is one component
// below dir and never followed if it is a symlink; "" means dir itself, which may
// be O_PATH. Names with a NUL are EINVAL, ones that are too long ENAMETOOLONG.

// nameMax bounds what the calls take as a name: a component of NAME_MAX bytes.
const nameMax = 255

// cname is a name as the kernel reads it.
type cname [nameMax + 1]byte

func (c *cname) set(name string) error {
	if len(name) > nameMax {
		return unix.ENAMETOOLONG
	}
	for i := 0; i < len(name); i++ {
		if name[i] == 0 {
			return unix.EINVAL
		}
		c[i] = name[i]
	}
	c[len(name)] = 0
	return nil
}

func errnoErr(e syscall.Errno) error {
	switch e { // the runtime allocates for an Errno in an interface, but for these
	case 0:
		return nil
	case unix.ENOENT:
		return errENOENT
	case unix.ENODATA:
		return errENODATA
	}
	return e
}

var (
	errENOENT  error = unix.ENOENT
	errENODATA error = unix.ENODATA
)

// CloseBare closes descriptor n.
func CloseBare(n int) { _, _, _ = unix.Syscall(unix.SYS_CLOSE, uintptr(n), 0, 0) }

// StatBare describes name below dir into s.
func StatBare(dir int, name string, s *Stat) error { return unix.ENOSYS }

// OpenBare opens name below dir, O_CLOEXEC and O_NOFOLLOW added; name "" is not
// allowed: see ReopenBare.
func OpenBare(dir int, name string, flags int, mode uint32) (int, error) { return -1, unix.ENOSYS }

// ReopenBare opens anew, with other flags, the file that descriptor n (O_PATH or
// not) is open on, through /proc/self/fd.
func ReopenBare(n int, flags int) (int, error) { return -1, unix.ENOSYS }

// DirentsBare fills buf with names of directory n from where it stands
// (getdents64) and returns how many bytes; 0 at the end.
func DirentsBare(n int, buf []byte) (int, error) { return 0, unix.ENOSYS }

// BareDirent is one name in a buffer of DirentsBare; Name is part of the buffer.
type BareDirent struct {
	Name []byte
	Ino  uint64
	Off  int64  // of the next name: for SeekBare
	Type uint32 // S_IFMT value; 0 where the file system does not say
}

// DecodeDirents calls f for each name in b, "." and ".." too, until f returns
// false.
func DecodeDirents(b []byte, f func(*BareDirent) bool) {}

// SeekBare is lseek(2).
func SeekBare(n int, off int64, whence int) (int64, error) { return 0, unix.ENOSYS }

// FileHandle is a file of one file system, as name_to_handle_at(2) has it.
type FileHandle struct {
	Type int32
	Len  int
	Data [128]byte
}

// HandleBare gives the handle of name below dir and the id of the mount that it is
// seen in. EOPNOTSUPP where the file system has none.
func HandleBare(dir int, name string, h *FileHandle) (mount int, err error) { return 0, unix.ENOSYS }

// OpenHandleBare opens a file by its handle; mount is any descriptor of that file
// system. ESTALE if it is gone. Needs CAP_DAC_READ_SEARCH.
func OpenHandleBare(mount int, h *FileHandle, flags int) (int, error) { return -1, unix.ENOSYS }

// GetxattrBare reads an xattr of name below dir into dest and returns its size;
// with an empty dest only that. ERANGE where dest is too small, ENODATA where
// there is none.
func GetxattrBare(dir int, name, attr string, dest []byte) (int, error) { return 0, unix.ENOSYS }

// ListxattrBare lists xattrs of name below dir into dest, each ended by NUL.
func ListxattrBare(dir int, name string, dest []byte) (int, error) { return 0, unix.ENOSYS }

// SetxattrBare sets an xattr of name below dir; flags are XATTR_CREATE, XATTR_REPLACE.
func SetxattrBare(dir int, name, attr string, value []byte, flags int) error { return unix.ENOSYS }

// RemovexattrBare removes an xattr of name below dir.
func RemovexattrBare(dir int, name, attr string) error { return unix.ENOSYS }

// PreadBare is pread(2): it may read less than len(p).
func PreadBare(n int, p []byte, off int64) (int, error) { return 0, unix.ENOSYS }

// PwriteBare is pwrite(2): it may write less than len(p).
func PwriteBare(n int, p []byte, off int64) (int, error) { return 0, unix.ENOSYS }

// FsyncBare is fsync(2), or fdatasync(2).
func FsyncBare(n int, dataOnly bool) error { return unix.ENOSYS }

// FallocateBare is fallocate(2).
func FallocateBare(n int, mode uint32, off, size int64) error { return unix.ENOSYS }

// CopyRangeBare is copy_file_range(2).
func CopyRangeBare(dst int, dstOff int64, src int, srcOff int64, size int) (int, error) {
	return 0, unix.ENOSYS
}

// FtruncateBare is ftruncate(2).
func FtruncateBare(n int, size int64) error { return unix.ENOSYS }

// ChmodBare sets the mode (07777) of name below dir, which must be known not to
// be a symlink.
func ChmodBare(dir int, name string, mode uint32) error { return unix.ENOSYS }

// ChownBare sets owner and group of name below dir; ^uint32(0) leaves one as it is.
func ChownBare(dir int, name string, uid, gid uint32) error { return unix.ENOSYS }

// UtimesBare sets times of name below dir; Nsec may be UTIME_NOW or UTIME_OMIT.
func UtimesBare(dir int, name string, atime, mtime Time) error { return unix.ENOSYS }

// ReadlinkBare reads the target of name below dir into b: all of it, if the
// result is less than len(b).
func ReadlinkBare(dir int, name string, b []byte) (int, error) { return 0, unix.ENOSYS }

// MkdirBare, MknodBare, SymlinkBare make a name below dir; umask applies.
func MkdirBare(dir int, name string, mode uint32) error { return unix.ENOSYS }

// MknodBare: see MkdirBare; mode has the type.
func MknodBare(dir int, name string, mode, major, minor uint32) error { return unix.ENOSYS }

// SymlinkBare makes a symlink to target.
func SymlinkBare(target string, dir int, name string) error { return unix.ENOSYS }

// LinkBare makes newname in newdir another name of name in dir; name "" means the
// file that dir is open on, one without a name (O_TMPFILE) too.
func LinkBare(dir int, name string, newdir int, newname string) error { return unix.ENOSYS }

// RenameBare is renameat2(2).
func RenameBare(dir int, name string, newdir int, newname string, flags uint) error {
	return unix.ENOSYS
}

// UnlinkBare removes a name below dir; flags may be AT_REMOVEDIR.
func UnlinkBare(dir int, name string, flags int) error { return unix.ENOSYS }

// TmpfileBare makes a file without a name in the directory dir (O_TMPFILE); flags
// have the access mode. LinkBare gives it a name.
func TmpfileBare(dir int, flags int, mode uint32) (int, error) { return -1, unix.ENOSYS }

// StatfsBare describes the file system that n is on.
func StatfsBare(n int, s *Statfs) error { return unix.ENOSYS }

// FlagsBare reads the inode flags FS_*_FL of n (FS_IOC_GETFLAGS), not O_PATH.
func FlagsBare(n int) (uint32, error) { return 0, unix.ENOSYS }

// SetFlagsBare sets them.
func SetFlagsBare(n int, flags uint32) error { return unix.ENOSYS }

// FlockBare is flock(2); how has LOCK_SH, LOCK_EX or LOCK_UN, and LOCK_NB.
func FlockBare(n int, how int) error { return unix.ENOSYS }

// RangeLock is a lock on a range of a file, as struct flock has it.
type RangeLock struct {
	Type       int16 // F_RDLCK, F_WRLCK, F_UNLCK
	Start, Len int64 // Len 0: to the end, wherever that is
}

// SetRangeLock takes or drops a range lock of the open file n (F_OFD_SETLK): EAGAIN
// if another has it; with wait (F_OFD_SETLKW) it waits.
func SetRangeLock(n int, l RangeLock, wait bool) error { return unix.ENOSYS }

// GetRangeLock tells which lock is in the way of l (F_OFD_GETLK); Type F_UNLCK: none.
func GetRangeLock(n int, l RangeLock) (RangeLock, error) { return RangeLock{}, unix.ENOSYS }

// Umask sets the process's umask and returns the one before.
func Umask(mask int) int { return unix.Umask(mask) }

// SetFsID makes the calling thread uid and gid for access to files, until called
// again; the goroutine must be locked to it.
func SetFsID(uid, gid uint32) error { return unix.ENOSYS }

// FileLimit returns the soft limit of open files, after raising it to the hard one.
func FileLimit() (uint64, error) { return 0, unix.ENOSYS }

// FSUUID reads the UUID of the file system that f is on, as the kernel's overlayfs
// uses it (FS_IOC_GETFSUUID, 6.9); ENOTTY where it has none or does not say.
func (f *Fd) FSUUID() ([16]byte, error) { return [16]byte{}, unix.ENOSYS }

func pointer[T any](p *T) uintptr { return uintptr(unsafe.Pointer(p)) }
