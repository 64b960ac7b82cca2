package union

import (
	"errors"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

func TestOwnersBothWays(t *testing.T) {
	seven := uint32(7)
	o := newOwners(&Config{IDMap: IDMap{UIDs: []IDRange{{Shown: 1000, Host: 0, Size: 10}, {Shown: 5000, Host: 100, Size: 1}}}})
	for host, want := range map[uint32]uint32{0: 1000, 9: 1009, 10: overflowID, 100: 5000, 101: overflowID} {
		uid, gid := o.shown(host, host)
		if uid != want || gid != host {
			t.Errorf("%d:%d is shown as %d:%d, want %d:%d", host, host, uid, gid, want, host)
		}
		back, err := o.host(Caller{UID: uid, GID: gid})
		if want == overflowID {
			if !errors.Is(err, syscall.EOVERFLOW) {
				t.Errorf("%d, which is nobody, is stored as %d (%v)", uid, back.UID, err)
			}
		} else if err != nil || back.UID != host {
			t.Errorf("%d is stored as %d (%v), want %d", uid, back.UID, err, host)
		}
	}
	o = newOwners(&Config{Squash: Squash{UID: &seven}})
	if uid, gid := o.shown(1, 2); uid != 7 || gid != 2 {
		t.Errorf("squashed: %d:%d", uid, gid)
	}
	if c, err := o.host(Caller{UID: 0, GID: 3}); err != nil || c.UID != 7 || c.GID != 3 {
		t.Errorf("squashed, stored: %+v, %v", c, err)
	}
}

// TestMappedOwnersOnDisk: what is made and changed through the map has the stored
// ids in the upper, ACLs too, and looks as it was asked for.
func TestMappedOwnersOnDisk(t *testing.T) {
	testenv.Root(t)
	testenv.Program(t, "setfacl", "acl")
	dir := testenv.FS(t, "ext4")
	for _, d := range []string{"l", "u", "w"} {
		if err := os.Mkdir(dir+"/"+d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	low := dir + "/l/f"
	if err := errors.Join(os.WriteFile(low, nil, 0o644), os.Chown(low, 5, 6)); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("setfacl", "-m", "u:8:rw,g:9:r", low).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	ranges := []IDRange{{Shown: 100_000, Host: 0, Size: 1000}}
	fs, err := Open(t.Context(), Config{Lowers: []string{dir + "/l"}, Upper: dir + "/u", Work: dir + "/w", IDMap: IDMap{UIDs: ranges, GIDs: ranges}})
	if err != nil {
		t.Fatal(err)
	}
	defer fs.Close()
	e, err := fs.Lookup(fs.Root(), "f")
	if err != nil || e.Attr.UID != 100_005 || e.Attr.GID != 100_006 {
		t.Fatalf("f: %+v, %v", e.Attr, err)
	}
	acl := make([]byte, 1024)
	n, err := fs.Getxattr(e.Node, "system.posix_acl_access", acl)
	if err != nil || !strings.Contains(string(acl[:n]), "\xa8\x86\x01\x00") { // 100008
		t.Fatalf("the ACL is shown as %x, %v", acl[:n], err)
	}
	if err := fs.Setxattr(Caller{}, e.Node, "system.posix_acl_access", acl[:n], 0, false); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("getfacl", "-nc", dir+"/u/f").CombinedOutput(); err != nil || !strings.Contains(string(out), "user:8:rw-") || !strings.Contains(string(out), "group:9:r--") {
		t.Errorf("the ACL in the upper: %v\n%s", err, out)
	}
	if _, err := fs.Setattr(Caller{}, e.Node, nil, SetAttr{Valid: SetUID, UID: 100_007}); err != nil {
		t.Fatal(err)
	}
	if _, err := fs.Setattr(Caller{}, e.Node, nil, SetAttr{Valid: SetUID, UID: 7}); err != syscall.EOVERFLOW {
		t.Errorf("chown to somebody without a place in the map: %v", err)
	}
	d, err := fs.Mkdir(Caller{UID: 100_001, GID: 100_002}, fs.Root(), "d", 0o755)
	if err != nil || d.Attr.UID != 100_001 || d.Attr.GID != 100_002 {
		t.Fatalf("d: %+v, %v", d.Attr, err)
	}
	if _, err := fs.Mkdir(Caller{UID: 1, GID: 1}, fs.Root(), "e", 0o755); err != syscall.EOVERFLOW {
		t.Errorf("made by somebody without a place in the map: %v", err)
	}
	for name, want := range map[string][2]uint32{"f": {7, 6}, "d": {1, 2}} {
		st, err := sys.LstatPath(dir + "/u/" + name)
		if err != nil || st.UID != want[0] || st.GID != want[1] {
			t.Errorf("%s in the upper belongs to %d:%d (%v), want %v", name, st.UID, st.GID, err, want)
		}
	}
}

// TestStoredOwners: what the xattr says, and what it cannot say.
func TestStoredOwners(t *testing.T) {
	reg := sys.Stat{UID: 1, GID: 2, Mode: sys.S_IFREG | 0o600, Size: 5}
	for v, want := range map[string]sys.Stat{
		"7:8:4755":            {UID: 7, GID: 8, Mode: sys.S_IFREG | 0o4755, Size: 5},
		"7:8:100644":          {UID: 7, GID: 8, Mode: sys.S_IFREG | 0o644, Size: 5}, // fuse-overlayfs writes the type, too
		"0:0:000644:file":     {Mode: sys.S_IFREG | 0o644, Size: 5},
		"0:0:666:char-1-3":    {Mode: sys.S_IFCHR | 0o666, RdevMajor: 1, RdevMinor: 3},
		"0:0:640:block-8-300": {Mode: sys.S_IFBLK | 0o640, RdevMajor: 8, RdevMinor: 300},
		"0:0:640:pipe":        {Mode: sys.S_IFIFO | 0o640},
	} {
		st := reg
		if !parseStored(v, &st) || st != want {
			t.Errorf("%q: %+v", v, st)
		}
		again := reg
		if !parseStored(string(appendStored(&st, sys.S_IFREG)), &again) || again != want {
			t.Errorf("%q is written as %q", v, appendStored(&st, sys.S_IFREG))
		}
	}
	for _, v := range []string{"", "1:2", "1:2:8", "-1:2:3", "1:2:3:dir", "1:2:3:char", "1:2:3:char-0-0", "1:2:3:char-1", "1:2:3:pipe-1-1", "1:2:3:what"} {
		if st := reg; parseStored(v, &st) {
			t.Errorf("%q is taken for %+v", v, st)
		}
	}
}

// What does not go together is refused by name.
func TestPermissionsWithIndexAreRefused(t *testing.T) {
	fs, err := Open(t.Context(), Config{Lowers: []string{t.TempDir()}, Permissions: PermissionsContainers, Index: true})
	if !errors.Is(err, syscall.EOPNOTSUPP) || !strings.Contains(err.Error(), "xattr_permissions=2 with index=on") {
		t.Errorf("%v, %v", fs, err)
	}
}
