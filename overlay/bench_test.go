package overlay

import (
	"fmt"
	"os"
	"testing"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/testenv"
)

// tree fills a directory with n files, 100 in each directory.
func (b *bench) tree(dir string, n int) {
	b.Helper()
	for i := range n {
		if i%100 == 0 {
			b.check(os.MkdirAll(fmt.Sprintf("%s/%d", dir, i/100), 0o755))
		}
		b.check(os.WriteFile(fmt.Sprintf("%s/%d/%d", dir, i/100, i), []byte("x"), 0o644))
	}
}

// parentOf makes a committed layer of n files.
func (b *bench) parentOf(n int) drivers.Ref {
	b.Helper()
	r := b.create(drivers.Ref{}, drivers.CreateOptions{})
	b.tree(b.fs(r.ID), n)
	_, err := b.Commit(b.ctx, r, drivers.CommitOptions{Volatile: true})
	b.check(err)
	return r
}

// BenchmarkSnapshot is Create, Mounts and Remove over parents of two sizes: the
// two must cost the same.
func BenchmarkSnapshot(bb *testing.B) {
	for _, n := range []int{10, 100_000} {
		bb.Run(fmt.Sprintf("files=%d", n), func(bb *testing.B) {
			b := newBench(bb, "ext4", nil, testenv.MkfsArgs("-N", "150000"))
			base := b.parentOf(n)
			for bb.Loop() {
				b.next++
				r := drivers.Ref{ID: b.next, Parents: on(base)}
				b.check(b.Create(b.ctx, r, drivers.CreateOptions{}))
				_, err := b.Mounts(b.ctx, r, drivers.MountOptions{})
				b.check(err)
				b.check(b.Remove(b.ctx, r.ID))
			}
		})
	}
}

// changed is a child of 20,000 files of which 10 are changed.
func changed(bb *testing.B) (b *bench, base, child drivers.Ref) {
	b = newBench(bb, "ext4", nil)
	base = b.parentOf(20_000)
	child = b.create(base, drivers.CreateOptions{})
	b.edit(child, func(dir string) {
		for i := range 10 {
			b.check(os.WriteFile(fmt.Sprintf("%s/%d/%d", dir, i*17, i*1700), []byte("changed"), 0o644))
		}
	})
	return b, base, child
}

// BenchmarkDiff: 10 changes of 20,000 files; 20 ms is the bound.
func BenchmarkDiff(bb *testing.B) {
	b, base, child := changed(bb)
	for bb.Loop() {
		n := 0
		for _, err := range b.Diff(b.ctx, base, child) {
			b.check(err)
			n++
		}
		if n != 10 {
			bb.Fatalf("%d changes", n)
		}
	}
}

func BenchmarkUsage(bb *testing.B) {
	b, _, child := changed(bb)
	for bb.Loop() {
		_, err := b.Usage(b.ctx, child)
		b.check(err)
	}
}

// BenchmarkOpen is what every run of a program pays; the first of a boot pays for
// the probes, too.
func BenchmarkOpen(bb *testing.B) {
	bb.Run("first", func(bb *testing.B) { open(bb, true) })
	bb.Run("again", func(bb *testing.B) { open(bb, false) })
}

func open(bb *testing.B, first bool) {
	b := newBench(bb, "ext4", nil)
	for bb.Loop() {
		if first {
			b.check(os.Remove(b.Root() + "/" + probedFile))
		}
		d, err := Open(b.ctx, drivers.Config{Root: b.Root()})
		b.check(err)
		b.check(d.Close())
	}
}
