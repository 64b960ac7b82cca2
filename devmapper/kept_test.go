package devmapper

import (
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"github.com/layerctl/layerctl/devmapper/thin"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/internal/treegen"
)

// unread calls f while nobody can read the pool's metadata.
func (b *bench) unread(f func()) {
	b.Helper()
	b.check(sys.Mount("/dev/null", b.pool.MetadataPath(), "", sys.MS_BIND, ""))
	defer func() { b.check(sys.Umount(b.pool.MetadataPath(), 0)) }()
	f()
}

// usageIs checks a layer's usage against that of the metadata, and that it is kept.
func (b *bench) usageIs(after string, r drivers.Ref) (bytes int64) {
	b.Helper()
	got, err := b.Usage(b.Context(), r)
	b.check(err)
	l, err := b.layer(r.ID)
	b.check(err)
	want, err := b.measure(b.Context(), r, l.fs, l.Thin)
	b.check(err)
	if got != want {
		b.Errorf("after %s: usage %+v, the metadata says %+v", after, got, want)
	}
	return got.Bytes
}

// The usage of a layer that is active is not looked for again until something is written, and
// never another than that of the pool's metadata.
func TestUsageOfAnActiveLayerIsKept(t *testing.T) {
	b := newBench(t, 768*mib, nil)
	base := b.create(1)
	b.write(base, "base", noise(2*mib))
	b.commit(base)
	r := b.create(2, 1)
	b.write(r, "own", noise(mib))
	first := b.usageIs("a write", r)
	b.unread(func() {
		if u, err := b.Usage(t.Context(), r); err != nil || u.Bytes != first {
			t.Errorf("again, with nothing written: %+v, %v; want %d", u, err, first)
		}
	})
	b.edit(r, func(dir string) { // in place: what was the parent's is the layer's, and not more of it is mapped
		f, err := os.OpenFile(dir+"/base", os.O_WRONLY, 0)
		b.check(err)
		_, err = f.WriteAt([]byte(strings.Repeat("x", mib)), 0)
		b.check(err)
		b.check(f.Close())
	})
	if n := b.usageIs("a write in place", r); n < first+mib*3/4 {
		t.Errorf("a write of 1 MiB in place: from %d to %d bytes", first, n)
	}
	if _, err := b.diffIn(t.Context(), base, r); err != nil { // takes a snapshot of it
		t.Error(err)
	}
	b.usageIs("a diff", r)
	seed := testenv.Number(t, "LAYERCTL_SEED", rand.Uint64()>>1)
	t.Logf("LAYERCTL_SEED=%d", seed)
	g := treegen.New(rand.New(rand.NewPCG(seed, 3)), treegen.Config{Root: true, FileSize: 300_000})
	for range 12 {
		b.edit(r, func(dir string) {
			_, err := treegen.Apply(dir, g.Ops(8))
			b.check(err)
		})
		b.usageIs("random operations", r)
	}
	// Another device of the layer has counted as little as this one at the beginning.
	name := b.deviceName(2, 2)
	for range 2 {
		b.check(b.pool.Exclusive(t.Context(), func(c *thin.Change) error { return c.Deactivate(name) }))
		b.usageIs("its device went", r)
		b.edit(r, func(dir string) { b.check(os.WriteFile(dir+"/more", []byte(noise(mib)), 0o600)) })
		b.usageIs("its device came, and more", r)
	}
	uncounted := b.deviceName(2, 2)
	i, err := b.pool.Info(uncounted)
	b.check(err)
	b.check(os.WriteFile(blockDir(i)+iostats, []byte("0"), 0))
	for range 2 {
		b.edit(r, func(dir string) { b.check(os.WriteFile(dir+"/more", []byte(noise(mib)), 0o600)) })
		b.usageIs("writes that are not counted", r)
		b.edit(r, func(dir string) { b.check(os.Remove(dir + "/more")) })
		b.usageIs("removal that is not counted", r)
	}
	b.commit(r)
	b.remove(2)
	again := b.create(2, 1)
	b.write(again, "f", "another layer of that ID")
	b.usageIs("it is another layer", again)
	b.remove(2, 1)
}
