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

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/upper"
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
	rw := upper.Plan{Upper: root + "/3/fs", Work: root + "/3/work", Lowers: []string{root + "/2/fs", root + "/1/fs"}}
	with := func(p upper.Plan, change func(*upper.Plan)) upper.Plan { change(&p); return p }
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
		p    upper.Plan
	}{
		{"writable", none, rw},
		{"writable, no parents", none, upper.Plan{Upper: root + "/1/fs", Work: root + "/1/work"}},
		{"writable, no parents, read-only", none, upper.Plan{Upper: root + "/1/fs", Work: root + "/1/work", ReadOnly: true}},
		{"committed, no parents", none, upper.Plan{Lowers: []string{root + "/1/fs"}}},
		{"committed", none, upper.Plan{Lowers: rw.Lowers}},
		{"volatile", none, with(rw, func(p *upper.Plan) { p.Volatile = true })},
		{"read-only with an upper", none, with(rw, func(p *upper.Plan) { p.ReadOnly = true })},
		{"id map", none, with(rw, func(p *upper.Plan) { p.IDMap = idmap })},
		{"id map, one layer", none, upper.Plan{Lowers: rw.Lowers[:1], IDMap: idmap}},
		{"over files without data", none, with(rw, func(p *upper.Plan) { p.Metacopy = true })},
		{"user namespace", inUserNS(none), rw},
		{"user namespace, files without data asked for", inUserNS(none), with(rw, func(p *upper.Plan) { p.Metacopy = true })},
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
		for _, opt := range o.overlayOptions(upper.Plan{Upper: "/u", Work: "/w", Lowers: []string{"/l"}}) {
			if strings.ContainsAny(opt, ", \n") {
				t.Errorf("%v: option %q", m, opt)
			}
		}
	})
}

// TestExternalSize holds what containerd would pass against the count of it.
func TestExternalSize(t *testing.T) {
	const page = 4096
	d := &kernel{root: "/var/lib/layerctl/drivers/overlay", opts: mustOptions(t, nil)}
	dir := func(n int) string { return d.root + "/" + drivers.ID(n).String() + "/fs" }
	for _, n := range []int{1, 2, 64, 128, 300, 386} {
		p := upper.Plan{Upper: dir(1e9), Work: d.root + "/x/work"}
		for i := range n {
			p.Lowers = append(p.Lowers, dir(1e9+i))
		}
		size, lowers := externalSize(d.opts.mount(p), page)
		if lowers != n {
			t.Errorf("%d lowers counted as %d", n, lowers)
		}
		if got := len(compacted(d, p)); n >= 128 && got != size {
			t.Errorf("%d Lowers: %d bytes, counted as %d", n, got, size)
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
func compacted(d *kernel, p upper.Plan) string {
	m := d.opts.mount(p)
	i := slices.IndexFunc(m.Options, func(o string) bool { return strings.HasPrefix(o, "lowerdir=") })
	m.Options[i] = strings.ReplaceAll(m.Options[i], d.root+"/", "")
	return strings.Join(m.Options, ",")
}
