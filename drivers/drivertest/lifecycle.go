package drivertest

import (
	"context"
	"errors"
	"os"
	"reflect"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/kprobe"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/layer"
)

var lifecycleCases = []testCase{
	{"probe says yes and leaves nothing", probeLeavesNothing},
	{"capabilities are constant and kept", capabilitiesKept},
	{"what must be is", mustBe},
	{"unknown option is refused by name", unknownOption},
	{"new layer is an empty root", newLayerIsEmpty},
	{"root owner", rootOwner},
	{"child looks like its parent", childLooksLikeParent},
	{"view of nothing is empty", viewOfNothing},
	{"create of what exists", createExisting},
	{"create of ID 0", createZero},
	{"create on a parent that is not there", createOrphan},
	{"create with what the driver lacks", createUnsupported},
	{"absent layer", absentLayer},
	{"commit only once", commitOnce},
	{"commit of a view", commitView},
	{"commit on other parents", commitOtherParents},
	{"rebase at commit", rebase},
	{"apply only onto writable layers", applyOnlyWritable},
	{"remove is idempotent", removeIdempotent},
	{"remove of each state", removeEachState},
	{"remove of protected files", removeProtected},
	{"remove of a deep tree", removeDeep},
	{"an ID after its removal", createAgain},
	{"closed and opened again", reopen},
	{"close leaves mounts in place", closeLeavesMounts},
	{"two open one root", twoOpen},
	{"errors have one form", errorForm},
}

func probeLeavesNothing(k *kit) {
	p := k.fs.cfg.Factory.Probe(k.ctx, k.beside)
	if p.Works != kprobe.Yes {
		k.Fatalf("Probe: %v: %s", p.Works, p.Reason)
	}
	if p.Reason == "" {
		k.Error("Probe: no reason in words")
	}
	left, err := os.ReadDir(k.beside)
	k.check(err)
	if len(left) > 0 {
		k.Errorf("Probe left %v", left)
	}
	if p := k.fs.cfg.Factory.Probe(k.ctx, k.beside+"/absent"); p.Works == kprobe.Yes {
		k.Error("Probe of a directory that is not there: yes")
	}
}

func capabilitiesKept(k *kit) {
	if again := k.driver.Capabilities(); !reflect.DeepEqual(again, k.caps) {
		k.Errorf("Capabilities() changed from %+v to %+v", k.caps, again)
	}
	if k.caps.Driver != k.fs.cfg.Factory.Name {
		k.Errorf("Capabilities().Driver is %q, the factory's name %q", k.caps.Driver, k.fs.cfg.Factory.Name)
	}
	if _, is := k.driver.(drivers.Differ); is != k.caps.Diff {
		k.Errorf("Differ: %v, Capabilities().Diff: %v", is, k.caps.Diff)
	}
	if _, is := k.driver.(drivers.Applier); is != k.caps.Apply {
		k.Errorf("Applier: %v, Capabilities().Apply: %v", is, k.caps.Apply)
	}
}

func mustBe(k *kit) {
	must := k.fs.cfg.Must
	if !k.fs.privileged {
		must = k.fs.cfg.MustUnprivileged
	}
	caps := reflect.ValueOf(k.caps)
	for _, m := range must {
		name, kinds, some := strings.Cut(m, ":")
		if some && !slices.Contains(strings.Split(kinds, ","), k.fs.kind) {
			continue
		}
		if f := caps.FieldByName(name); !f.IsValid() || f.Kind() != reflect.Bool || !f.Bool() {
			k.Errorf("%s on %s must have %s", k.caps.Driver, k.fs, name)
		}
	}
	if k.fs.privileged && len(k.caps.Lost) > 0 {
		k.Errorf("root loses %q", k.caps.Lost)
	}
}

func unknownOption(k *kit) {
	d, err := k.fs.cfg.Factory.Open(k.ctx, drivers.Config{Root: k.beside + "/o", Options: map[string]string{"no-such-option": "1"}})
	if err == nil {
		d.Close()
	}
	k.wants("open with an unknown option", err, errdefs.ErrInvalidArgument)
	if !strings.Contains(err.Error(), "no-such-option") {
		k.Errorf("the error does not name the option: %v", err)
	}
}

func newLayerIsEmpty(k *kit) {
	r := k.create(drivers.Ref{}, drivers.CreateOptions{})
	dir := k.mount(r, drivers.MountOptions{})
	k.wantRoot(dir, 0, 0)
	k.check(os.WriteFile(dir+"/f", []byte("x"), 0o644))
}

// wantRoot checks an empty root directory.
func (k *kit) wantRoot(dir string, uid, gid uint32) {
	k.Helper()
	st, err := os.Stat(dir)
	k.check(err)
	raw := st.Sys().(*syscall.Stat_t)
	if raw.Mode&0o7777 != 0o755 || raw.Uid != uid || raw.Gid != gid {
		k.Errorf("root is %04o %d:%d, want 0755 %d:%d", raw.Mode&0o7777, raw.Uid, raw.Gid, uid, gid)
	}
	// or a layer whose archive does not name its root would be another each time
	if raw.Mtim != (syscall.Timespec{}) {
		k.Errorf("root's mtime is %v, want 0", raw.Mtim)
	}
	names, err := os.ReadDir(dir)
	k.check(err)
	if len(names) > 0 {
		k.Errorf("a new layer has %v", names)
	}
}

func rootOwner(k *kit) {
	r := k.create(drivers.Ref{}, drivers.CreateOptions{RootOwner: &drivers.Owner{UID: 1000, GID: 1001}})
	k.wantRoot(k.mount(r, drivers.MountOptions{}), 1000, 1001)
}

func childLooksLikeParent(k *kit) {
	base := k.layer(drivers.Ref{}, func(dir string) {
		k.check(os.WriteFile(dir+"/f", []byte("x"), 0o640))
		k.check(os.Chmod(dir, 0o711))
	})
	want := k.tree(base)
	child := k.create(base, drivers.CreateOptions{})
	k.same("a new child, written to by nobody", k.tree(child), want)
	view := k.create(base, drivers.CreateOptions{ReadOnly: true})
	k.same("a view", k.tree(view), want)
	k.commit(child)
	k.same("a child committed without a change", k.tree(child), want)
}

func viewOfNothing(k *kit) {
	v := k.create(drivers.Ref{}, drivers.CreateOptions{ReadOnly: true})
	k.wantRoot(k.mount(v, drivers.MountOptions{}), 0, 0)
}

func createExisting(k *kit) {
	base := k.layer(drivers.Ref{}, func(string) {})
	view := k.create(base, drivers.CreateOptions{ReadOnly: true})
	child := k.create(base, drivers.CreateOptions{})
	for _, r := range []drivers.Ref{base, view, child} {
		k.wants("create again", k.driver.Create(k.ctx, r, drivers.CreateOptions{}), errdefs.ErrAlreadyExists)
		k.tree(r) // is still what it was
	}
}

func createZero(k *kit) {
	k.wants("create", k.driver.Create(k.ctx, drivers.Ref{}, drivers.CreateOptions{}), errdefs.ErrInvalidArgument)
}

// Parents outlive the calls that name them; a program's mistake must still not
// give a layer that mounts.
func createOrphan(k *kit) {
	r := k.ref(drivers.Ref{ID: 4711})
	err := k.driver.Create(k.ctx, r, drivers.CreateOptions{})
	if err == nil {
		_, err = k.driver.Mounts(k.ctx, r, drivers.MountOptions{})
	}
	k.wants("create and mount", err, errdefs.ErrNotFound)
}

func createUnsupported(k *kit) {
	id := k.ref(drivers.Ref{})
	if !k.caps.Quota {
		k.wants("quota", k.driver.Create(k.ctx, id, drivers.CreateOptions{Quota: 1 << 20}), errdefs.ErrInvalidArgument)
	}
	if !k.caps.IDMap {
		k.wants("id map", k.driver.Create(k.ctx, id, drivers.CreateOptions{IDMap: shifted}), errdefs.ErrInvalidArgument)
	}
	if ids := k.ids(); k.caps.Quota && k.caps.IDMap || len(ids) > 0 {
		if len(ids) > 0 {
			k.Errorf("refused, yet IDs() has %v", ids)
		}
	}
	k.wants("negative quota", k.driver.Create(k.ctx, id, drivers.CreateOptions{Quota: -1}), errdefs.ErrInvalidArgument)
}

func absentLayer(k *kit) {
	r := k.ref(drivers.Ref{})
	_, err := k.driver.Mounts(k.ctx, r, drivers.MountOptions{})
	k.wants("mounts", err, errdefs.ErrNotFound)
	_, err = k.driver.Usage(k.ctx, r)
	k.wants("usage", err, errdefs.ErrNotFound)
	_, err = k.driver.Commit(k.ctx, r, drivers.CommitOptions{})
	k.wants("commit", err, errdefs.ErrNotFound)
	k.check(k.driver.Remove(k.ctx, r.ID))
	if d, ok := k.driver.(drivers.Differ); ok {
		k.wants("diff", lastError(d.Diff(k.ctx, drivers.Ref{}, r)), errdefs.ErrNotFound)
	}
	if a, ok := k.driver.(drivers.Applier); ok {
		k.wants("apply", a.Apply(k.ctx, r, strings.NewReader(""), layer.ApplyOptions{}), errdefs.ErrNotFound)
	}
}

func commitOnce(k *kit) {
	r := k.layer(drivers.Ref{}, func(string) {})
	_, err := k.driver.Commit(k.ctx, r, drivers.CommitOptions{})
	k.wants("commit of a committed layer", err, errdefs.ErrFailedPrecondition)
}

func commitView(k *kit) {
	v := k.create(drivers.Ref{}, drivers.CreateOptions{ReadOnly: true})
	_, err := k.driver.Commit(k.ctx, v, drivers.CommitOptions{})
	k.wants("commit of a view", err, errdefs.ErrFailedPrecondition)
}

func commitOtherParents(k *kit) {
	one := k.layer(drivers.Ref{}, func(dir string) { k.check(os.WriteFile(dir+"/one", nil, 0o644)) })
	two := k.layer(drivers.Ref{}, func(dir string) { k.check(os.WriteFile(dir+"/two", nil, 0o644)) })
	r := k.create(one, drivers.CreateOptions{})
	moved := drivers.Ref{ID: r.ID, Parents: []drivers.ID{two.ID}}
	_, err := k.driver.Commit(k.ctx, moved, drivers.CommitOptions{})
	k.wants("commit onto another parent", err, errdefs.ErrInvalidArgument)
	k.commit(r)
	if k.caps.Rebase {
		return
	}
	free := k.create(drivers.Ref{}, drivers.CreateOptions{})
	moved = drivers.Ref{ID: free.ID, Parents: []drivers.ID{one.ID}}
	_, err = k.driver.Commit(k.ctx, moved, drivers.CommitOptions{})
	k.wants("commit onto a parent without rebase", err, errdefs.ErrInvalidArgument)
}

// Rebase is what parallel unpacking needs: every layer is made on nothing and
// gets its parents when it is committed.
func rebase(k *kit) {
	if !k.caps.Rebase {
		k.Skip("the driver has no rebase")
	}
	base := k.layer(drivers.Ref{}, func(dir string) {
		k.check(os.Mkdir(dir+"/d", 0o700))
		k.check(os.WriteFile(dir+"/d/old", []byte("old"), 0o644))
		k.check(os.WriteFile(dir+"/f", []byte("old"), 0o644))
	})
	r := k.create(drivers.Ref{}, drivers.CreateOptions{})
	k.edit(r, func(dir string) { k.check(os.WriteFile(dir+"/f", []byte("new"), 0o600)) })
	r.Parents = []drivers.ID{base.ID}
	k.commit(r)
	dir := k.mount(r, drivers.MountOptions{})
	for name, want := range map[string]string{"/f": "new", "/d/old": "old"} {
		if b, err := os.ReadFile(dir + name); err != nil || string(b) != want {
			k.Errorf("%s: %q, %v; want %q", name, b, err, want)
		}
	}
	k.diffIsExact(base, r)
}

func applyOnlyWritable(k *kit) {
	a, ok := k.driver.(drivers.Applier)
	if !ok {
		k.Skip("the driver has no Apply")
	}
	committed := k.layer(drivers.Ref{}, func(string) {})
	view := k.create(committed, drivers.CreateOptions{ReadOnly: true})
	for _, r := range []drivers.Ref{committed, view} {
		k.wants("apply", a.Apply(k.ctx, r, strings.NewReader(""), layer.ApplyOptions{}), errdefs.ErrFailedPrecondition)
	}
}

func removeIdempotent(k *kit) {
	r := k.create(drivers.Ref{}, drivers.CreateOptions{})
	k.check(k.driver.Remove(k.ctx, r.ID))
	k.check(k.driver.Remove(k.ctx, r.ID))
	k.check(k.driver.Remove(k.ctx, 4711))
}

func removeEachState(k *kit) {
	base := k.layer(drivers.Ref{}, func(dir string) {
		k.check(os.MkdirAll(dir+"/a/b/c", 0o755))
		k.check(os.WriteFile(dir+"/a/b/c/f", []byte("x"), 0o400))
		k.check(os.Chmod(dir+"/a/b", 0)) // what forbids entering is removed, too
	})
	want := k.tree(base)
	writable := k.create(base, drivers.CreateOptions{})
	k.edit(writable, func(dir string) { k.check(os.WriteFile(dir+"/new", nil, 0o644)) })
	view := k.create(base, drivers.CreateOptions{ReadOnly: true})
	child := k.create(base, drivers.CreateOptions{})
	k.commit(child)
	for _, r := range []drivers.Ref{writable, view, child} {
		k.check(k.driver.Remove(k.ctx, r.ID))
		if slices.Contains(k.ids(), r.ID) {
			k.Errorf("IDs() still has %s", r.ID)
		}
		_, err := k.driver.Mounts(k.ctx, r, drivers.MountOptions{})
		k.wants("mounts of a removed layer", err, errdefs.ErrNotFound)
		k.same("the parent after its child's removal", k.tree(base), want)
	}
	k.check(k.driver.Remove(k.ctx, base.ID))
	if ids := k.ids(); len(ids) > 0 {
		k.Errorf("IDs() has %v", ids)
	}
}

// removeProtected: what chattr made immutable or append-only, root's own directory
// among it, is removed like the rest. A layer without parents is mounted by a bind,
// so the flags are on its very files.
func removeProtected(k *kit) {
	if !k.fs.privileged {
		k.Skip("protecting a file needs root")
	}
	r := k.layer(drivers.Ref{}, func(dir string) {
		k.check(os.MkdirAll(dir+"/d/immutable/e", 0o755))
		k.check(os.MkdirAll(dir+"/d/append/e", 0o755))
		for _, f := range []string{"link", "d/immutable/f", "d/immutable/e/f", "d/append/f"} {
			k.check(os.WriteFile(dir+"/"+f, []byte("x"), 0o644))
		}
		k.check(os.Link(dir+"/link", dir+"/d/link"))
		for path, flag := range map[string]uint32{
			"d/immutable/f": sys.FS_IMMUTABLE_FL, "d/immutable/e": sys.FS_IMMUTABLE_FL, "d/immutable": sys.FS_IMMUTABLE_FL,
			"d/append/f": sys.FS_APPEND_FL, "d/append": sys.FS_APPEND_FL, "link": sys.FS_IMMUTABLE_FL, ".": sys.FS_APPEND_FL,
		} {
			k.protect(dir+"/"+path, flag)
		}
	})
	want := k.tree(r)
	child := k.layer(r, func(dir string) { k.check(os.Chmod(dir+"/d", 0o700)) })
	k.check(k.driver.Remove(k.ctx, child.ID))
	k.same("the parent after its child's removal", k.tree(r), want)
	k.check(k.driver.Remove(k.ctx, r.ID))
	if ids := k.ids(); len(ids) > 0 {
		k.Errorf("IDs() has %v", ids)
	}
}

// protect adds an inode flag.
func (k *kit) protect(path string, flag uint32) {
	k.Helper()
	f, err := os.Open(path)
	k.check(err)
	defer f.Close()
	flags, err := sys.FlagsBare(int(f.Fd()))
	if errors.Is(err, syscall.ENOTTY) {
		k.Skip("the file system has no inode flags")
	}
	k.check(err)
	k.check(sys.SetFlagsBare(int(f.Fd()), flags|flag))
}

// removeDeep: a tree deeper than a removal may have descriptors open, with
// directories that forbid their owner to write.
func removeDeep(k *kit) {
	r := k.layer(drivers.Ref{}, func(dir string) {
		const depth = 650
		k.check(os.MkdirAll(dir+strings.Repeat("/d", depth), 0o755))
		for n := depth; n > 0; n -= 25 {
			at := dir + strings.Repeat("/d", n)
			k.check(os.WriteFile(at+"/f", nil, 0o400))
			k.check(os.Mkdir(at+"/e", 0))
			k.check(os.Chmod(at, 0o500))
		}
		k.check(os.Mkdir(dir+"/deep.1", 0o755)) // whatever the removal calls things
	})
	k.check(k.driver.Remove(k.ctx, r.ID))
	if ids := k.ids(); len(ids) > 0 {
		k.Errorf("IDs() has %v", ids)
	}
}

func createAgain(k *kit) {
	r := k.layer(drivers.Ref{}, func(dir string) { k.check(os.WriteFile(dir+"/f", nil, 0o644)) })
	k.check(k.driver.Remove(k.ctx, r.ID))
	k.check(k.driver.Create(k.ctx, r, drivers.CreateOptions{}))
	k.wantRoot(k.mount(r, drivers.MountOptions{}), 0, 0)
}

func reopen(k *kit) {
	base := k.layer(drivers.Ref{}, func(dir string) { k.check(os.WriteFile(dir+"/f", []byte("x"), 0o644)) })
	child := k.create(base, drivers.CreateOptions{})
	view := k.create(base, drivers.CreateOptions{ReadOnly: true})
	k.edit(child, func(dir string) { k.check(os.WriteFile(dir+"/g", []byte("y"), 0o644)) })
	ids, trees := k.ids(), [][]string{k.tree(base), k.tree(child), k.tree(view)}
	k.check(k.driver.Close())
	k.check(k.driver.Close())
	k.driver = k.open(k.root)
	if got := k.ids(); !slices.Equal(got, ids) {
		k.Errorf("IDs() %v, before %v", got, ids)
	}
	for i, r := range []drivers.Ref{base, child, view} {
		k.same("a layer after opening again", k.tree(r), trees[i])
	}
	k.commit(child)
	_, err := k.driver.Commit(k.ctx, base, drivers.CommitOptions{})
	k.wants("commit of what was committed before", err, errdefs.ErrFailedPrecondition)
}

func closeLeavesMounts(k *kit) {
	r := k.create(drivers.Ref{}, drivers.CreateOptions{})
	dir := k.mount(r, drivers.MountOptions{})
	k.check(os.WriteFile(dir+"/f", []byte("x"), 0o644))
	k.check(k.driver.Close())
	if b, err := os.ReadFile(dir + "/f"); err != nil || string(b) != "x" {
		k.Errorf("after Close: %q, %v", b, err)
	}
	k.driver = k.open(k.root)
}

// Several processes may have one root open, each with a driver of its own.
func twoOpen(k *kit) {
	other := k.open(k.root)
	defer other.Close()
	base := k.layer(drivers.Ref{}, func(dir string) { k.check(os.WriteFile(dir+"/f", []byte("x"), 0o644)) })
	r := k.ref(base)
	k.check(other.Create(k.ctx, r, drivers.CreateOptions{}))
	k.edit(r, func(dir string) { k.check(os.WriteFile(dir+"/g", []byte("y"), 0o644)) })
	_, err := other.Commit(k.ctx, r, drivers.CommitOptions{})
	k.check(err)
	k.check(k.driver.Remove(k.ctx, r.ID))
	_, err = other.Mounts(k.ctx, r, drivers.MountOptions{})
	k.wants("mounts of what the other removed", err, errdefs.ErrNotFound)
}

// errorForm: "native: mounts 3b: ..." with one sentinel.
func errorForm(k *kit) {
	r := drivers.Ref{ID: 119}
	_, mountsErr := k.driver.Mounts(k.ctx, r, drivers.MountOptions{})
	_, usageErr := k.driver.Usage(k.ctx, r)
	_, commitErr := k.driver.Commit(k.ctx, r, drivers.CommitOptions{})
	for _, err := range []error{mountsErr, usageErr, commitErr} {
		if !strings.HasPrefix(err.Error(), k.caps.Driver+": ") || !strings.Contains(err.Error(), r.ID.String()) {
			k.Errorf("%q names not the driver and layer %s", err, r.ID)
		}
		if strings.Contains(err.Error(), "failed to") {
			k.Errorf("%q: an error says what, not that it failed", err)
		}
		k.oneSentinel(err)
	}
}

// oneSentinel checks that an error wraps exactly one sentinel of the contract.
func (k *kit) oneSentinel(err error) {
	k.Helper()
	var found []error
	for _, s := range sentinels {
		if errors.Is(err, s) {
			found = append(found, s)
		}
	}
	if len(found) != 1 {
		k.Errorf("%q wraps %v, want one sentinel", err, found)
	}
}

// cancelled returns a context that is done.
func (k *kit) cancelled() context.Context {
	ctx, cancel := context.WithCancel(k.ctx)
	cancel()
	return ctx
}
