package drivertest

import (
	"errors"
	"os"
	"slices"
	"strings"
	"syscall"

	"github.com/layerctl/layerctl/drivers"
)

// Each difference that a driver may have is one of its Capabilities, and is
// shown here to be so, in both directions. SharedWriter is shown by lateWriter,
// Copies by usageParents.
var differenceCases = []testCase{
	{"a lower hard link separates, or not", breaksHardLinks},
	{"links of the parent's files show at once, or not", linksSettle},
	{"a directory of the parent can be renamed, or not", dirRename},
	{"a copy shares blocks, or not", sharesBlocks},
}

// breaksHardLinks writes through one name of a parent's hard-link group.
func breaksHardLinks(k *kit) {
	base := k.layer(drivers.Ref{}, func(dir string) {
		w := &work{TB: k, dir: dir}
		w.file("a", "base")
		w.link("a", "b")
	})
	r := k.create(base, drivers.CreateOptions{})
	k.edit(r, func(dir string) { (&work{TB: k, dir: dir}).append("a", " more") })
	dir := k.mount(r, drivers.MountOptions{ReadOnly: true})
	b, err := os.ReadFile(dir + "/b")
	k.check(err)
	if separated := string(b) == "base"; separated != k.caps.BreaksHardLinks {
		k.Errorf("written through a, b reads %q; Capabilities().BreaksHardLinks is %v", b, k.caps.BreaksHardLinks)
	}
	linked := slices.ContainsFunc(k.list(dir), func(l string) bool { return strings.Contains(l, "link of") })
	if linked == k.caps.BreaksHardLinks {
		k.Errorf("a and b are linked: %v; Capabilities().BreaksHardLinks is %v", linked, k.caps.BreaksHardLinks)
	}
}

// linksSettle gives a parent's file a second name.
func linksSettle(k *kit) {
	base := k.layer(drivers.Ref{}, func(dir string) { (&work{TB: k, dir: dir}).file("f", "x") })
	r := k.create(base, drivers.CreateOptions{})
	one := func(dir string) bool {
		a, err := os.Stat(dir + "/f")
		k.check(err)
		b, err := os.Stat(dir + "/g")
		k.check(err)
		return os.SameFile(a, b)
	}
	k.edit(r, func(dir string) {
		_, err := os.Stat(dir + "/f") // its number is known before
		k.check(err)
		k.check(os.Link(dir+"/f", dir+"/g"))
		if one(dir) == k.caps.LinksSettle {
			k.Errorf("f and g are one file: %v; Capabilities().LinksSettle is %v", one(dir), k.caps.LinksSettle)
		}
	})
	if !one(k.mount(r, drivers.MountOptions{})) {
		k.Error("mounted again, f and g are not one file")
	}
}

// dirRename renames a directory of the parent, and one of the layer itself.
func dirRename(k *kit) {
	base := k.layer(drivers.Ref{}, func(dir string) { (&work{TB: k, dir: dir}).file("d/f", "x") })
	r := k.create(base, drivers.CreateOptions{})
	dir := k.mount(r, drivers.MountOptions{})
	err := os.Rename(dir+"/d", dir+"/e")
	if exdev := errors.Is(err, syscall.EXDEV); exdev != k.caps.DirRenameEXDEV || err != nil && !exdev {
		k.Errorf("rename: %v; Capabilities().DirRenameEXDEV is %v", err, k.caps.DirRenameEXDEV)
	}
	k.check(os.Mkdir(dir+"/own", 0o755))
	k.check(os.Rename(dir+"/own", dir+"/renamed"))
}

// sharesBlocks fills most of what is free with two layers' worth of one file.
func sharesBlocks(k *kit) {
	if !k.caps.Copies {
		k.Skip("the driver makes no copies")
	}
	base := k.layer(drivers.Ref{}, func(dir string) { k.check(writeSynced(dir+"/f", 64*mib)) })
	before := k.free()
	for range 3 {
		k.create(base, drivers.CreateOptions{})
	}
	k.check(syncDir(k.root))
	if used := before - k.free(); (used < 64*mib) != k.caps.Reflink {
		k.Errorf("three copies of 64 MiB took %d MiB; Capabilities().Reflink is %v", used/mib, k.caps.Reflink)
	}
}

// free is the free space of the test's file system, in bytes.
func (k *kit) free() int64 {
	k.Helper()
	var st syscall.Statfs_t
	k.check(syscall.Statfs(k.root, &st))
	return int64(st.Bfree) * st.Bsize
}
