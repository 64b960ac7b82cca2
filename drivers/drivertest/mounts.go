package drivertest

import (
	"errors"
	"os"
	"os/exec"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"syscall"

	cmount "github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/mount"
)

var mountCases = []testCase{
	{"mounts are data and the same each time", mountsRepeat},
	{"committed layers, views and read-only mounts refuse writes", readOnlyMounts},
	{"containerd mounts the same tree", containerdMounts},
	{"containerd mounts a writable layer", containerdWritable},
	{"owner is the inverse of mounts", ownerOfMounts},
	{"owner of what mountinfo shows", ownerOfMountinfo},
	{"owner of what is not ours", ownerOfOthers},
	{"external mounts say when a page is too small", externalPage},
	{"id map shows shifted owners", idMapShows},
	{"id map of a mount", idMapOfMount},
	{"quota stops a writer", quotaStops},
	{"a quota that is a size is never below the parent's", quotaIsSize},
}

// three makes a committed layer, a writable child and a view.
func (k *kit) three() map[string]drivers.Ref {
	k.Helper()
	base := k.layer(drivers.Ref{}, func(dir string) {
		k.check(os.MkdirAll(dir+"/d", 0o755))
		k.check(os.WriteFile(dir+"/d/f", []byte("base"), 0o644))
	})
	child := k.create(base, drivers.CreateOptions{})
	k.edit(child, func(dir string) { k.check(os.WriteFile(dir+"/d/g", []byte("child"), 0o644)) })
	return map[string]drivers.Ref{
		"committed": base, "writable": child,
		"view": k.create(base, drivers.CreateOptions{ReadOnly: true}),
	}
}

func mountsRepeat(k *kit) {
	for name, r := range k.three() {
		one, two := k.mountsOf(r, drivers.MountOptions{}), k.mountsOf(r, drivers.MountOptions{})
		if !reflect.DeepEqual(one, two) {
			k.Errorf("%s: %v, then %v", name, one, two)
		}
		infos, err := mount.List()
		k.check(err)
		for _, i := range infos {
			if id, ok := k.driver.Owner([]mount.Mount{i.Mount()}); ok && id == r.ID {
				k.Errorf("%s: Mounts mounted it at %s", name, i.Target)
			}
		}
	}
}

func readOnlyMounts(k *kit) {
	refuses := func(what string, r drivers.Ref, o drivers.MountOptions) {
		dir := k.mount(r, o)
		for verb, err := range map[string]error{
			"create": os.WriteFile(dir+"/new", nil, 0o644),
			"write":  os.WriteFile(dir+"/d/f", nil, 0o644),
			"mkdir":  os.Mkdir(dir+"/n", 0o755),
			"unlink": os.Remove(dir + "/d/f"),
			"chmod":  os.Chmod(dir, 0o700),
		} {
			if !errors.Is(err, syscall.EROFS) {
				k.Errorf("%s: %s: %v, want EROFS", what, verb, err)
			}
		}
		k.umount(dir)
	}
	all := k.three()
	refuses("committed", all["committed"], drivers.MountOptions{})
	refuses("view", all["view"], drivers.MountOptions{})
	refuses("writable, mounted read-only", all["writable"], drivers.MountOptions{ReadOnly: true})
	dir := k.mount(all["writable"], drivers.MountOptions{})
	k.check(os.WriteFile(dir+"/new", nil, 0o644))
}

// containerdMounts performs the mounts with containerd's own code.
func containerdMounts(k *kit) {
	for name, r := range k.three() {
		want := k.tree(r)
		ms := k.mountsOf(r, drivers.MountOptions{External: true, ReadOnly: name == "writable"})
		target := k.dir()
		if err := cmount.All(ms, target); err != nil {
			k.Errorf("%s: containerd's mount.All of %v: %v", name, ms, err)
			continue
		}
		k.mounts = append(k.mounts, target)
		k.same(name+", mounted by containerd", k.list(target), want)
		k.umount(target)
	}
}

func containerdWritable(k *kit) {
	r := k.three()["writable"]
	target := k.dir()
	k.check(cmount.All(k.mountsOf(r, drivers.MountOptions{External: true}), target))
	k.mounts = append(k.mounts, target)
	k.check(os.WriteFile(target+"/d/h", []byte("by containerd"), 0o644))
	want := k.list(target)
	k.umount(target)
	k.commit(r)
	k.same("what containerd's mount wrote", k.tree(r), want)
}

func ownerOfMounts(k *kit) {
	for name, r := range k.three() {
		for _, o := range []drivers.MountOptions{{}, {ReadOnly: true}, {External: true}} {
			ms := k.mountsOf(r, o)
			if id, ok := k.driver.Owner(ms); !ok || id != r.ID {
				k.Errorf("%s: Owner(%v) is %s, %v; want %s", name, ms, id, ok, r.ID)
			}
		}
	}
}

func ownerOfMountinfo(k *kit) {
	for name, r := range k.three() {
		target := k.mount(r, drivers.MountOptions{})
		infos, err := mount.List()
		k.check(err)
		at := slices.IndexFunc(infos, func(i mount.Info) bool { return i.Target == target })
		if at < 0 {
			k.Fatalf("%s: mountinfo has nothing at %s", name, target)
		}
		if id, ok := k.driver.Owner([]mount.Mount{infos[at].Mount()}); !ok || id != r.ID {
			k.Errorf("%s: Owner of mountinfo's %+v is %s, %v; want %s", name, infos[at], id, ok, r.ID)
		}
		k.umount(target)
	}
}

func ownerOfOthers(k *kit) {
	other := k.open(k.beside + "/other")
	defer other.Close()
	r := drivers.Ref{ID: 1}
	k.check(other.Create(k.ctx, r, drivers.CreateOptions{}))
	theirs, err := other.Mounts(k.ctx, r, drivers.MountOptions{})
	k.check(err)
	for _, ms := range [][]mount.Mount{
		nil, theirs,
		{{Type: "bind", Source: "/etc", Options: []string{"rbind"}}},
		{{Type: "bind", Source: k.root, Options: []string{"rbind"}}},
		{{Type: "tmpfs", Source: "tmpfs"}},
		{{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=/usr:/etc"}}},
	} {
		if id, ok := k.driver.Owner(ms); ok {
			k.Errorf("Owner(%v) is %s", ms, id)
		}
	}
	k.check(other.Remove(k.ctx, r.ID))
}

// externalPage climbs to where one page of mount options ends.
func externalPage(k *kit) {
	limit := k.caps.ExternalParents
	if limit == 0 {
		k.Skip("the driver's mounts have one length whatever the depth")
	}
	if limit > 1000 {
		k.Fatalf("ExternalParents %d cannot be true of one page", limit)
	}
	r := k.chain(limit)
	top := k.create(r, drivers.CreateOptions{ReadOnly: true})
	_, err := k.driver.Mounts(k.ctx, top, drivers.MountOptions{External: true})
	k.wants("mounts of one parent too many", err, errdefs.ErrFailedPrecondition)
	if n := itoa(len(top.Parents)); !strings.Contains(err.Error(), n) {
		k.Errorf("the error names not the %s lowers: %v", n, err)
	}
	k.mount(top, drivers.MountOptions{}) // package mount takes it
	under := k.create(drivers.Ref{ID: r.Parents[0], Parents: r.Parents[1:]}, drivers.CreateOptions{ReadOnly: true})
	ms := k.mountsOf(under, drivers.MountOptions{External: true})
	target := k.dir()
	k.check(cmount.All(ms, target))
	k.mounts = append(k.mounts, target)
}

// shifted maps a container's ids to 100000 and up.
var shifted = drivers.IDMap{
	UIDs: []drivers.IDRange{{ContainerID: 0, HostID: 100000, Size: 65536}},
	GIDs: []drivers.IDRange{{ContainerID: 0, HostID: 100000, Size: 65536}},
}

func (k *kit) needsIDMap() drivers.Ref {
	k.Helper()
	if !k.caps.IDMap {
		k.Skip("no id maps")
	}
	return k.layer(drivers.Ref{}, func(dir string) {
		k.check(os.WriteFile(dir+"/f", []byte("x"), 0o644))
		k.check(os.Chown(dir+"/f", 1000, 1001))
	})
}

func (k *kit) wantOwner(path string, uid, gid uint32) {
	k.Helper()
	st, err := os.Lstat(path)
	k.check(err)
	if s := st.Sys().(*syscall.Stat_t); s.Uid != uid || s.Gid != gid {
		k.Errorf("%s belongs to %d:%d, want %d:%d", path, s.Uid, s.Gid, uid, gid)
	}
}

func idMapShows(k *kit) {
	base := k.needsIDMap()
	r := k.create(base, drivers.CreateOptions{IDMap: shifted})
	k.edit(r, func(dir string) {
		k.wantOwner(dir+"/f", 101000, 101001)
		k.wantOwner(dir, 100000, 100000)
		// A directory made by the container's root, as our own id has no place in
		// the map; and a change to a file of the parent.
		mkdir := exec.Command("mkdir", dir+"/d")
		mkdir.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 100000, Gid: 100000}}
		if out, err := mkdir.CombinedOutput(); err != nil {
			k.Fatalf("mkdir as 100000: %v: %s", err, out)
		}
		k.check(os.Chmod(dir+"/f", 0o600))
	})
	k.commit(r)
	dir := k.mount(r, drivers.MountOptions{})
	k.wantOwner(dir+"/f", 101000, 101001)
	k.wantOwner(dir+"/d", 100000, 100000)
	k.wantOwner(k.mount(base, drivers.MountOptions{})+"/f", 1000, 1001)
}

func idMapOfMount(k *kit) {
	base := k.needsIDMap()
	view := k.create(base, drivers.CreateOptions{ReadOnly: true})
	dir := k.mount(view, drivers.MountOptions{IDMap: shifted})
	k.wantOwner(dir+"/f", 101000, 101001)
	if err := os.WriteFile(dir+"/new", nil, 0o644); !errors.Is(err, syscall.EROFS) {
		k.Errorf("write: %v, want EROFS", err)
	}
	k.umount(dir)
	k.wantOwner(k.mount(view, drivers.MountOptions{})+"/f", 1000, 1001)
}

func quotaStops(k *kit) {
	if !k.caps.Quota {
		k.Skip("no quota")
	}
	base := k.layer(drivers.Ref{}, func(dir string) {
		k.check(os.WriteFile(dir+"/large", make([]byte, 4<<20), 0o644))
	})
	quota := int64(8 << 20)
	if k.caps.LeastQuota > 0 {
		quota = k.caps.LeastQuota + 256<<20
	}
	r := k.create(base, drivers.CreateOptions{Quota: quota})
	free := k.create(base, drivers.CreateOptions{})
	dir := k.mount(r, drivers.MountOptions{})
	if k.caps.LeastQuota > 0 {
		k.ballast(dir, 8<<20) // so that 8 MiB are left here, too
	}
	k.check(os.WriteFile(dir+"/fits", make([]byte, 2<<20), 0o644))
	err := writeSynced(dir+"/too much", 32<<20)
	if !errors.Is(err, syscall.ENOSPC) && !errors.Is(err, syscall.EDQUOT) {
		k.Errorf("32 MiB into a quota of which 8 are left: %v, want ENOSPC or EDQUOT", err)
	}
	k.check(os.Remove(dir + "/too much"))
	k.check(os.Remove(dir + "/large")) // a deletion of the parent's file fits, too
	k.check(writeSynced(k.mount(free, drivers.MountOptions{})+"/f", 32<<20))
}

// ballast takes the space of a file system but for so many bytes, without a write.
func (k *kit) ballast(dir string, left int64) {
	k.Helper()
	s, err := sys.StatfsPath(dir)
	k.check(err)
	f, err := sys.Open(dir+"/ballast", sys.O_RDWR|sys.O_CREAT, 0o600)
	k.check(err)
	defer f.Close()
	k.check(f.Allocate(int64(s.BlocksUser)*s.BlockSize - left))
}

// room is the size of the file system that a layer shows.
func (k *kit) room(r drivers.Ref) int64 {
	k.Helper()
	dir := k.mount(r, drivers.MountOptions{})
	defer k.umount(dir)
	s, err := sys.StatfsPath(dir)
	k.check(err)
	return int64(s.Blocks) * s.BlockSize
}

func quotaIsSize(k *kit) {
	least := k.caps.LeastQuota
	if least == 0 {
		k.Skip("any quota will do")
	}
	const more = 512 << 20
	k.wants("a quota below the least", k.driver.Create(k.ctx, k.ref(drivers.Ref{}), drivers.CreateOptions{Quota: least - 1<<20}), errdefs.ErrInvalidArgument)
	same := k.create(drivers.Ref{}, drivers.CreateOptions{Quota: least})
	large := k.create(drivers.Ref{}, drivers.CreateOptions{Quota: least + more, RootOwner: &drivers.Owner{UID: 7, GID: 8}})
	if has := k.room(large) - k.room(same); has < more*9/10 || has > more {
		k.Errorf("a quota of 512 MiB more has %d bytes more", has)
	}
	dir := k.mount(large, drivers.MountOptions{})
	k.wantRoot(dir, 7, 8)
	k.check(os.WriteFile(dir+"/f", []byte("x"), 0o644))
	k.umount(dir)
	if u := k.used(large); u.Bytes > least/100+8*mib {
		k.Errorf("a layer with one small file has %d bytes, for being large", u.Bytes)
	}
	k.commit(large)
	child := k.create(large, drivers.CreateOptions{})
	if has, want := k.room(child), k.room(large); has != want {
		k.Errorf("a child has %d bytes, its parent %d", has, want)
	}
	r := k.ref(large)
	err := k.driver.Create(k.ctx, r, drivers.CreateOptions{Quota: least})
	k.wants("a quota below the parent's", err, errdefs.ErrInvalidArgument)
	for _, n := range []int64{least, least + more} {
		if !strings.Contains(err.Error(), strconv.FormatInt(n, 10)) {
			k.Errorf("the error does not say %d: %v", n, err)
		}
	}
	larger := k.create(large, drivers.CreateOptions{Quota: least + 3*more})
	want := k.tree(large)
	k.same("a larger child", k.tree(larger), want)
	k.edit(larger, func(dir string) { k.check(os.WriteFile(dir+"/g", []byte("y"), 0o600)) })
	k.diffIsExact(large, larger)
	k.check(k.driver.Create(k.ctx, r, drivers.CreateOptions{Quota: least, ReadOnly: true})) // a view's says nothing
	k.same("a view", k.tree(r), want)
}

func writeSynced(path string, size int) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = f.Write(make([]byte, size))
	return errors.Join(err, f.Sync(), f.Close())
}
