package uniontest

import (
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/layerctl/layerctl/internal/sys"
)

// ok ends the case on an error.
func (k *Kit) ok(err error) {
	k.Helper()
	if err != nil {
		k.Fatal(err)
	}
}

// is says which errno err must be; 0 means no error.
func (k *Kit) is(want syscall.Errno, err error) {
	k.Helper()
	var got syscall.Errno
	switch {
	case err == nil && want == 0:
		return
	case errors.As(err, &got) && got == want:
		return
	}
	k.Fatalf("got %v, want %v", errText(err), errText(want))
}

func errText(err error) string {
	if err == nil || err == syscall.Errno(0) {
		return "success"
	}
	return err.Error()
}

// equal compares two values of any kind.
func equal[T comparable](k *Kit, what string, got, want T) {
	k.Helper()
	if got != want {
		k.Fatalf("%s: got %v, want %v", what, got, want)
	}
}

// that says that something must be so.
func (k *Kit) that(is bool, format string, args ...any) {
	k.Helper()
	if !is {
		k.Fatalf(format, args...)
	}
}

// reads says what a file in the mount must hold.
func (k *Kit) reads(p, want string) {
	k.Helper()
	b, err := os.ReadFile(k.p(p))
	k.ok(err)
	if string(b) != want {
		k.Fatalf("%s reads %s, want %s", p, short(string(b)), short(want))
	}
}

// readsFile is reads of an open file, from its start.
func (k *Kit) readsFile(f *os.File, want string) {
	k.Helper()
	b, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<40))
	k.ok(err)
	if string(b) != want {
		k.Fatalf("%s reads %s, want %s", f.Name(), short(string(b)), short(want))
	}
}

// absent says that names are not in the mount.
func (k *Kit) absent(paths ...string) {
	k.Helper()
	for _, p := range paths {
		_, err := sys.LstatPath(k.p(p))
		if !errors.Is(err, syscall.ENOENT) {
			k.Fatalf("%s is there (%v)", p, err)
		}
		names := k.names(parent(p))
		if slices.Contains(names, p[strings.LastIndexByte(p, '/')+1:]) {
			k.Fatalf("%s is listed", p)
		}
	}
}

// present says that names are in the mount, and listed.
func (k *Kit) present(paths ...string) {
	k.Helper()
	for _, p := range paths {
		k.stat(p)
		if !slices.Contains(k.names(parent(p)), p[strings.LastIndexByte(p, '/')+1:]) {
			k.Fatalf("%s is not listed", p)
		}
	}
}

// names are the names in a directory of the mount, sorted.
func (k *Kit) names(p string) []string { k.Helper(); return k.namesAt(k.p(p)) }

func (k *Kit) namesAt(path string) []string {
	k.Helper()
	all, err := os.ReadDir(path)
	k.ok(err)
	names := []string{}
	for _, e := range all {
		names = append(names, e.Name())
	}
	return names
}

// holds says which names a directory must have.
func (k *Kit) holds(p string, want ...string) {
	k.Helper()
	slices.Sort(want)
	if got := k.names(p); !slices.Equal(got, want) {
		k.Fatalf("%s holds %q, want %q", p, got, want)
	}
}

// stat describes a name in the mount, not following a symlink.
func (k *Kit) stat(p string) *sys.Stat { k.Helper(); return k.statAt(k.p(p)) }

func (k *Kit) statAt(path string) *sys.Stat {
	k.Helper()
	st, err := sys.LstatPath(path)
	k.ok(err)
	return &st
}

// mode compares the twelve bits.
func (k *Kit) mode(p string, want uint32) {
	k.Helper()
	if got := k.stat(p).Mode & 0o7777; got != want {
		k.Fatalf("%s has mode %04o, want %04o", p, got, want)
	}
}

// owner compares owner and group.
func (k *Kit) owner(p string, uid, gid uint32) {
	k.Helper()
	if st := k.stat(p); st.UID != uid || st.GID != gid {
		k.Fatalf("%s is owned by %d:%d, want %d:%d", p, st.UID, st.GID, uid, gid)
	}
}

// nlink compares the link count.
func (k *Kit) nlink(p string, want uint32) {
	k.Helper()
	if got := k.stat(p).Nlink; got != want {
		k.Fatalf("%s has %d links, want %d", p, got, want)
	}
}

// size compares the size.
func (k *Kit) size(p string, want int64) {
	k.Helper()
	if got := k.stat(p).Size; got != want {
		k.Fatalf("%s has %d bytes, want %d", p, got, want)
	}
}

// xattr reads an xattr in the mount.
func (k *Kit) xattr(p, name string) string { k.Helper(); return k.xattrAt(k.p(p), name) }

func (k *Kit) xattrAt(path, name string) string {
	k.Helper()
	v, err := getxattr(path, name)
	if err != nil {
		k.Fatalf("getxattr %s of %s: %v", name, path, err)
	}
	return v
}

func getxattr(path, name string) (string, error) {
	b := make([]byte, 1<<16)
	n, err := unix.Lgetxattr(path, name, b)
	if err != nil {
		return "", err
	}
	return string(b[:n]), nil
}

func setxattr(path, name, value string) error {
	return unix.Lsetxattr(path, name, []byte(value), 0)
}

// noXattr says that an xattr of a path is not there.
func (k *Kit) noXattr(path, name string) {
	k.Helper()
	if v, err := getxattr(path, name); err != unix.ENODATA {
		k.Fatalf("%s has %s=%q (%v)", path, name, v, err)
	}
}

// upperWhiteout says that the upper has a 0/0 device.
func (k *Kit) upperWhiteout(p string) {
	k.Helper()
	st := k.statAt(k.u(p))
	if !st.IsWhiteout() {
		k.Fatalf("the upper's %s has mode %o, device %d:%d: want a 0/0 device", p, st.Mode, st.RdevMajor, st.RdevMinor)
	}
}

// upperAbsent says that the upper has no such name.
func (k *Kit) upperAbsent(paths ...string) {
	k.Helper()
	for _, p := range paths {
		if _, err := sys.LstatPath(k.u(p)); !errors.Is(err, syscall.ENOENT) {
			k.Fatalf("the upper has %s (%v)", p, err)
		}
	}
}

// upperHolds says what the upper's directory must have.
func (k *Kit) upperHolds(p string, want ...string) {
	k.Helper()
	slices.Sort(want)
	if got := k.namesAt(k.u(p)); !slices.Equal(got, want) {
		k.Fatalf("the upper's %s holds %q, want %q", p, got, want)
	}
}

// upperOpaque says whether the upper's directory is opaque.
func (k *Kit) upperOpaque(p string, want bool) {
	k.Helper()
	v, err := getxattr(k.u(p), k.ov("opaque"))
	if got := err == nil && v == "y"; got != want {
		k.Fatalf("the upper's %s is opaque: %v (%q, %v), want %v", p, got, v, err, want)
	}
}

// upperBlocks says how many bytes the upper's file may use.
func (k *Kit) upperBlocks(p string, most int64) {
	k.Helper()
	if st := k.statAt(k.u(p)); st.Blocks*512 > most {
		k.Fatalf("the upper's %s uses %d bytes, want at most %d", p, st.Blocks*512, most)
	}
}

// inode is what tells one file from another.
type inode struct{ dev, ino uint64 }

func (k *Kit) inode(p string) inode {
	k.Helper()
	st := k.stat(p)
	return inode{st.Dev, st.Ino}
}

// sameInode says that f changes no inode number of paths; a path may be OLD>NEW
// where f renames it. A new mount has another device number.
func (k *Kit) sameInode(f func(), paths ...string) {
	k.Helper()
	before := map[string]inode{}
	for _, p := range paths {
		old, _, _ := strings.Cut(p, ">")
		before[p] = k.inode(old)
	}
	mounts := k.mounts
	f()
	for _, p := range paths {
		old, to, moved := strings.Cut(p, ">")
		if !moved {
			to = old
		}
		got := k.inode(to)
		if k.mounts != mounts {
			got.dev = before[p].dev
		}
		if got != before[p] {
			k.Fatalf("%s: inode was %v, now %v", p, before[p], got)
		}
	}
}
