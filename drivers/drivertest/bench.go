package drivertest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/mount"
)

// benchmark is one measured call.
type benchmark struct {
	name  string
	files int // of the parent
	run   func(b *bench)
}

// The numbers of files are those of the claims: a snapshot's verbs cost the same
// over 10 and over 100,000 files; a diff of 10 changes over 20,000 is O(changes).
var benchmarks = []benchmark{
	{"Prepare", 10, benchPrepare}, {"Prepare", 100_000, benchPrepare},
	{"Mounts", 10, benchMounts}, {"Mounts", 100_000, benchMounts},
	{"Remove", 10, benchRemove}, {"Remove", 100_000, benchRemove},
	{"Commit10Changes", 20_000, benchCommit},
	{"Diff10Changes", 20_000, benchDiff},
	{"Usage10Changes", 20_000, benchUsage},
}

// Bench runs the benchmarks on ext4, or on the first of LAYERCTL_FS, as
// FS/CALL/FILES.
func Bench(b *testing.B, c Config) {
	testenv.Root(b)
	kind := c.kinds()[0]
	b.Run(kind, func(b *testing.B) {
		e := newBench(b, c, testenv.FS(b, kind, testenv.Size(8<<30)))
		for _, bm := range benchmarks {
			b.Run(fmt.Sprintf("%s/%d", bm.name, bm.files), func(b *testing.B) {
				inner := *e
				inner.B = b
				inner.parent = e.over(bm.files)
				bm.run(&inner)
			})
		}
	})
}

// bench is an open driver with parents of several sizes.
type bench struct {
	*testing.B
	driver  drivers.Driver
	target  string // a directory to mount at
	parents map[int]drivers.Ref
	next    *drivers.ID
	parent  drivers.Ref // of the running benchmark
}

func newBench(b *testing.B, c Config, dir string) *bench {
	b.Helper()
	d, err := c.Factory.Open(context.Background(), drivers.Config{Root: filepath.Join(dir, "r"), Options: c.Options})
	if err != nil {
		b.Fatal(err)
	}
	e := &bench{B: b, driver: d, target: filepath.Join(dir, "t"), parents: map[int]drivers.Ref{}, next: new(drivers.ID)}
	e.check(os.Mkdir(e.target, 0o755))
	b.Cleanup(func() { e.check(d.Close()) })
	return e
}

func (e *bench) check(err error) {
	e.Helper()
	if err != nil {
		e.Fatal(err)
	}
}

func (e *bench) ref(parent drivers.Ref) drivers.Ref {
	*e.next++
	r := drivers.Ref{ID: *e.next}
	if parent.ID != 0 {
		r.Parents = append([]drivers.ID{parent.ID}, parent.Parents...)
	}
	return r
}

// edit changes a layer through a mount.
func (e *bench) edit(r drivers.Ref, change func(dir string)) {
	e.Helper()
	ms, err := e.driver.Mounts(e.Context(), r, drivers.MountOptions{})
	e.check(err)
	e.check(mount.All(e.Context(), ms, e.target))
	change(e.target)
	e.check(mount.Unmount(e.target, mount.UnmountOptions{}))
}

// over returns a committed layer with so many small files, made once.
func (e *bench) over(files int) drivers.Ref {
	e.Helper()
	if r, ok := e.parents[files]; ok {
		return r
	}
	r := e.ref(drivers.Ref{})
	e.check(e.driver.Create(context.Background(), r, drivers.CreateOptions{Volatile: true}))
	e.edit(r, func(dir string) {
		for i := range files {
			sub := filepath.Join(dir, itoa(i/100))
			if i%100 == 0 {
				e.check(os.Mkdir(sub, 0o755))
			}
			e.check(os.WriteFile(filepath.Join(sub, itoa(i)), []byte(itoa(i)), 0o644))
		}
	})
	_, err := e.driver.Commit(context.Background(), r, drivers.CommitOptions{})
	e.check(err)
	e.parents[files] = r
	return r
}

// changed makes a writable child with ten changed files.
func (e *bench) changed() drivers.Ref {
	e.Helper()
	r := e.ref(e.parent)
	e.check(e.driver.Create(e.Context(), r, drivers.CreateOptions{}))
	e.edit(r, func(dir string) {
		for i := range 10 {
			e.check(os.WriteFile(filepath.Join(dir, itoa(i), itoa(i*100)), []byte("changed"), 0o644))
		}
	})
	return r
}

func (e *bench) remove(r drivers.Ref) {
	e.Helper()
	e.check(e.driver.Remove(e.Context(), r.ID))
}

func benchPrepare(e *bench) {
	for e.Loop() {
		r := e.ref(e.parent)
		e.check(e.driver.Create(e.Context(), r, drivers.CreateOptions{}))
		e.StopTimer()
		e.remove(r)
		e.StartTimer()
	}
}

func benchMounts(e *bench) {
	r := e.ref(e.parent)
	e.check(e.driver.Create(e.Context(), r, drivers.CreateOptions{}))
	for e.Loop() {
		_, err := e.driver.Mounts(e.Context(), r, drivers.MountOptions{})
		e.check(err)
	}
	e.remove(r)
}

func benchRemove(e *bench) {
	for e.Loop() {
		e.StopTimer()
		r := e.ref(e.parent)
		e.check(e.driver.Create(e.Context(), r, drivers.CreateOptions{}))
		e.StartTimer()
		e.remove(r)
	}
}

func benchCommit(e *bench) {
	for e.Loop() {
		e.StopTimer()
		r := e.changed()
		e.StartTimer()
		_, err := e.driver.Commit(e.Context(), r, drivers.CommitOptions{})
		e.check(err)
		e.StopTimer()
		e.remove(r)
		e.StartTimer()
	}
}

func benchDiff(e *bench) {
	d, ok := e.driver.(drivers.Differ)
	if !ok {
		e.Skip("the driver has no diff")
	}
	r := e.changed()
	for e.Loop() {
		e.check(lastError(d.Diff(e.Context(), e.parent, r)))
	}
	e.remove(r)
}

func benchUsage(e *bench) {
	r := e.changed()
	for e.Loop() {
		_, err := e.driver.Usage(e.Context(), r)
		e.check(err)
	}
	e.remove(r)
}
