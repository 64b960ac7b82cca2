package layer

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

const envUserDir = "LAYERCTL_LAYER_USER_DIR"

// asUser runs one test of this binary again as an ordinary user, with a
// directory of its own.
func asUser(t *testing.T, attr *syscall.SysProcAttr) {
	t.Helper()
	testenv.Root(t)
	dir := testenv.FS(t, "tmpfs")
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chown(dir, 1000, 1000)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v") // by its inode: the path is root's
	fd, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer fd.Close()
	cmd.ExtraFiles = []*os.File{fd} // the way there is root's, too
	cmd.Env = append(os.Environ(), envUserDir+"=/proc/self/fd/3")
	cmd.Dir = "/"
	cmd.SysProcAttr = attr
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("--- PASS: "+t.Name())) {
		t.Fatalf("as user: %v\n%s", err, out)
	}
}

func ordinaryUser() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1000, Gid: 1000, Groups: []uint32{}}}
}

// userDir makes a directory in the one that asUser gives, "" in the first process.
func userDir(t *testing.T, name string) string {
	base := os.Getenv(envUserDir)
	if base == "" {
		return ""
	}
	dir := base + "/" + name
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// Without privilege owner, mode and type go to an xattr, and are read back from
// there; only a symlink's owner and what the kernel keeps for root are lost, and
// told.
func TestApplyOverrideStat(t *testing.T) {
	dir := userDir(t, "override")
	if dir == "" {
		asUser(t, ordinaryUser())
		return
	}
	want := metaEntries()
	a := newTar()
	for _, e := range want {
		addEntry(a, &e)
	}
	var skipped []string
	o := ApplyOptions{Volatile: true, OverrideStat: true, Skipped: func(p, why string) { skipped = append(skipped, p+": "+why) }}
	if err := Apply(t.Context(), dir, bytes.NewReader(a.bytes()), o); err != nil {
		t.Fatal(err)
	}
	lost := strings.Join(skipped, "\n")
	for _, s := range []string{`link: owner 9:9 of a symlink`, `link: xattr "trusted.l"`, `cap: xattr "security.capability"`} {
		if !strings.Contains(lost, s) {
			t.Errorf("not told: %s\n%s", s, lost)
		}
	}
	checkOverridden(t, dir, want)
}

func checkOverridden(t *testing.T, dir string, want []Entry) {
	t.Helper()
	fd, err := sys.OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer fd.Close()
	for _, w := range want {
		got, err := ReadEntryOptions(fd, w.Path, ReadOptions{OverrideStat: true})
		if err != nil {
			t.Error(err)
			continue
		}
		got.Path = w.Path
		for n := range w.Xattrs {
			if strings.HasPrefix(n, "trusted.") || strings.HasPrefix(n, "security.") {
				delete(w.Xattrs, n)
			}
		}
		if len(w.Xattrs) == 0 {
			w.Xattrs = nil
		}
		if w.Type == TypeSymlink {
			w.UID, w.GID = got.UID, got.GID
		}
		if !reflect.DeepEqual(got, w) {
			t.Errorf("%q:\n got %+v\nwant %+v", w.Path, got, w)
		}
	}
}

// A user may unpack what is the user's own, into directories without write
// permission too; anything else is refused by name.
func TestApplyAsUser(t *testing.T) {
	dir := userDir(t, "own")
	if dir == "" {
		asUser(t, ordinaryUser())
		return
	}
	var want []Entry
	a := newTar()
	for _, e := range []Entry{
		{Path: "r", Type: TypeDir, Mode: 0o555, ModTime: Timespec{1, 0}},
		{Path: "r/none", Type: TypeDir, Mode: 0, ModTime: Timespec{2, 0}},
		{Path: "w", Type: TypeDir, Mode: 0o700, ModTime: Timespec{5, 0}},
		{Path: "w/f", Type: TypeReg, Mode: 0o200, ModTime: Timespec{3, 0}, Xattrs: map[string]string{"user.x": "1"}},
		{Path: "w/g", Type: TypeReg, Mode: 0o4500, ModTime: Timespec{3, 0}, Xattrs: map[string]string{"user.x": "1"}},
	} {
		e.UID, e.GID = 1000, 1000
		addEntry(a, &e)
		want = append(want, e)
	}
	below := Entry{Path: "r/none/f", Type: TypeReg, Mode: 0o400, UID: 1000, GID: 1000, ModTime: Timespec{3, 0}}
	addEntry(a, &below)
	for _, open := range []int{0, 1} { // 1: closed and opened again in between
		if err := Apply(t.Context(), dir, bytes.NewReader(a.bytes()), ApplyOptions{Volatile: true, openDirs: open}); err != nil {
			t.Fatal(err)
		}
		want[3].Mode, want[3].Xattrs = 0o200, want[4].Xattrs
		checkEntries(t, dir, append(want[:3:3], want[4]))
		a = newTar() // the second time over what is there
		for _, e := range want {
			addEntry(a, &e)
		}
		addEntry(a, &below)
	}
	b := newTar()
	addEntry(b, &Entry{Path: "root's", Type: TypeReg, Mode: 0o644})
	err := Apply(t.Context(), dir, bytes.NewReader(b.bytes()), ApplyOptions{Volatile: true})
	if !errdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), `"root's"`) {
		t.Errorf("root's file: %v", err)
	}
	device := newTar()
	addEntry(device, &Entry{Path: "dev", Type: TypeChar, Major: 1, Minor: 3, Mode: 0o666, UID: 1000, GID: 1000})
	if err := Apply(t.Context(), dir, bytes.NewReader(device.bytes()), ApplyOptions{Volatile: true}); !errdefs.IsPermissionDenied(err) {
		t.Errorf("device: %v", err)
	}
	told := ""
	o := ApplyOptions{Volatile: true, Skipped: func(p, why string) { told = p }}
	if err := Apply(t.Context(), dir, bytes.NewReader(device.bytes()), o); err != nil || told != "dev" {
		t.Errorf("device, skipped: %q, %v", told, err)
	}
}

// Root of a user namespace with one id: others are not mapped.
func TestApplyInUserNamespace(t *testing.T) {
	dir := userDir(t, "ns")
	if dir == "" {
		attr := &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 1000, Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 1000, Size: 1}},
			Credential:  &syscall.Credential{NoSetGroups: true},
		}
		asUser(t, attr)
		return
	}
	want := []Entry{
		{Path: "mapped", Type: TypeReg, Mode: 0o4755, ModTime: Timespec{1, 0}},
		{Path: "not", Type: TypeReg, Mode: 0o2755, UID: 7, GID: 7, ModTime: Timespec{1, 0}},
		{Path: "d", Type: TypeDir, Mode: 0, UID: 7, GID: 0, ModTime: Timespec{1, 0}},
		{Path: "d/p", Type: TypeFifo, Mode: 0o600, UID: 7, ModTime: Timespec{1, 0}},
		{Path: "dev", Type: TypeBlock, Mode: 0o600, Major: 7, Minor: 9, ModTime: Timespec{1, 0}},
	}
	a := newTar()
	for _, e := range want {
		addEntry(a, &e)
	}
	if err := Apply(t.Context(), dir, bytes.NewReader(a.bytes()), ApplyOptions{Volatile: true, OverrideStat: true}); err != nil {
		t.Fatal(err)
	}
	checkOverridden(t, dir, want)
}

// TestChangeOfAnOverriddenFileIsSeen: the owner and mode of a file that are kept
// in an xattr give way, field by field, to what somebody sets on the file itself;
// what nobody touched stays as it was, whatever bits the file may not have.
func TestChangeOfAnOverriddenFileIsSeen(t *testing.T) {
	dir := userDir(t, "overridden")
	if dir == "" {
		asUser(t, ordinaryUser())
		return
	}
	archive := newTar()
	for _, name := range []string{"same", "touched", "mode", "locked", "back"} {
		addEntry(archive, &Entry{Path: name, Type: TypeReg, Mode: 0o4755, UID: 7, GID: 8})
	}
	addEntry(archive, &Entry{Path: "dir", Type: TypeDir, Mode: 0o1111, UID: 7, GID: 8})
	addEntry(archive, &Entry{Path: "dir/unreadable", Type: TypeReg, Mode: 0o000, UID: 7, GID: 8})
	o := ApplyOptions{Volatile: true, OverrideStat: true, Skipped: func(p, why string) { t.Errorf("%s: %s", p, why) }}
	if err := Apply(t.Context(), dir, bytes.NewReader(archive.bytes()), o); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		mode uint32
	}{{"mode", 0o750}, {"locked", 0o400}, {"back", 0o700}, {"back", 0o755}, {"dir/unreadable", 0o644}, {"dir", 0o755}} {
		if err := os.Chmod(filepath.Join(dir, c.name), os.FileMode(c.mode)); err != nil {
			t.Fatal(err)
		}
	}
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.WriteFile(filepath.Join(dir, "touched"), []byte("x"), 0))
	fd, err := sys.OpenDir(dir)
	must(err)
	defer fd.Close()
	for name, want := range map[string]uint32{
		"same": 0o4755, "touched": 0o4755, "mode": 0o750, "locked": 0o400, "back": 0o4755, "dir": 0o755, "dir/unreadable": 0o644,
	} {
		e, err := ReadEntryOptions(fd, name, ReadOptions{OverrideStat: true})
		if err != nil || e.Mode != want || e.UID != 7 || e.GID != 8 {
			t.Errorf("%s: %04o %d:%d, not %04o 7:8 (%v)", name, e.Mode, e.UID, e.GID, want, err)
		}
	}
}

// TestOverrideGivesWayToAChown, which only ids that the process may set show.
func TestOverrideGivesWayToAChown(t *testing.T) {
	own := uint32(os.Geteuid())
	xattr := func() map[string]string { return map[string]string{overrideXattr: FormatOverride(7, 8, 0o640, "file")} }
	for _, c := range []struct{ real, want Entry }{
		{Entry{UID: own, GID: own, Mode: 0o640}, Entry{UID: 7, GID: 8, Mode: 0o640}},
		{Entry{UID: 1000, GID: own, Mode: 0o640}, Entry{UID: 1000, GID: 8, Mode: 0o640}},
		{Entry{UID: own, GID: 1000, Mode: 0o644}, Entry{UID: 7, GID: 1000, Mode: 0o644}},
	} {
		e := c.real
		e.Type, e.Xattrs = TypeReg, xattr()
		c.want.Type = TypeReg
		if err := applyOverride(&e); err != nil || !reflect.DeepEqual(e, c.want) {
			t.Errorf("%+v: %+v, not %+v (%v)", c.real, e, c.want, err)
		}
	}
}
