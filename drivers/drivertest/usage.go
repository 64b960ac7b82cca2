package drivertest

import (
	"math/rand/v2"
	"os"

	"github.com/layerctl/layerctl/drivers"
)

var usageCases = []testCase{
	{"usage counts what was written", usageCounts},
	{"usage counts a hard-link group once", usageLinks},
	{"usage leaves parents out", usageParents},
	{"usage of a sparse file is what is allocated", usageSparse},
	{"usage of a commit is the layer's", usageOfCommit},
}

// used is the usage of an active layer once its data is on the disk: before, a
// file system may not have allocated it.
func (k *kit) used(r drivers.Ref) drivers.Usage {
	k.Helper()
	k.check(syncDir(k.root))
	u, err := k.driver.Usage(k.ctx, r)
	k.check(err)
	if k.caps.UsageBytes && u.Bytes < 0 || k.caps.UsageInodes && u.Inodes < 0 {
		k.Errorf("Usage %+v, capabilities %v, %v", u, k.caps.UsageBytes, k.caps.UsageInodes)
	}
	return u
}

// grew checks that usage grew by bytes within slack, and by inodes.
func (k *kit) grew(what string, before, after drivers.Usage, bytes, slack, inodes int64) {
	k.Helper()
	if d := after.Bytes - before.Bytes; after.Bytes >= 0 && (d < bytes || d > bytes+slack) {
		k.Errorf("%s: %d bytes more, want %d to %d", what, d, bytes, bytes+slack)
	}
	if d := after.Inodes - before.Inodes; after.Inodes >= 0 && d != inodes {
		k.Errorf("%s: %d inodes more, want %d", what, d, inodes)
	}
}

const mib = 1 << 20

// slack allows for directories and for what a file system stores beside the data: of a
// driver that counts a device's blocks, its journal too.
func (k *kit) slack() int64 {
	if k.caps.UsageBlocks {
		return 4 * mib
	}
	return 128 << 10
}

// noise is what no file system stores in less space.
func noise(size int) string {
	b := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{}).Read(b)
	return string(b)
}

func usageCounts(k *kit) {
	r := k.create(drivers.Ref{}, drivers.CreateOptions{})
	before := k.used(r)
	k.edit(r, func(dir string) {
		w := &work{TB: k, dir: dir}
		w.file("d/f", noise(mib))
		w.symlink("f", "l")
	})
	after := k.used(r)
	k.grew("a file of 1 MiB, a directory, a symlink", before, after, mib, k.slack(), 3)
	k.edit(r, func(dir string) { k.check(os.Remove(dir + "/d/f")) })
	k.grew("the file removed", after, k.used(r), -mib-k.slack(), 2*k.slack(), -1)
}

func usageLinks(k *kit) {
	r := k.create(drivers.Ref{}, drivers.CreateOptions{})
	before := k.used(r)
	k.edit(r, func(dir string) {
		w := &work{TB: k, dir: dir}
		w.file("a", noise(mib))
		w.link("a", "b")
		w.mkdir("d")
		w.link("a", "d/c")
	})
	k.grew("one file of three names, and a directory", before, k.used(r), mib, k.slack(), 2)
}

func usageParents(k *kit) {
	base := k.layer(drivers.Ref{}, func(dir string) {
		(&work{TB: k, dir: dir}).file("large", noise(8*mib))
	})
	child := k.create(base, drivers.CreateOptions{})
	u := k.used(child)
	if full := k.used(base); k.caps.Copies {
		k.grew("a copy", full, u, 0, k.slack(), 0)
	} else if u.Bytes > k.slack() {
		k.Errorf("a new child of 8 MiB holds %d bytes", u.Bytes)
	}
	k.edit(child, func(dir string) { (&work{TB: k, dir: dir}).file("own", noise(mib)) })
	k.grew("the child's own file", u, k.used(child), mib, k.slack(), 1)
}

func usageSparse(k *kit) {
	r := k.create(drivers.Ref{}, drivers.CreateOptions{})
	before := k.used(r)
	k.edit(r, func(dir string) {
		w := &work{TB: k, dir: dir}
		w.file("f", noise(mib))
		w.truncate("f", 1<<30)
	})
	k.grew("1 MiB of data in 1 GiB", before, k.used(r), mib, k.slack(), 1)
	k.commit(r)
	child := k.create(r, drivers.CreateOptions{})
	k.edit(child, func(dir string) { (&work{TB: k, dir: dir}).chmod("f", 0o600) })
	if u := k.used(child); u.Bytes > mib+k.slack() {
		k.Errorf("the child holds %d bytes: the hole was filled", u.Bytes)
	}
}

func usageOfCommit(k *kit) {
	r := k.create(drivers.Ref{}, drivers.CreateOptions{})
	k.edit(r, func(dir string) { (&work{TB: k, dir: dir}).file("f", noise(mib)) })
	committed := k.commit(r)
	if u := k.used(r); u != committed {
		k.Errorf("Commit returned %+v, Usage says %+v", committed, u)
	}
	if committed.Bytes >= 0 && committed.Bytes < mib {
		k.Errorf("Commit returned %+v for 1 MiB", committed)
	}
}
