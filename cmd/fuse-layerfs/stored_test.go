package main

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
	"golang.org/x/sys/unix"
)

const storedXattr = "user.containers.override_stat"

// ownersChange is what root and a user do in a mount.
const ownersChange = `cd $1
chown 1000:1001 f; chmod 4711 f
mkdir d; chown 5:6 d; chmod 2775 d
echo new >d/new; mkdir d/sub
chmod 640 dir/below
mkdir -m 1777 pub`

const usersChange = `cd $1/pub
umask 027
echo mine >mine; mkdir dir; mkfifo fifo; ln -s target link
chmod 600 mine; ln mine mine2; echo x >gone; rm gone; mv dir dir2; echo y >dir2/f; chmod 400 dir2/f`

// theirUsersChange is what fuse-overlayfs 1.10 can do in this way: with it a chmod
// takes the owner back, and xattr_permissions=1 makes neither fifos nor symlinks.
const theirUsersChange = `cd $1/pub
umask 027
echo mine >mine; ln mine mine2; mkdir dir2; echo y >dir2/f; chmod 400 dir2/f`

// shell runs a script in a shell, of a user's if uid is not 0.
func shell(t *testing.T, uid uint32, script string, args ...string) {
	t.Helper()
	cmd := exec.Command("/bin/sh", append([]string{"-ec", script, "sh"}, args...)...)
	if uid != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// owners lists type, mode, owner and content of all below dir.
func owners(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	must(t, filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		st, err := sys.LstatPath(p)
		if err != nil {
			return err
		}
		var content []byte
		if st.IsReg() {
			if content, err = os.ReadFile(p); err != nil {
				return err
			}
		}
		fmt.Fprintf(&b, "%s %o %d:%d %q listed as %v\n", strings.TrimPrefix(p, dir), st.Mode, st.UID, st.GID, content, e.Type())
		return nil
	}))
	return b.String()
}

// mountStored mounts by either program, and returns what unmounts.
func mountStored(t *testing.T, dir string, ours bool, permissions string) (unmount func()) {
	t.Helper()
	m := filepath.Join(dir, "m")
	options := fmt.Sprintf("lowerdir=%[1]s/l,upperdir=%[1]s/u,workdir=%[1]s/w,xattr_permissions=%[2]s", dir, permissions)
	if ours {
		start(t, dir, program("-o", options, m))
	} else {
		start(t, dir, exec.Command("fuse-overlayfs", "-o", options+",allow_other", m))
	}
	done := false
	unmount = func() {
		if !done {
			done = true
			testenv.Unmount(t, m)
		}
	}
	t.Cleanup(unmount)
	return unmount
}

// What one of the two programs keeps in xattrs the other shows.
func TestOwnersInXattrsAreFuseOverlayfss(t *testing.T) {
	if _, err := exec.LookPath("fuse-overlayfs"); err != nil {
		testenv.Skip(t, "no fuse-overlayfs (Debian: fuse-overlayfs)")
	}
	for _, permissions := range []string{"1", "2"} {
		for _, ours := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, written by us %v", permissions, ours), func(t *testing.T) {
				dir := layers(t)
				must(t, os.Mkdir(filepath.Join(dir, "l", "dir"), 0o755))
				must(t, os.WriteFile(filepath.Join(dir, "l", "dir", "below"), []byte("b"), 0o600))
				must(t, os.Chown(filepath.Join(dir, "l", "dir", "below"), 7, 8))
				m := filepath.Join(dir, "m")
				if permissions == "2" {
					// Else we take user.containers.override_stat, which older ones do not write.
					must(t, unix.Setxattr(filepath.Join(dir, "u"), "user.fuseoverlayfs.override_stat", []byte("0:0:755"), 0))
				}
				unmount := mountStored(t, dir, ours, permissions)
				shell(t, 0, ownersChange, m)
				if ours {
					shell(t, 1000, usersChange, m)
					wantOwners(t, m)
				} else {
					shell(t, 1000, theirUsersChange, m)
				}
				unmount()
				// The files themselves are the server's.
				for _, p := range []string{"f", "d", "pub/mine", "pub/dir2", "dir/below"} {
					st, err := sys.LstatPath(filepath.Join(dir, "u", p))
					if err != nil || st.UID != 0 || st.GID != 0 || ours && st.Mode&0o7000 != 0 {
						t.Errorf("%s in the upper: mode %o, owner %d:%d, %v", p, st.Mode, st.UID, st.GID, err)
					}
				}
				unmount = mountStored(t, dir, true, permissions)
				we := owners(t, m)
				unmount()
				unmount = mountStored(t, dir, false, permissions)
				if they := owners(t, m); they != we {
					t.Errorf("fuse-overlayfs shows\n%s\nand we\n%s", they, we)
				}
				unmount()
			})
		}
	}
}

// wantOwners says what the changes must have made.
func wantOwners(t *testing.T, m string) {
	t.Helper()
	list := owners(t, m)
	for _, want := range []string{
		"/f 104711 1000:1001 \"lower\"", "/d 42775 5:6", "/d/new 100644 0:6 \"new\\n\"", "/d/sub 42755 0:6",
		"/dir/below 100640 7:8 \"b\"", "/pub 41777 0:0", "/pub/mine 100600 1000:1000 \"mine\\n\"", "/pub/mine2 100600 1000:1000",
		"/pub/dir2 40750 1000:1000", "/pub/dir2/f 100400 1000:1000 \"y\\n\"", "/pub/fifo 10640 1000:1000", "/pub/link 120777 1000:1000",
	} {
		if !strings.Contains(list, "\n"+want+" ") {
			t.Errorf("no %q in\n%s", want, list)
		}
	}
	if n, err := unix.Listxattr(filepath.Join(m, "f"), nil); err != nil || n > 0 {
		t.Errorf("%d bytes of names of xattrs show, %v", n, err)
	}
	// A user's write takes setuid away.
	must(t, os.Chmod(filepath.Join(m, "pub/mine"), 0o4777))
	shell(t, 2000, "echo more >>"+filepath.Join(m, "pub/mine"))
	if st, err := sys.LstatPath(filepath.Join(m, "pub/mine")); err != nil || st.Mode != 0o100777 {
		t.Errorf("after a write by another user: %o, %v", st.Mode, err)
	}
}

// Files of somebody else, which an ordinary user's server cannot give away, keep
// their owner over a copy-up, and device nodes that a regular file stands for show.
func TestOwnersInXattrsOfAnOrdinaryUser(t *testing.T) {
	dir := ordinaryLayers(t)
	l := filepath.Join(dir, "l")
	for name, value := range map[string]string{".": "3:4:777:dir", "f": "5:6:666:file", "null": "0:0:666:char-1-3"} {
		p := filepath.Join(l, name)
		if name == "null" {
			must(t, os.WriteFile(p, nil, 0o644))
		}
		must(t, unix.Setxattr(p, storedXattr, []byte(value), 0))
	}
	cmd := program("-o", "lowerdir=l,upperdir=u,workdir=w,userxattr,xattr_permissions=2", "m")
	cmd.Env = append(cmd.Env, "TEST_DIR="+dir)
	nobody := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: ordinary, Gid: ordinary}}
	cmd.SysProcAttr = nobody
	start(t, dir, cmd)
	sh := exec.Command("/bin/sh", "-ec", `test "$(stat -c %u:%g:%a m m/f)" = "3:4:777
5:6:666"
test "$(stat -c %F:%t:%T m/null)" = "character special file:1:3"
echo more >>m/f; test "$(stat -c %u:%g:%a m/f)" = 5:6:666
echo own >m/own; chmod 0 m/own; test "$(stat -c %u:%a m/own)" = 65534:0; mv m/null m/d; rm m/own
test "$(stat -c %F m/d)" = "character special file"; ls m >list; fusermount3 -u m`)
	sh.Dir, sh.SysProcAttr = dir, nobody
	must(t, os.Chmod(dir, 0o777))
	if out, err := sh.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
		_ = sys.Umount(filepath.Join(dir, "m"), sys.MNT_DETACH)
	}
	testenv.Eventually(t, "the server ends", func() bool { return serverOf(t, dir) == 0 })
	for name, want := range map[string]string{".": "3:4:777:dir", "f": "5:6:666", "d": "0:0:666:char-1-3"} {
		b := make([]byte, 100)
		n, err := unix.Getxattr(filepath.Join(dir, "u", name), storedXattr, b)
		if err != nil || string(b[:n]) != want {
			t.Errorf("%s in the upper says %q, %v, want %q", name, b[:max(n, 0)], err, want)
		}
	}
}
