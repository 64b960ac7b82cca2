package overlay

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
)

var update = flag.Bool("update", false, "write testdata again")

// everything is a kernel that knows every option.
func everything() map[string]bool {
	known := map[string]bool{}
	for _, o := range mountOptions {
		known[o.name] = true
	}
	return known
}

func mustOptions(t *testing.T, m map[string]string) options {
	t.Helper()
	o, err := parseOptions(m)
	if err != nil {
		t.Fatal(err)
	}
	o.known = everything()
	return o
}

// TestMountGolden pins the form of every kind of mount.
func TestMountGolden(t *testing.T) {
	const root = "/var/lib/layerctl/drivers/overlay"
	rw := plan{upper: root + "/3/fs", work: root + "/3/work", lowers: []string{root + "/2/fs", root + "/1/fs"}}
	with := func(p plan, change func(*plan)) plan { change(&p); return p }
	ids := []drivers.IDRange{{ContainerID: 0, HostID: 100000, Size: 1000}, {ContainerID: 1000, HostID: 5, Size: 1}}
	idmap := drivers.IDMap{UIDs: ids, GIDs: ids[:1]}
	inUserNS := func(o options) options {
		o, err := o.inUserNS()
		if err != nil {
			t.Fatal(err)
		}
		return o
	}
	none := mustOptions(t, nil)
	old := none
	old.known = map[string]bool{"redirect_dir": true}
	var b strings.Builder
	for _, c := range []struct {
		name string
		o    options
		p    plan
	}{
		{"writable", none, rw},
		{"writable, no parents", none, plan{upper: root + "/1/fs", work: root + "/1/work"}},
		{"writable, no parents, read-only", none, plan{upper: root + "/1/fs", work: root + "/1/work", readOnly: true}},
		{"committed, no parents", none, plan{lowers: []string{root + "/1/fs"}}},
		{"committed", none, plan{lowers: rw.lowers}},
		{"volatile", none, with(rw, func(p *plan) { p.volatile = true })},
		{"read-only with an upper", none, with(rw, func(p *plan) { p.readOnly = true })},
		{"id map", none, with(rw, func(p *plan) { p.idmap = idmap })},
		{"id map, one layer", none, plan{lowers: rw.lowers[:1], idmap: idmap}},
		{"over files without data", none, with(rw, func(p *plan) { p.metacopy = true })},
		{"user namespace", inUserNS(none), rw},
		{"user namespace, files without data asked for", inUserNS(none), with(rw, func(p *plan) { p.metacopy = true })},
		{"old kernel", old, rw},
		{"metacopy=on", mustOptions(t, map[string]string{"metacopy": "on"}), rw},
		{"redirect_dir=on", mustOptions(t, map[string]string{"redirect_dir": "on"}), rw},
		{"redirect_dir=off", mustOptions(t, map[string]string{"redirect_dir": "off"}), rw},
		{"redirect_dir=nofollow", mustOptions(t, map[string]string{"redirect_dir": "nofollow"}), rw},
		{"xino=auto", mustOptions(t, map[string]string{"xino": "auto"}), rw},
	} {
		m := c.o.mount(c.p)
		fmt.Fprintf(&b, "%s:\n  %s %s\n    %s\n", c.name, m.Type, m.Source, strings.Join(m.Options, "\n    "))
	}
	golden(t, "mounts.golden", b.String())
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s (-update writes it again):\n%s", file, got)
	}
}

func TestOptionsRefused(t *testing.T) {
	for _, c := range []struct {
		m    map[string]string
		says string
	}{
		{map[string]string{"metacopy": "yes"}, `metacopy="yes"`},
		{map[string]string{"mount_program": "/usr/bin/fuse-overlayfs"}, `unknown option "mount_program"`},
		{map[string]string{"": ""}, `unknown option ""`},
		{map[string]string{"b": "", "a": ""}, `unknown option "a"`},
		{map[string]string{"metacopy": "on", "redirect_dir": "off"}, "needs redirect_dir=on"},
		{map[string]string{"index": "on"}, "known: metacopy, redirect_dir, xino, volatile"},
	} {
		_, err := parseOptions(c.m)
		if !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%v: %v, want ErrInvalidArgument that says %s", c.m, err, c.says)
		}
	}
	for _, m := range []map[string]string{{"metacopy": "on"}, {"redirect_dir": "on"}} {
		if _, err := mustOptions(t, m).inUserNS(); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%v in a user namespace: %v", m, err)
		}
	}
}

// FuzzOptions: whatever is given, either an error that says what, or options
// that a kernel accepts.
func FuzzOptions(f *testing.F) {
	f.Add("metacopy", "on", "redirect_dir", "follow")
	f.Add("xino", "auto", "volatile", "on")
	f.Fuzz(func(t *testing.T, k1, v1, k2, v2 string) {
		m := map[string]string{k1: v1, k2: v2}
		o, err := parseOptions(m)
		if err != nil {
			if !errors.Is(err, errdefs.ErrInvalidArgument) {
				t.Fatal(err)
			}
			return
		}
		if o.metacopy == "on" && o.redirect != "on" {
			t.Errorf("%v: metacopy=on with redirect_dir=%s", m, o.redirect)
		}
		o.known = everything()
		for _, opt := range o.overlayOptions(plan{upper: "/u", work: "/w", lowers: []string{"/l"}}) {
			if strings.ContainsAny(opt, ", \n") {
				t.Errorf("%v: option %q", m, opt)
			}
		}
	})
}

// FuzzNames: a name in ROOT is a layer's in one spelling only.
func FuzzNames(f *testing.F) {
	for _, n := range []string{"1", "1.new", "zz.del", "format.json", "empty.dir", "probe.1", "01", "Z", ".new", "0"} {
		f.Add(n)
	}
	f.Fuzz(func(t *testing.T, n string) {
		id, ok := parseName(n)
		if ok && n != id.String() && n != id.String()+newSuffix && n != id.String()+delSuffix {
			t.Errorf("%q is taken for layer %s", n, id)
		}
	})
}

func TestNamesThatAreNoLayers(t *testing.T) {
	for _, n := range []string{formatFile, formatFile + newSuffix, emptyDir, probePrefix + "123", "lost+found", ".", ""} {
		if id, ok := parseName(n); ok {
			t.Errorf("%q is taken for layer %s", n, id)
		}
	}
}

func TestDiffering(t *testing.T) {
	ids := func(ids ...drivers.ID) []drivers.ID { return ids }
	for _, c := range []struct{ from, to, want []drivers.ID }{
		{ids(2, 1), ids(3, 2, 1), ids(3)},
		{ids(3, 2, 1), ids(2, 1), ids(3)},
		{ids(3, 2, 1), ids(3, 2, 1), nil},
		{ids(1), ids(4, 3, 2, 1), ids(4, 3, 2)},
		{ids(5, 2, 1), ids(4, 3, 2, 1), ids(5, 4, 3)},
		{ids(1), ids(2), ids(1, 2)},
	} {
		got := differing(drivers.Ref{ID: c.from[0], Parents: c.from[1:]}, drivers.Ref{ID: c.to[0], Parents: c.to[1:]})
		if !slices.Equal(got, c.want) {
			t.Errorf("%v to %v: %v, want %v", c.from, c.to, got, c.want)
		}
	}
}

func TestIDMaps(t *testing.T) {
	r := func(c, h, n uint32) drivers.IDRange { return drivers.IDRange{ContainerID: c, HostID: h, Size: n} }
	rs := []drivers.IDRange{r(0, 1000, 1), r(1, 100000, 65535)}
	for id, want := range map[uint32]uint32{0: 1000, 1: 100000, 65535: 165534, 65536: 65536, 4294967295: 4294967295} {
		if got := shift(rs, id); got != want {
			t.Errorf("%d: %d, want %d", id, got, want)
		}
		if id < 65536 && shift(inverseRanges(rs), want) != id {
			t.Errorf("%d does not come back", id)
		}
	}
	for _, bad := range []drivers.IDMap{
		{UIDs: rs},
		{GIDs: rs},
		{UIDs: []drivers.IDRange{r(0, 0, 0)}, GIDs: rs},
		{UIDs: []drivers.IDRange{r(4294967295, 0, 2)}, GIDs: rs},
		{UIDs: []drivers.IDRange{r(0, 0, 10), r(9, 20, 5)}, GIDs: rs},
		{UIDs: []drivers.IDRange{r(0, 0, 10), r(20, 9, 5)}, GIDs: rs},
	} {
		if err := checkIDMap(bad); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%v: %v", bad, err)
		}
	}
	if err := checkIDMap(drivers.IDMap{UIDs: rs, GIDs: rs}); err != nil {
		t.Error(err)
	}
}

func TestProjectCandidates(t *testing.T) {
	seen := map[uint32]bool{}
	for id := drivers.ID(1); id < 10_000; id++ {
		p := candidate(id, 0)
		if p < projectBase || seen[p] {
			t.Fatalf("layer %s: project %d is another layer's, or too low", id, p)
		}
		seen[p] = true
	}
	if p := candidate(1<<63, 3); p < projectBase {
		t.Errorf("project %d", p)
	}
}

// TestExternalSize holds what containerd would pass against the count of it.
func TestExternalSize(t *testing.T) {
	const page = 4096
	d := &Driver{root: "/var/lib/layerctl/drivers/overlay", opts: mustOptions(t, nil)}
	for _, n := range []int{1, 2, 64, 128, 300, 386} {
		p := plan{upper: d.fs(1e9), work: d.path("x", workDir)}
		for i := range n {
			p.lowers = append(p.lowers, d.fs(drivers.ID(1e9+i)))
		}
		size, lowers := externalSize(d.opts.mount(p), page)
		if lowers != n {
			t.Errorf("%d lowers counted as %d", n, lowers)
		}
		if got := len(compacted(d, p)); n >= 128 && got != size {
			t.Errorf("%d lowers: %d bytes, counted as %d", n, got, size)
		}
	}
	if n := d.externalParents(); n < 128 {
		t.Errorf("%d parents fit a page, want 128 and more", n)
	}
	d.root = "/" + strings.Repeat("long/", 790)
	if n := d.externalParents(); n != 0 {
		t.Errorf("a root of %d bytes leaves room for %d parents", len(d.root), n)
	}
}

// compacted is containerd's way by hand: lowers relative to the root.
func compacted(d *Driver, p plan) string {
	m := d.opts.mount(p)
	i := slices.IndexFunc(m.Options, func(o string) bool { return strings.HasPrefix(o, "lowerdir=") })
	m.Options[i] = strings.ReplaceAll(m.Options[i], d.root+"/", "")
	return strings.Join(m.Options, ",")
}

func TestOwnerOfPaths(t *testing.T) {
	d := &Driver{root: "/r", real: "/real"}
	overlay := func(opts ...string) []mount.Mount { return []mount.Mount{{Type: "overlay", Options: opts}} }
	for _, c := range []struct {
		ms []mount.Mount
		id drivers.ID
	}{
		{overlay("lowerdir=/r/2/fs:/r/1/fs"), 2},
		{overlay("lowerdir=/r/2/fs:/r/1/fs", "upperdir=/real/3/fs", "workdir=/real/3/work"), 3},
		{overlay("lowerdir=2/fs:1/fs"), 0},
		{overlay("lowerdir=/r/02/fs:/r/1/fs"), 0},
		{overlay("lowerdir=/r/2/fs/x:/r/1/fs"), 0},
		{overlay(), 0},
		{[]mount.Mount{{Type: "bind", Source: "/r/zz/fs"}}, 35*36 + 35},
		{[]mount.Mount{{Type: "bind", Source: "/r/zz/work"}}, 0},
		{[]mount.Mount{{Type: "bind", Source: "/elsewhere/1/fs"}}, 0},
		{append(overlay("lowerdir=/r/2/fs:/r/1/fs"), overlay("lowerdir=/r/2/fs:/r/1/fs")...), 0},
	} {
		if id, ok := d.Owner(c.ms); id != c.id && (ok || c.id != 0) || ok != (c.id != 0) {
			t.Errorf("Owner(%v) is %s, %v; want %s", c.ms, id, ok, c.id)
		}
	}
}
