package union

import "syscall"

// whiteout puts a whiteout at name below dir, where nothing is in upper.
func (u *upper) whiteout(dir int, name string) error { return syscall.ENOSYS }

// removeCovered removes name below dir, which a lower has too, and leaves a
// whiteout there in one step. A directory may hold whiteouts and nothing else.
func (u *upper) removeCovered(dir int, name string) error { return syscall.ENOSYS }

// removePure removes name below dir, which no lower has. A directory may hold
// whiteouts and nothing else.
func (u *upper) removePure(dir int, name string, isDir bool) error { return syscall.ENOSYS }

// emptyDir replaces the directory name below dir, which shows nothing but may hold
// whiteouts, by an empty opaque one with the same metadata, so that it can be
// removed, or something renamed onto it.
func (u *upper) emptyDir(dir int, name string) error { return syscall.ENOSYS }

// overWhiteout moves temp, which is in work, to name below dir, where a whiteout
// stands, in one step, and removes the whiteout. temp is made opaque first if
// it is a directory.
func (u *upper) overWhiteout(temp string, dir int, name string, isDir bool) error {
	return syscall.ENOSYS
}

// makeOpaque sets xattr opaque="y" on the directory fd.
func (u *upper) makeOpaque(fd int) error { return syscall.ENOSYS }

// sharedWhiteout is the whiteout in work whose links all others are.
type sharedWhiteout struct{}
