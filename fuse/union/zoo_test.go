package union

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/layerctl/layerctl/internal/sys"
)

// someCapability is a value of security.capability: CAP_NET_RAW, version 2.
const someCapability = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// zoo makes one of everything in dir.
func zoo(t testing.TB, dir, kind string) {
	t.Helper()
	root, err := sys.OpenDir(dir)
	must(t, err)
	defer root.Close()
	d := root.Int()
	file := func(name, content string, mode uint32) {
		t.Helper()
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600))
		must(t, os.Chmod(filepath.Join(dir, name), os.FileMode(mode&0o777)|map[bool]os.FileMode{true: os.ModeSetuid}[mode&0o4000 != 0]))
	}
	file("plain", "some text\n", 0o640)
	file("empty", "", 0o444)
	file("large", strings.Repeat("0123456789abcdef", 300000), 0o600)
	file("suid", "#!", 0o4755)
	file("xattrs", "x", 0o600)
	file("flagged", "x", 0o600)
	file("append", "x", 0o600)
	file("linked", "two names", 0o600)
	must(t, os.Link(dir+"/linked", dir+"/linked2"))
	sparse(t, dir+"/sparse")
	length := map[string]int{"xfs": 1023}[kind] // others take a page
	if length == 0 {
		length = 4000
	}
	must(t, os.Symlink(strings.Repeat("l", length), dir+"/symlink"))
	must(t, sys.MknodBare(d, "fifo", sys.S_IFIFO|0o640, 0, 0))
	must(t, sys.MknodBare(d, "socket", sys.S_IFSOCK|0o600, 0, 0))
	must(t, sys.MknodBare(d, "device", sys.S_IFCHR|0o600, 300, 70000))
	must(t, sys.MknodBare(d, "block", sys.S_IFBLK|0o600, 7, 1))
	must(t, os.Mkdir(dir+"/dir", 0o755))
	must(t, os.Mkdir(dir+"/dir/below", 0o700))
	must(t, os.WriteFile(dir+"/dir/below/file", []byte("y"), 0o600))
	must(t, os.Chmod(dir+"/dir", os.ModeSetgid|os.ModeSticky|0o750))
	must(t, os.WriteFile(dir+"/"+strings.Repeat("n", 255), nil, 0o600))
	must(t, os.WriteFile(dir+"/\xff\xfe not UTF-8", nil, 0o600))
	zooOwners(t, d)
	zooXattrs(t, d, kind)
	zooFlags(t, d, kind)
	must(t, sys.UtimesBare(d, "plain", sys.Time{Sec: -5, Nsec: 123456789}, sys.Time{Sec: 1e9, Nsec: 987654321}))
	must(t, sys.UtimesBare(d, "symlink", sys.Time{Sec: 7}, sys.Time{Sec: 8, Nsec: 9}))
	must(t, sys.UtimesBare(d, "dir", sys.Time{Sec: 10, Nsec: 11}, sys.Time{Sec: 12, Nsec: 13}))
}

func sparse(t testing.TB, path string) {
	t.Helper()
	f, err := os.Create(path)
	must(t, err)
	defer f.Close()
	for _, off := range []int64{0, 1 << 20, 5<<20 + 4096} {
		_, err := f.WriteAt(bytes.Repeat([]byte("data"), 1024), off)
		must(t, err)
	}
	must(t, f.Truncate(9<<20+5))
}

func zooOwners(t testing.TB, d int) {
	t.Helper()
	for i, name := range []string{"plain", "symlink", "fifo", "device", "dir", "xattrs"} {
		must(t, sys.ChownBare(d, name, uint32(1000+i), uint32(2000+i)))
	}
	must(t, sys.ChmodBare(d, "dir", 0o3750))
}

func zooXattrs(t testing.TB, d int, kind string) {
	t.Helper()
	set := func(name, attr, value string) {
		t.Helper()
		must(t, sys.SetxattrBare(d, name, attr, []byte(value), 0))
	}
	for _, name := range []string{"plain", "dir"} {
		set(name, "user.text", "value")
		set(name, "user.empty", "")
	}
	big := map[string]int{"ext4": 1000, "xfs": 60 << 10, "btrfs": 10000, "tmpfs": 1000}[kind]
	set("xattrs", "user.big", strings.Repeat("b", big))
	set("xattrs", "user.overlay.opaque", "not ours")
	for i := range 20 {
		set("xattrs", fmt.Sprintf("user.many%d%s", i, strings.Repeat("n", 20)), "v")
	}
	for _, name := range []string{"symlink", "fifo", "device", "xattrs", "dir"} {
		set(name, "trusted.any", "value")
		set(name, "trusted.overlay.overlay.opaque", "y") // of an overlay inside
		set(name, "trusted.overlay.impure", "y")         // left by who knows whom
	}
	set("suid", "security.capability", someCapability)
	acl := func(entries ...uint16) string { // tag, perm pairs, version 2
		b := []byte{2, 0, 0, 0}
		for i := 0; i < len(entries); i += 2 {
			b = append(b, byte(entries[i]), 0, byte(entries[i+1]), 0)
			id := uint32(0xffffffff)
			if entries[i] == 2 {
				id = 1234
			}
			b = append(b, byte(id), byte(id>>8), byte(id>>16), byte(id>>24))
		}
		return string(b)
	}
	set("xattrs", "system.posix_acl_access", acl(1, 6, 2, 4, 4, 4, 16, 4, 32, 0))
	set("dir", "system.posix_acl_access", acl(1, 7, 2, 7, 4, 5, 16, 7, 32, 0))
	set("dir", "system.posix_acl_default", acl(1, 7, 2, 5, 4, 5, 16, 5, 32, 0))
}

func zooFlags(t testing.TB, d int, kind string) {
	t.Helper()
	for name, flags := range map[string]uint32{"flagged": sys.FS_NOATIME_FL | sys.FS_SYNC_FL, "append": sys.FS_APPEND_FL} {
		if kind == "tmpfs" {
			flags &^= sys.FS_SYNC_FL
		}
		n, err := sys.OpenBare(d, name, sys.O_RDONLY, 0)
		must(t, err)
		old, err := sys.FlagsBare(n)
		if err == nil {
			err = sys.SetFlagsBare(n, old|flags)
		}
		sys.CloseBare(n)
		must(t, err)
	}
	t.Cleanup(func() {
		n, err := sys.OpenBare(d, "append", sys.O_RDONLY, 0)
		if err == nil {
			_ = sys.SetFlagsBare(n, 0)
			sys.CloseBare(n)
		}
	})
}

// describe lists a tree: a line per object with everything that can be seen of it,
// overlay xattrs too. Directories' sizes and what is below skip are left out.
func describe(t testing.TB, dir string, skip ...string) []string {
	t.Helper()
	var lines []string
	err := filepath.WalkDir(dir, func(p string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, p)
		if slices.Contains(skip, rel) {
			return nil
		}
		if _, err := os.Lstat(p); errors.Is(err, os.ErrNotExist) {
			return nil // the kernel lists whiteouts in directories that it does not merge, and finds nothing there
		}
		lines = append(lines, describeOne(t, p, rel))
		return nil
	})
	must(t, err)
	return lines
}

func describeOne(t testing.TB, p, rel string) string {
	t.Helper()
	f, err := sys.Open(p, sys.O_PATH|sys.O_NOFOLLOW, 0)
	must(t, err)
	defer f.Close()
	st, err := f.Stat("")
	must(t, err)
	s := fmt.Sprintf("%.40q mode %o owner %d:%d links %d rdev %d:%d atime %d.%d mtime %d.%d", rel, st.Mode, st.UID, st.GID, st.Nlink,
		st.RdevMajor, st.RdevMinor, st.Atime.Sec, st.Atime.Nsec, st.Mtime.Sec, st.Mtime.Nsec)
	switch st.Type() {
	case sys.S_IFLNK:
		to, err := f.Readlink("")
		must(t, err)
		s += fmt.Sprintf(" -> %x", sha256.Sum256([]byte(to)))
	case sys.S_IFREG:
		s += fmt.Sprintf(" size %d", st.Size) + content(t, f)
	}
	names, err := f.Listxattr("")
	must(t, err)
	slices.Sort(names)
	for _, n := range names {
		v, err := f.Getxattr("", n)
		must(t, err)
		if len(v) > 100 {
			v = fmt.Sprintf("%d bytes, %x", len(v), sha256.Sum256([]byte(v)))
		}
		s += " " + n + "=" + strings.ReplaceAll(fmt.Sprintf("%q", v), " ", `\x20`)
	}
	return s
}

// content is the digest of a file's bytes, its extents and its flags.
func content(t testing.TB, f *sys.Fd) string {
	t.Helper()
	n, err := openData(f.Int())
	must(t, err)
	r := os.NewFile(uintptr(n), f.Name())
	defer r.Close()
	h := sha256.New()
	_, err = io.Copy(h, r)
	must(t, err)
	flags, err := sys.FlagsBare(n)
	if err != nil {
		flags = 0
	}
	s := fmt.Sprintf(" flags %x bytes %x holes", flags&(sys.FS_SYNC_FL|sys.FS_NOATIME_FL|sys.FS_APPEND_FL|sys.FS_IMMUTABLE_FL), h.Sum(nil))
	for off := int64(0); ; {
		data, err := sys.SeekBare(n, off, 3)
		if err != nil {
			break
		}
		if off, err = sys.SeekBare(n, data, 4); err != nil {
			break
		}
		s += fmt.Sprintf(" %d-%d", data, off)
	}
	return s
}

// differences compares two descriptions.
func differences(t testing.TB, what string, got, want []string) {
	t.Helper()
	for _, l := range got {
		if !slices.Contains(want, l) {
			t.Errorf("%s: have %s", what, l)
		}
	}
	for _, l := range want {
		if !slices.Contains(got, l) {
			t.Errorf("%s: want %s", what, l)
		}
	}
}
