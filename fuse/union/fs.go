package union

import (
	"context"
	"syscall"
)

// FS is an open union. Its methods may be called by many goroutines at once.
// Errors wrap the syscall.Errno that the caller of the system call gets.
type FS struct {
	config Config
}

// Node is an inode: a file or directory of the union, whatever layer it is in.
type Node struct {
	id uint64
}

// ID names the node: the root is 1. It is not used again while the FS is open.
func (n *Node) ID() uint64 { return n.id }

// File is an open file. It goes on working when its node is copied up, renamed
// or unlinked: a file that was opened for reading in a lower reads the upper's
// data once there is some.
type File struct{}

// Dir is an open directory.
type Dir struct{}

// Open opens a union. ctx bounds the wait for an upper that is just being
// unmounted by another server (5 s at most).
func Open(ctx context.Context, c Config) (*FS, error) { return nil, syscall.ENOSYS }

// Close ends the FS. Open files and nodes are not usable afterwards.
func (fs *FS) Close() error { return syscall.ENOSYS }

// Root returns the root directory, which needs no Forget.
func (fs *FS) Root() *Node { return nil }

// Node returns a node that the caller has a reference to; nil for an unknown id.
func (fs *FS) Node(id uint64) *Node { return nil }

// Forget gives back count references.
func (fs *FS) Forget(id, count uint64) {}

// Lookup finds a name; ENOENT where there is none. "." and ".." are for file
// handles (export).
func (fs *FS) Lookup(dir *Node, name string) (Entry, error) { return Entry{}, syscall.ENOSYS }

// Getattr describes a node; f, when not nil, is an open file of it.
func (fs *FS) Getattr(n *Node, f *File) (Attr, error) { return Attr{}, syscall.ENOSYS }

// Setattr changes attributes, copying the node up.
func (fs *FS) Setattr(c Caller, n *Node, f *File, s SetAttr) (Attr, error) {
	return Attr{}, syscall.ENOSYS
}

// Readlink returns a symlink's target.
func (fs *FS) Readlink(n *Node) (string, error) { return "", syscall.ENOSYS }

// Mkdir makes a directory; mode is as the caller gave it, umask not applied.
func (fs *FS) Mkdir(c Caller, dir *Node, name string, mode uint32) (Entry, error) {
	return Entry{}, syscall.ENOSYS
}

// Mknod makes a file of any type but a directory and a symlink.
func (fs *FS) Mknod(c Caller, dir *Node, name string, mode, major, minor uint32) (Entry, error) {
	return Entry{}, syscall.ENOSYS
}

// Symlink makes a symlink.
func (fs *FS) Symlink(c Caller, dir *Node, name, target string) (Entry, error) {
	return Entry{}, syscall.ENOSYS
}

// Link makes name in dir another name of n.
func (fs *FS) Link(n, dir *Node, name string) (Entry, error) { return Entry{}, syscall.ENOSYS }

// Unlink removes a name of anything but a directory. Nothing is copied up.
func (fs *FS) Unlink(dir *Node, name string) error { return syscall.ENOSYS }

// Rmdir removes a directory that shows no names.
func (fs *FS) Rmdir(dir *Node, name string) error { return syscall.ENOSYS }

// Rename is renameat2(2) with its flags. EXDEV where a directory that a lower
// has a part of would need a redirect that may not be made.
func (fs *FS) Rename(c Caller, olddir *Node, oldname string, newdir *Node, newname string, flags uint32) error {
	return syscall.ENOSYS
}

// Create makes and opens a regular file; flags are open(2)'s.
func (fs *FS) Create(c Caller, dir *Node, name string, flags, mode uint32) (Entry, *File, error) {
	return Entry{}, nil, syscall.ENOSYS
}

// Tmpfile makes a file without a name in dir (O_TMPFILE).
func (fs *FS) Tmpfile(c Caller, dir *Node, flags, mode uint32) (Entry, *File, error) {
	return Entry{}, nil, syscall.ENOSYS
}

// Open opens a regular file; for writing it is copied up, without its data if
// flags have O_TRUNC. Special files are opened by the kernel itself.
func (fs *FS) Open(n *Node, flags uint32) (*File, error) { return nil, syscall.ENOSYS }

// OpenDir opens a directory for reading.
func (fs *FS) OpenDir(n *Node) (*Dir, error) { return nil, syscall.ENOSYS }

// Read calls add for each name from offset off on ("." and ".." are the
// caller's), until add returns false: that name comes again next time.
func (d *Dir) Read(off uint64, add func(DirEntry) bool) error { return syscall.ENOSYS }

// ReadPlus is Read with the node behind each name, with a reference for the
// caller if add returns true.
func (d *Dir) ReadPlus(off uint64, add func(DirEntry, Entry) bool) error { return syscall.ENOSYS }

// Fsync flushes the directory's names.
func (d *Dir) Fsync() error { return syscall.ENOSYS }

// Close closes the directory.
func (d *Dir) Close() error { return syscall.ENOSYS }

// Getxattr reads an xattr into dest; with an empty dest it returns the size,
// else ERANGE where dest is too small.
func (fs *FS) Getxattr(n *Node, attr string, dest []byte) (int, error) { return 0, syscall.ENOSYS }

// Listxattr lists xattrs, each ended by NUL, as Getxattr reads one.
func (fs *FS) Listxattr(n *Node, dest []byte) (int, error) { return 0, syscall.ENOSYS }

// Setxattr sets an xattr, copying the node up; flags are setxattr(2)'s.
// killSGID: the mode loses setgid, as an ACL set by a stranger makes it.
func (fs *FS) Setxattr(c Caller, n *Node, attr string, value []byte, flags uint32, killSGID bool) error {
	return syscall.ENOSYS
}

// Removexattr removes an xattr, copying the node up.
func (fs *FS) Removexattr(c Caller, n *Node, attr string) error { return syscall.ENOSYS }

// Statfs describes the file system below.
func (fs *FS) Statfs() (Statfs, error) { return Statfs{}, syscall.ENOSYS }

// Syncfs flushes the upper's file system.
func (fs *FS) Syncfs() error { return syscall.ENOSYS }

// Fd returns a descriptor of the file and whether its data are the upper's: one
// that stays right as long as the file is open (passthrough). It belongs to f.
func (f *File) Fd() (fd int, upper bool) { return -1, false }

// ReadAt reads into p; less than len(p) only at the end of the file.
func (f *File) ReadAt(p []byte, off int64) (int, error) { return 0, syscall.ENOSYS }

// WriteAt writes p. killPriv: see SetAttr.KillPriv.
func (f *File) WriteAt(p []byte, off int64, killPriv bool) (int, error) { return 0, syscall.ENOSYS }

// Fsync flushes the file.
func (f *File) Fsync(dataOnly bool) error { return syscall.ENOSYS }

// Flush is what close(2) of one of the descriptors does.
func (f *File) Flush() error { return syscall.ENOSYS }

// Fallocate is fallocate(2).
func (f *File) Fallocate(mode uint32, off, size int64) error { return syscall.ENOSYS }

// Seek is lseek(2) with SEEK_DATA or SEEK_HOLE.
func (f *File) Seek(off int64, whence int) (int64, error) { return 0, syscall.ENOSYS }

// CopyRange is copy_file_range(2) from src.
func (f *File) CopyRange(off int64, src *File, srcOff, size int64) (int64, error) {
	return 0, syscall.ENOSYS
}

// Close closes the file.
func (f *File) Close() error { return syscall.ENOSYS }
