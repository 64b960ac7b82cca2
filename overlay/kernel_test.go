package overlay

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/upper"
	"github.com/layerctl/layerctl/internal/kprobe"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/layer"
	lmount "github.com/layerctl/layerctl/mount"
)

// bench is a driver on a file system of its own, and helpers that end the test
// on an error.
type bench struct {
	testing.TB
	*Driver
	ctx  context.Context
	dir  string // of the file system
	next drivers.ID
}

func newBench(t testing.TB, kind string, o map[string]string, fs ...testenv.Option) *bench {
	t.Helper()
	testenv.Leaks(t)
	b := &bench{TB: t, ctx: context.Background(), dir: testenv.FS(t, kind, fs...)}
	b.check(os.Chmod(filepath.Dir(b.dir), 0o755)) // other users have tests here, too
	b.open(o)
	return b
}

func (b *bench) open(o map[string]string) {
	b.Helper()
	d, err := Open(b.ctx, drivers.Config{Root: b.dir + "/r", Options: o})
	b.check(err)
	b.Driver = d
}

func (b *bench) check(err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

func (b *bench) wants(what string, err, want error, words ...string) {
	b.Helper()
	if !errors.Is(err, want) {
		b.Fatalf("%s: %v, want %v", what, err, want)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			b.Errorf("%s: %q does not say %q", what, err, w)
		}
	}
}

func on(parent drivers.Ref) []drivers.ID {
	if parent.ID == 0 {
		return nil
	}
	return append([]drivers.ID{parent.ID}, parent.Parents...)
}

func (b *bench) create(parent drivers.Ref, o drivers.CreateOptions) drivers.Ref {
	b.Helper()
	b.next++
	r := drivers.Ref{ID: b.next, Parents: on(parent)}
	b.check(b.Create(b.ctx, r, o))
	return r
}

func (b *bench) commit(r drivers.Ref) drivers.Ref {
	b.Helper()
	_, err := b.Commit(b.ctx, r, drivers.CommitOptions{})
	b.check(err)
	return r
}

// mounted performs mounts while f looks at them.
func (b *bench) mounted(ms []mount.Mount, f func(dir string)) {
	b.Helper()
	dir, err := os.MkdirTemp(b.dir, "m")
	b.check(err)
	if err := lmount.All(b.ctx, ms, dir); err != nil {
		b.Fatalf("%v: %v", ms, err)
	}
	defer func() {
		testenv.Unmount(b, dir)
		b.check(os.Remove(dir))
	}()
	f(dir)
}

func (b *bench) mounts(r drivers.Ref, o drivers.MountOptions) []mount.Mount {
	b.Helper()
	ms, err := b.Mounts(b.ctx, r, o)
	b.check(err)
	return ms
}

func (b *bench) edit(r drivers.Ref, f func(dir string)) {
	b.Helper()
	b.mounted(b.mounts(r, drivers.MountOptions{}), f)
}

func (b *bench) layer(parent drivers.Ref, f func(dir string)) drivers.Ref {
	b.Helper()
	r := b.create(parent, drivers.CreateOptions{})
	b.edit(r, f)
	return b.commit(r)
}

func (b *bench) file(path, content string) {
	b.Helper()
	b.check(os.MkdirAll(filepath.Dir(path), 0o755))
	b.check(os.WriteFile(path, []byte(content), 0o644))
}

// by performs an overlay as another program would: these options and no others.
func (b *bench) by(r drivers.Ref, options ...string) []mount.Mount {
	var lowers []string
	for _, id := range r.Parents {
		lowers = append(lowers, b.fs(id))
	}
	o := append(options, "lowerdir="+strings.Join(lowers, ":"), "upperdir="+b.fs(r.ID), "workdir="+b.path(r.ID.String(), workDir))
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: o}}
}

// tarOf is a diff as bytes, and its lines.
func (b *bench) tarOf(changes func(func(layer.Change, error) bool)) (string, []string) {
	b.Helper()
	var out bytes.Buffer
	var lines []string
	_, err := layer.WriteTar(b.ctx, &out, func(yield func(layer.Change, error) bool) {
		for c, err := range changes {
			lines = append(lines, c.String())
			if !yield(c, err) {
				return
			}
		}
	}, layer.TarOptions{})
	b.check(err)
	return out.String(), lines
}

// exact compares Diff with the whole walk over two trees that the kernel merges
// with every feature on.
func (b *bench) exact(from, to drivers.Ref) []string {
	b.Helper()
	full := func(r drivers.Ref) *lmount.Tree {
		lowers := []string{b.fs(r.ID)}
		for _, id := range r.Parents {
			lowers = append(lowers, b.fs(id))
		}
		lowers = append(lowers, b.path(emptyDir))
		t, err := lmount.Detached(b.ctx, []mount.Mount{{Type: "overlay", Source: "overlay",
			Options: []string{"metacopy=on", "redirect_dir=on", "lowerdir=" + strings.Join(lowers, ":")}}})
		b.check(err)
		return t
	}
	a, z := full(from), full(to)
	defer a.Close()
	defer z.Close()
	want, wantLines := b.tarOf(layer.DiffTrees(b.ctx, a.Path(), z.Path(), layer.DiffOptions{}))
	got, lines := b.tarOf(b.Diff(b.ctx, from, to))
	if !slices.Equal(lines, wantLines) {
		b.Errorf("diff:\n%s\nwant:\n%s", strings.Join(lines, "\n"), strings.Join(wantLines, "\n"))
	} else if got != want {
		b.Error("the same changes, other bytes")
	}
	return lines
}

func (b *bench) exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// An upper that another program made with redirect_dir=on and metacopy=on says
// neither what a renamed directory holds nor what a file contains.
func TestUppersMadeElsewhere(t *testing.T) {
	b := newBench(t, "ext4", nil)
	base := b.layer(drivers.Ref{}, func(dir string) {
		for _, p := range []string{"a/b/c/f", "a/b/g", "a/h", "x/y/z", "move/f", "plain"} {
			b.file(dir+"/"+p, p)
		}
		b.check(os.Link(dir+"/plain", dir+"/plain2"))
	})
	child := b.create(base, drivers.CreateOptions{})
	b.mounted(b.by(child, "redirect_dir=on", "metacopy=on", "index=off"), func(dir string) {
		b.check(os.Rename(dir+"/a", dir+"/renamed"))
		b.check(os.Rename(dir+"/renamed/b", dir+"/x/b"))
		b.check(os.Chmod(dir+"/x/b/c/f", 0o600))
		b.check(os.Chmod(dir+"/plain", 0o600))
		b.check(os.Rename(dir+"/move/f", dir+"/moved"))
		b.check(os.Rename(dir+"/x/y", dir+"/x/w"))
		b.file(dir+"/x/w/new", "new")
		b.check(os.Remove(dir + "/renamed/h"))
	})
	if s, err := os.Stat(b.fs(child.ID) + "/plain"); err != nil || s.Sys().(*syscall.Stat_t).Blocks > 8 {
		t.Fatalf("metacopy copied data up: %v", err)
	}
	there := b.exact(base, child)
	if !slices.Contains(there, "A x/b/c/f") || !slices.Contains(there, "D a") {
		t.Errorf("diff: %v", there)
	}
	b.exact(child, base)
	b.commit(child)
	b.exact(base, child)
	grand := b.create(child, drivers.CreateOptions{})
	b.edit(grand, func(dir string) { // files without data have to be read through the driver's own mounts
		for p, want := range map[string]string{"x/b/c/f": "a/b/c/f", "plain": "plain", "moved": "move/f", "x/w/z": "x/y/z"} {
			if c, err := os.ReadFile(dir + "/" + p); err != nil || string(c) != want {
				t.Errorf("%s: %q, %v", p, c, err)
			}
		}
		b.file(dir+"/x/b/g", "changed")
	})
	b.exact(child, grand)
	b.exact(base, grand)
	b.exact(grand, base)
	b.mounted(b.mounts(b.commit(grand), drivers.MountOptions{}), func(dir string) {
		if c, err := os.ReadFile(dir + "/plain"); err != nil || string(c) != "plain" {
			t.Errorf("plain: %q, %v", c, err)
		}
	})
}

// Whiteouts as xattrs, which some programs write where they cannot make devices.
func TestXattrWhiteoutsAndOpaque(t *testing.T) {
	b := newBench(t, "ext4", nil)
	base := b.layer(drivers.Ref{}, func(dir string) {
		for _, p := range []string{"d/gone", "d/stays", "o/hidden/f", "o/f", "n/n/n"} {
			b.file(dir+"/"+p, p)
		}
	})
	child := b.create(base, drivers.CreateOptions{})
	up, err := sys.OpenDir(b.fs(child.ID))
	b.check(err)
	defer up.Close()
	b.file(b.fs(child.ID)+"/d/gone", "")
	b.check(up.Setxattr("d/gone", "trusted.overlay.whiteout", "y"))
	b.check(up.Setxattr("d", "trusted.overlay.opaque", "x"))
	b.file(b.fs(child.ID)+"/o/new", "new")
	b.check(up.Setxattr("o", "trusted.overlay.opaque", "y"))
	b.check(up.Mknod("n", sys.S_IFCHR, 0, 0))
	lines := b.exact(base, child)
	for _, want := range []string{"D d/gone", "D o/f", "D o/hidden", "A o/new", "D n"} {
		if !slices.Contains(lines, want) {
			t.Errorf("%s is not in %q", want, lines)
		}
	}
	b.commit(child)
	b.exact(child, base)
}

// moduleDefaults sets every default of the module the other way for a moment.
func moduleDefaults(t *testing.T, value string, f func()) {
	t.Helper()
	for _, p := range []string{"index", "metacopy", "redirect_dir", "xino_auto", "nfs_export", "redirect_always_follow"} {
		file := "/sys/module/overlay/parameters/" + p
		old, err := os.ReadFile(file)
		if err != nil {
			testenv.Optional(t, "no module parameter "+p)
		}
		if err := os.WriteFile(file, []byte(value), 0); err != nil {
			testenv.Optional(t, "module parameters cannot be set")
		}
		defer os.WriteFile(file, old, 0)
	}
	f()
}

// The kernel's and the distribution's defaults must not decide what an upper
// looks like.
func TestModuleDefaultsDoNotMatter(t *testing.T) {
	b := newBench(t, "ext4", nil)
	base := b.layer(drivers.Ref{}, func(dir string) { b.file(dir+"/d/f", "data") })
	for _, value := range []string{"Y", "N"} {
		r := b.create(base, drivers.CreateOptions{})
		dir, err := os.MkdirTemp(b.dir, "m")
		b.check(err)
		moduleDefaults(t, value, func() { b.check(lmount.All(b.ctx, b.mounts(r, drivers.MountOptions{}), dir)) })
		if err := os.Rename(dir+"/d", dir+"/e"); !errors.Is(err, syscall.EXDEV) {
			t.Errorf("defaults %s: rename of a lower directory: %v, want EXDEV", value, err)
		}
		b.check(os.Chmod(dir+"/d/f", 0o600))
		if c, err := os.ReadFile(b.fs(r.ID) + "/d/f"); err != nil || string(c) != "data" {
			t.Errorf("defaults %s: chmod left the upper with %q, %v", value, c, err)
		}
		if b.exists(b.path(r.ID.String(), workDir, "index")) {
			t.Errorf("defaults %s: there is an index", value)
		}
		testenv.Unmount(b, dir)
	}
}

// Two mounts of one upper corrupt each other; the kernel only warns.
func TestSecondMountIsRefused(t *testing.T) {
	b := newBench(t, "ext4", nil)
	r := b.create(b.layer(drivers.Ref{}, func(string) {}), drivers.CreateOptions{})
	b.edit(r, func(first string) {
		ms := b.mounts(r, drivers.MountOptions{}) // asking is free
		second, err := os.MkdirTemp(b.dir, "m")
		b.check(err)
		b.wants("second mount", lmount.All(b.ctx, ms, second), errdefs.ErrFailedPrecondition, first)
		b.mounted(b.mounts(r, drivers.MountOptions{ReadOnly: true}), func(string) {})
	})
}

func TestRootWithSeparators(t *testing.T) {
	b := newBench(t, "tmpfs", nil)
	for _, n := range []string{"a:b", "a,b", `a\b`} {
		dir := b.dir + "/" + n
		b.check(os.Mkdir(dir, 0o755))
		_, err := Open(b.ctx, drivers.Config{Root: dir})
		b.wants(n, err, errdefs.ErrInvalidArgument, "symbolic link", n[1:2])
	}
	link := b.dir + "/link"
	b.check(os.Symlink("a:b", link))
	d, err := Open(b.ctx, drivers.Config{Root: link})
	b.check(err)
	b.Driver = d
	r := b.create(b.layer(drivers.Ref{}, func(dir string) { b.file(dir+"/f", "x") }), drivers.CreateOptions{})
	b.edit(r, func(dir string) {
		infos, err := lmount.List()
		b.check(err)
		i := slices.IndexFunc(infos, func(i lmount.Info) bool { return i.Target == dir })
		if id, ok := b.Owner([]mount.Mount{infos[i].Mount()}); !ok || id != r.ID {
			t.Errorf("Owner of %v: %s, %v", infos[i].SuperOptions, id, ok)
		}
		b.wants("remove", b.Remove(b.ctx, r.ID), errdefs.ErrFailedPrecondition, dir)
		b.check(os.Remove(dir + "/f"))
	})
	b.exact(drivers.Ref{ID: r.Parents[0]}, r)
}

func TestOverlayOnOverlay(t *testing.T) {
	b := newBench(t, "ext4", nil)
	r := b.create(b.layer(drivers.Ref{}, func(string) {}), drivers.CreateOptions{})
	b.edit(r, func(dir string) {
		p := Probe(b.ctx, dir)
		if p.Works != kprobe.No || !strings.Contains(p.Reason, "overlay") || !strings.Contains(p.Reason, "volume") {
			t.Errorf("Probe: %v: %s", p.Works, p.Reason)
		}
		_, err := Open(b.ctx, drivers.Config{Root: dir + "/r"})
		b.wants("open", err, errdefs.ErrUnavailable, "ext4, xfs, btrfs or tmpfs")
		if left, _ := filepath.Glob(dir + "/" + "probe." + "*"); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	})
}

func TestProbe(t *testing.T) {
	testenv.Root(t)
	for kind, want := range map[string]map[string]kprobe.Answer{
		"ext4":  {featReflink: kprobe.No, featIDMap: kprobe.Yes, featTmpfile: kprobe.Yes},
		"xfs":   {featReflink: kprobe.Yes, featIDMap: kprobe.Yes},
		"btrfs": {featReflink: kprobe.Yes, featIDMap: kprobe.Yes},
		"tmpfs": {featReflink: kprobe.No, featQuota: kprobe.No},
	} {
		dir := testenv.FS(t, kind)
		p := Probe(t.Context(), dir)
		if p.Works != kprobe.Yes || !strings.Contains(p.Reason, kind) {
			t.Errorf("%s: %v: %s", kind, p.Works, p.Reason)
		}
		got := map[string]kprobe.Result{}
		for _, r := range p.Features {
			got[r.Feature] = r
			if r.Answer != kprobe.Yes && r.Detail == "" {
				t.Errorf("%s: %s without a reason", kind, r)
			}
		}
		for f, a := range want {
			if got[f].Answer != a {
				t.Errorf("%s: %s, want %v", kind, got[f], a)
			}
		}
		for _, o := range mountOptions {
			if got[o.name].Feature == "" {
				t.Errorf("%s: option %s was not asked for", kind, o.name)
			}
		}
	}
}

func TestProbeOfReadOnly(t *testing.T) {
	dir := testenv.FS(t, "ext4")
	b := &bench{TB: t, ctx: t.Context(), dir: dir}
	b.mounted([]mount.Mount{{Type: "bind", Source: dir, Options: []string{"ro", "bind"}}}, func(ro string) {
		if p := Probe(b.ctx, ro); p.Works == kprobe.Yes || !strings.Contains(p.Reason, "read-only") {
			t.Errorf("%v: %s", p.Works, p.Reason)
		}
	})
}

// A probe that was killed leaves its scratch, which the next Open deletes; one
// that is still at work is left alone.
func TestProbesAreSwept(t *testing.T) {
	b := newBench(t, "tmpfs", nil)
	b.check(os.MkdirAll(b.Root()+"/"+"probe."+"dead/work/work", 0o755))
	s, err := upper.NewScratch(b.Root())
	b.check(err)
	defer s.Remove()
	b.open(nil)
	if b.exists(b.Root() + "/" + "probe." + "dead") {
		t.Error("the dead probe's scratch is still there")
	}
	if !b.exists(s.Path()) {
		t.Error("the live probe's scratch is gone")
	}
}

// What is remembered of the probes is what they say, and is asked again when
// anything that it depends on is another.
func TestProbesAreRemembered(t *testing.T) {
	b := newBench(t, "ext4", nil)
	first := b.features
	b.open(nil)
	for i, r := range b.features.all {
		if was := first.all[i]; r.Feature != was.Feature || r.Answer != was.Answer || r.Detail != was.Detail {
			t.Errorf("%s was %s", r, was)
		}
	}
	if !maps.Equal(b.features.known, first.known) || b.features.fs != first.fs {
		t.Errorf("%+v was %+v", b.features, first)
	}
	text, err := os.ReadFile(b.Root() + "/" + probedFile)
	b.check(err)
	lie := strings.Replace(string(text), `"feature":"lowerdir+","yes":true`, `"feature":"lowerdir+","yes":false`, 1)
	b.file(b.Root()+"/"+probedFile, lie)
	if b.open(nil); b.features.has(featLowerdirs) {
		t.Error("it was asked again though nothing changed")
	}
	for _, bad := range []string{strings.Replace(lie, upper.BootID(), "another boot", 1), lie[:len(lie)/2], ""} {
		b.file(b.Root()+"/"+probedFile, bad)
		if b.open(nil); !b.features.has(featLowerdirs) {
			t.Errorf("believed: %s", bad)
		}
	}
}

// A store on a file system that became read-only can still be looked at.
func TestReadOnlyFileSystem(t *testing.T) {
	b := newBench(t, "ext4", nil)
	base := b.layer(drivers.Ref{}, func(dir string) { b.file(dir+"/f", "x") })
	b.check(sys.Mount("", b.dir, "", sys.MS_REMOUNT|sys.MS_RDONLY, ""))
	defer func() { b.check(sys.Mount("", b.dir, "", sys.MS_REMOUNT, "")) }()
	b.open(nil)
	var seen []string
	for c, err := range b.Diff(b.ctx, drivers.Ref{}, base) {
		b.check(err)
		seen = append(seen, c.String())
	}
	if !slices.Equal(seen, []string{"A .", "A f"}) {
		t.Errorf("diff: %q", seen)
	}
	err := b.Create(b.ctx, drivers.Ref{ID: 77}, drivers.CreateOptions{})
	if !errors.Is(err, syscall.EROFS) {
		t.Errorf("create: %v, want EROFS", err)
	}
}

func TestFormat(t *testing.T) {
	b := newBench(t, "tmpfs", nil)
	for _, c := range []struct{ text, says string }{
		{`{"format":2,"xattrs":"trusted"}`, "format 2"},
		{`{"format":1,"xattrs":"user"}`, "user.overlay.*"},
	} {
		b.file(b.Root()+"/"+formatFile, c.text)
		_, err := Open(b.ctx, drivers.Config{Root: b.Root()})
		b.wants(c.text, err, errdefs.ErrFailedPrecondition, c.says)
	}
	b.file(b.Root()+"/"+formatFile, `{"form`)
	_, err := Open(b.ctx, drivers.Config{Root: b.Root()})
	b.wants("half a file", err, errdefs.ErrDataLoss, formatFile)
}

func TestVolatile(t *testing.T) {
	b := newBench(t, "ext4", nil)
	base := b.layer(drivers.Ref{}, func(string) {})
	r := b.create(base, drivers.CreateOptions{})
	for i := range 3 { // the kernel refuses a second mount while its mark stands
		b.mounted(b.mounts(r, drivers.MountOptions{Volatile: true}), func(dir string) { b.file(dir+"/"+string(rune('a'+i)), "x") })
	}
	if !b.exists(b.path(r.ID.String(), workDir, workDir, incompatDir)) {
		t.Error("it was not volatile")
	}
	b.edit(r, func(string) {}) // nor is one that is not
	b.file(b.path(r.ID.String(), volatileFile), "another boot")
	_, err := b.Mounts(b.ctx, r, drivers.MountOptions{})
	b.wants("mounts after a restart", err, errdefs.ErrDataLoss, "volatile")
	_, err = b.Commit(b.ctx, r, drivers.CommitOptions{})
	b.wants("commit after a restart", err, errdefs.ErrDataLoss)
	b.check(b.Remove(b.ctx, r.ID))

	b.open(map[string]string{"volatile": "on"})
	r = b.create(base, drivers.CreateOptions{})
	if o := b.mounts(r, drivers.MountOptions{})[0].Options; !slices.Contains(o, "volatile") {
		t.Errorf("option volatile=on: %v", o)
	}
}

// The options that make overlayfs write what the upper alone does not say.
func TestRedirectAndMetacopyOptions(t *testing.T) {
	b := newBench(t, "xfs", map[string]string{"metacopy": "on"})
	if b.Capabilities().DirRenameEXDEV {
		t.Error("DirRenameEXDEV with redirect_dir=on")
	}
	base := b.layer(drivers.Ref{}, func(dir string) { b.file(dir+"/d/f", "data"); b.file(dir+"/e/g", "data") })
	child := b.layer(base, func(dir string) {
		b.check(os.Rename(dir+"/d", dir+"/renamed"))
		b.check(os.Chmod(dir+"/renamed/f", 0o600))
	})
	b.exact(base, child)
	b.open(nil) // as a program without the option
	grand := b.create(child, drivers.CreateOptions{})
	b.edit(grand, func(dir string) {
		if c, err := os.ReadFile(dir + "/renamed/f"); err != nil || string(c) != "data" {
			t.Errorf("%q, %v", c, err)
		}
	})
}

// Kernels before 6.5 judge options only when mounting; the answers are the same.
func TestOptionsByMounting(t *testing.T) {
	dir := testenv.FS(t, "tmpfs")
	s, err := upper.NewScratch(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Remove()
	p := prober{ctx: t.Context(), scratch: s}
	for _, o := range mountOptions {
		if r := p.option(nil, o.name, o.value, o.since, false); r.Answer != kprobe.Yes {
			t.Error(r)
		}
	}
	if r := p.option(nil, "no-such-option", "", "9.9", false); r.Answer != kprobe.No || !strings.Contains(r.Detail, "Linux 9.9") {
		t.Error(r)
	}
}

// Deeper than descriptors last, directories that forbid entering.
func TestRemoveDeep(t *testing.T) {
	b := newBench(t, "tmpfs", nil)
	r := b.create(drivers.Ref{}, drivers.CreateOptions{})
	dir, err := sys.OpenDir(b.fs(r.ID))
	b.check(err)
	for range 3 * openAtRemoval {
		b.check(dir.Mkdir("d", 0o755))
		b.check(dir.Mkdir("deep.1", 0o755)) // the name that a move would take
		next, err := dir.Openat("d", sys.O_RDONLY|sys.O_DIRECTORY, 0)
		b.check(err)
		b.check(dir.ChmodAt("d", 0))
		dir.Close()
		dir = next
	}
	dir.Close()
	b.check(b.Remove(b.ctx, r.ID))
	ents, err := os.ReadDir(b.Root())
	b.check(err)
	var names []string
	for _, e := range ents {
		names = append(names, e.Name())
	}
	if !slices.Equal(names, []string{emptyDir, formatFile, probedFile}) {
		t.Errorf("left: %v", names)
	}
}

// A quota's project ids: the same on upper and work, or nothing can be deleted.
func TestProjectIDs(t *testing.T) {
	b := newBench(t, "xfs", nil) // which keeps project ids without quota, too
	base := b.layer(drivers.Ref{}, func(dir string) { b.file(dir+"/f", "x") })
	try := func(fs, work uint32) error {
		r := b.create(base, drivers.CreateOptions{})
		for n, p := range map[string]uint32{fsDir: fs, workDir: work} {
			d, err := sys.OpenDir(b.path(r.ID.String(), n))
			b.check(err)
			b.check(d.SetProject(p, true))
			d.Close()
		}
		var err error
		b.edit(r, func(dir string) { err = os.Remove(dir + "/f") })
		return err
	}
	b.check(try(1<<30+1, 1<<30+1))
	if err := try(1<<30+1, 1<<30+2); !errors.Is(err, syscall.EXDEV) {
		t.Errorf("other ids: %v, want EXDEV", err)
	}
	if b.Capabilities().Quota {
		t.Error("a quota without the file system's quota feature")
	}
	if d := b.features.Detail(featQuota); !strings.Contains(d, "prjquota") {
		t.Errorf("the reason does not help: %s", d)
	}
}

// The quota itself needs CONFIG_QFMT_V2, or CONFIG_XFS_QUOTA, of the kernel: it
// refuses to mount a file system with quota otherwise.
func TestQuota(t *testing.T) {
	testenv.Root(t)
	for kind, mkfs := range map[string][]string{"ext4": {"-O", "quota,project", "-E", "quotatype=prjquota"}, "xfs": nil} {
		t.Run(kind, func(t *testing.T) {
			checkQuota(t, kind, testenv.MkfsArgs(mkfs...), testenv.MountOptions("prjquota"), testenv.IfKernelHas("project quota on "+kind))
		})
	}
}

func checkQuota(t *testing.T, kind string, fs ...testenv.Option) {
	b := newBench(t, kind, nil, fs...)
	if !b.Capabilities().Quota {
		t.Fatal(b.features.Detail(featQuota))
	}
	base := b.layer(drivers.Ref{}, func(dir string) { b.file(dir+"/f", "x") })
	r := b.create(base, drivers.CreateOptions{Quota: 4 << 20})
	project := b.project(r)
	b.edit(r, func(dir string) {
		b.check(os.WriteFile(dir+"/fits", make([]byte, 2<<20), 0o600))
		err := os.WriteFile(dir+"/large", make([]byte, 8<<20), 0o600)
		if !errors.Is(err, syscall.EDQUOT) && !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("over the limit: %v", err)
		}
		b.check(os.Remove(dir + "/large"))
		b.check(os.Remove(dir + "/f"))
	})
	b.check(b.Remove(b.ctx, r.ID))
	dir, err := sys.OpenDir(b.Root())
	b.check(err)
	defer dir.Close()
	if q, err := dir.ProjectQuota(project); err == nil && q.Bytes != 0 {
		t.Errorf("after Remove project %d has %+v", project, q)
	}
}

// project is the quota's project of a layer.
func (b *bench) project(r drivers.Ref) uint32 {
	b.Helper()
	fs, err := sys.OpenDir(b.fs(r.ID))
	b.check(err)
	defer fs.Close()
	x, err := fs.GetFSXattr()
	b.check(err)
	if x.Projid < 1<<30 {
		b.Fatalf("layer %s has project %d", r.ID, x.Projid)
	}
	return x.Projid
}

func unixTime(sec int64) time.Time { return time.Unix(sec, 0) }
