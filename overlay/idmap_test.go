package overlay

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"slices"
	"syscall"
	"testing"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/faults"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/layer"
)

// hostIDs maps a container's ids to 100000 and up.
var hostIDs = drivers.IDMap{
	UIDs: []drivers.IDRange{{ContainerID: 0, HostID: 100000, Size: 65536}},
	GIDs: []drivers.IDRange{{ContainerID: 0, HostID: 100000, Size: 65536}},
}

// neighbours maps to ids that the map has on its other side, too: whoever shifts
// one of them twice gets another's.
var neighbours = drivers.IDMap{
	UIDs: []drivers.IDRange{{ContainerID: 0, HostID: 1000, Size: 65536}},
	GIDs: []drivers.IDRange{{ContainerID: 0, HostID: 1000, Size: 65536}},
}

const (
	// struct posix_acl_xattr, version 2: u::rw- u:1000:rwx g::r-- m::rwx o::r--.
	aclOf1000 = "\x02\x00\x00\x00\x01\x00\x06\x00\xff\xff\xff\xff\x02\x00\x07\x00\xe8\x03\x00\x00\x04\x00\x04\x00\xff\xff\xff\xff\x10\x00\x07\x00\xff\xff\xff\xff\x20\x00\x04\x00\xff\xff\xff\xff"
	// struct vfs_cap_data, revision 2: cap_net_raw+ep.
	netRaw = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
)

// mappedBase is a layer whose files have owners, an ACL, a capability.
func (b *bench) mappedBase() drivers.Ref {
	return b.layer(drivers.Ref{}, func(dir string) {
		for _, n := range []string{"acl", "cap", "own", "d/f", "d/g"} {
			b.file(dir+"/"+n, n)
			b.check(os.Chown(dir+"/"+n, 1000, 1001))
		}
		b.check(syscall.Chmod(dir+"/own", 0o4755))
		b.check(syscall.Setxattr(dir+"/acl", "system.posix_acl_access", []byte(aclOf1000), 0))
		b.check(syscall.Setxattr(dir+"/cap", "security.capability", []byte(netRaw), 0))
		b.check(os.Symlink("d", dir+"/link"))
	})
}

// as runs a program as a container's user.
func (b *bench) as(uid uint32, args ...string) {
	b.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	if out, err := cmd.CombinedOutput(); err != nil {
		b.Fatalf("%v as %d: %v: %s", args, uid, err, out)
	}
}

// A change made through an id map is, in the stored layer and in the changeset,
// the change that the container made with its own ids.
func TestIDMappedChangeIsExact(t *testing.T) {
	for name, m := range map[string]drivers.IDMap{"far ids": hostIDs, "overlapping ids": neighbours} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, "ext4", nil)
			base := b.mappedBase()
			host := m.UIDs[0].HostID
			r := b.create(base, drivers.CreateOptions{IDMap: m})
			b.edit(r, func(dir string) {
				for _, n := range []string{"acl", "cap", "own", "d/f"} {
					b.check(os.Chtimes(dir+"/"+n, sometime, sometime)) // copies up
				}
				b.as(host, "mkdir", dir+"/new")
				b.as(host, "sh", "-c", "ln -s d "+dir+"/new/link; echo x > "+dir+"/new/f; mkfifo "+dir+"/new/p")
				b.as(host+1000, "chmod", "600", dir+"/d/g")
			})
			var want []string
			same := func(what string) {
				got, seen := b.tarOf(b.Diff(b.ctx, base, r))
				if want == nil {
					want = append([]string{got}, seen...)
					for _, l := range []string{"C acl (time)", "C cap (time)", "C own (time)", "C d/f (time)", "C d/g (mode)", "A new", "A new/f", "A new/link", "A new/p"} {
						if !slices.Contains(seen, l) {
							t.Errorf("%s: no %q in %q", what, l, seen)
						}
					}
				}
				if !slices.Equal(seen, want[1:]) || got != want[0] {
					t.Errorf("%s: %q, want %q", what, seen, want[1:])
				}
			}
			same("before Commit")
			b.stopAndCommit(r)
			same("after Commit")
			b.exact(base, r)
			b.plainOwners(r)
		})
	}
}

var sometime = unixTime(1_500_000_000)

// stopAndCommit stops the Commit after each of its steps, and at last lets it
// come to its end.
func (b *bench) stopAndCommit(r drivers.Ref) {
	b.Helper()
	stopped := errors.New("stopped")
	for n := range 50 {
		at := 0
		ctx := faults.With(context.Background(), func(string) error {
			if at++; at > n {
				return stopped
			}
			return nil
		})
		_, err := b.Commit(ctx, r, drivers.CommitOptions{})
		if err == nil {
			return
		}
		b.wants("stopped", err, stopped)
	}
	b.Fatal("it never ends")
}

// plainOwners looks at what is stored.
func (b *bench) plainOwners(r drivers.Ref) {
	b.Helper()
	fs, err := sys.OpenDir(b.fs(r.ID))
	b.check(err)
	defer fs.Close()
	for n, uid := range map[string]uint32{"": 0, "own": 1000, "d/f": 1000, "new": 0, "new/link": 0, "new/p": 0} {
		st, err := fs.Stat(n)
		b.check(err)
		if st.UID != uid {
			b.Errorf("%q belongs to %d, want %d", n, st.UID, uid)
		}
		if _, err := fs.Getxattr(n, targetXattr); !errors.Is(err, syscall.ENODATA) {
			b.Errorf("%q has still a note: %v", n, err)
		}
	}
	st, err := fs.Stat("own")
	b.check(err)
	if st.Mode&0o7777 != 0o4755 {
		b.Errorf("own has mode %o", st.Mode)
	}
	for n, want := range map[string][2]string{"acl": {"system.posix_acl_access", aclOf1000}, "cap": {"security.capability", netRaw}} {
		if v, err := fs.Getxattr(n, want[0]); err != nil || v != want[1] {
			b.Errorf("%s: %s is %q, %v", n, want[0], v, err)
		}
	}
}

// A child of an id-mapped layer is stored as all others are.
func TestChildOfIDMapped(t *testing.T) {
	b := newBench(t, "tmpfs", nil)
	base := b.mappedBase()
	r := b.create(base, drivers.CreateOptions{IDMap: hostIDs})
	b.edit(r, func(dir string) { b.as(100000, "touch", dir+"/d") })
	b.commit(r)
	child := b.layer(r, func(dir string) {
		st, err := sys.StatPath(dir + "/d/f")
		b.check(err)
		if st.UID != 1000 {
			t.Errorf("d/f belongs to %d", st.UID)
		}
		b.file(dir+"/d/f", "changed")
	})
	b.exact(base, child)
	if err := b.Apply(b.ctx, b.create(base, drivers.CreateOptions{IDMap: hostIDs}), nil, layer.ApplyOptions{}); err == nil {
		t.Error("Apply onto an id-mapped layer")
	}
}
