package upper

import (
	"errors"
	"slices"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	lmount "github.com/layerctl/layerctl/mount"
)

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
	for _, n := range []string{formatFile, formatFile + newSuffix, emptyDir, scratchPrefix + "123", "lost+found", ".", ""} {
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

func TestOwnerOfPaths(t *testing.T) {
	l := &Layers{root: "/r", real: "/real"}
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
		if id, ok := l.Owner(c.ms); id != c.id && (ok || c.id != 0) || ok != (c.id != 0) {
			t.Errorf("Owner(%v) is %s, %v; want %s", c.ms, id, ok, c.id)
		}
	}
}

// A server's mount names its layer by its source.
func TestShownByServer(t *testing.T) {
	l := &Layers{root: "/r", real: "/real"}
	for _, c := range []struct {
		i  lmount.Info
		is bool
	}{
		{lmount.Info{Type: "fuse.fuse-layerfs", Source: "/r/3/fs"}, true},
		{lmount.Info{Type: "fuse", Source: "/real/3/fs"}, true},
		{lmount.Info{Type: "fuse.fuse-layerfs", Source: "/r/4/fs"}, false},
		{lmount.Info{Type: "fuse.fuse-layerfs", Source: "fuse-layerfs"}, false},
		{lmount.Info{Type: "ext4", Source: "/r/3/fs"}, false},
		{lmount.Info{Type: "overlay", SuperOptions: []string{"lowerdir=/r/1/fs", "upperdir=/r/3/fs", "workdir=/r/3/work"}}, true},
	} {
		if got := l.shows(c.i, 3); got != c.is {
			t.Errorf("%+v: %v", c.i, got)
		}
	}
}
