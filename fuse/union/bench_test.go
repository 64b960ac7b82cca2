package union

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"

	"github.com/layerctl/layerctl/internal/testenv"
)

// benchUnion has a lower with a directory of 1,000 files, another lower of 500
// more in the same directory, and an upper, on tmpfs.
func benchUnion(b testing.TB) *FS {
	b.Helper()
	testenv.Root(b)
	base := testenv.FS(b, "tmpfs")
	old := syscall.Umask(0)
	b.Cleanup(func() { syscall.Umask(old) })
	c := layersFor(b, base, 2, Config{}, func(l []string) {
		for i := range 1000 {
			put(b, l[0], fmt.Sprintf("one/f%04d", i), "")
			if i < 500 {
				put(b, l[0], fmt.Sprintf("two/f%04d", i), "")
				put(b, l[1], fmt.Sprintf("two/g%04d", i), "")
			}
		}
	})
	fs, err := Open(context.Background(), c)
	must(b, err)
	b.Cleanup(func() { fs.Close() })
	return fs
}

func lookupBench(b testing.TB, fs *FS, name string) *Node {
	b.Helper()
	e, err := fs.Lookup(fs.Root(), name)
	must(b, err)
	return e.Node
}

func BenchmarkLookup(b *testing.B) {
	for _, dir := range []string{"one", "two"} {
		for _, name := range []string{"f0001", "nothing"} {
			b.Run(dir+"/"+name, func(b *testing.B) {
				fs := benchUnion(b)
				d := lookupBench(b, fs, dir)
				b.ReportAllocs()
				for b.Loop() {
					if e, err := fs.Lookup(d, name); err == nil {
						fs.Forget(e.Node.ID(), 1)
					}
				}
			})
		}
	}
}

func BenchmarkGetattr(b *testing.B) {
	fs := benchUnion(b)
	n := lookupBench(b, fs, "one")
	e, err := fs.Lookup(n, "f0001")
	must(b, err)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := fs.Getattr(e.Node, nil); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkReadPlus(b *testing.B) {
	for _, dir := range []string{"one", "two"} {
		b.Run(dir, func(b *testing.B) {
			fs := benchUnion(b)
			n := lookupBench(b, fs, dir)
			b.ReportAllocs()
			for b.Loop() {
				d, err := fs.OpenDir(n)
				must(b, err)
				count := 0
				must(b, d.ReadPlus(0, func(_ DirEntry, e Entry) bool {
					count++
					fs.Forget(e.Node.ID(), 1)
					return true
				}))
				d.Close()
				if count != 1000 {
					b.Fatal(count)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/1000, "ns/entry")
		})
	}
}

func BenchmarkCreateUnlink(b *testing.B) {
	for _, uid := range []uint32{0, 1000} {
		for _, dir := range []string{"one", "new"} {
			b.Run(fmt.Sprintf("%s/uid%d", dir, uid), func(b *testing.B) {
				fs := benchUnion(b)
				c := Caller{UID: uid, GID: uid, Umask: 0o022}
				if dir == "new" {
					e, err := fs.Mkdir(c, fs.Root(), "new", 0o777)
					must(b, err)
					fs.Forget(e.Node.ID(), 1)
				}
				d := lookupBench(b, fs, dir)
				if uid != 0 {
					_, err := fs.Setattr(Caller{}, d, nil, SetAttr{Valid: SetMode, Mode: 0o777})
					must(b, err)
				}
				b.ReportAllocs()
				for b.Loop() {
					e, f, err := fs.Create(c, d, "name", syscall.O_RDWR, 0o644)
					must(b, err)
					f.Close()
					must(b, fs.Unlink(d, "name"))
					fs.Forget(e.Node.ID(), 1)
				}
			})
		}
	}
}

// BenchmarkMemory reports the heap that a node takes.
func BenchmarkMemory(b *testing.B) {
	testenv.Root(b)
	base := testenv.FS(b, "tmpfs")
	const files = 40_000
	c := layersFor(b, base, 1, Config{}, func(l []string) {
		for i := range files {
			p := filepath.Join(l[0], fmt.Sprintf("d%03d/some-file-name-%05d.txt", i%400, i))
			if i < 400 {
				must(b, os.MkdirAll(filepath.Dir(p), 0o755))
			}
			must(b, os.WriteFile(p, nil, 0o644))
		}
	})
	fs, err := Open(context.Background(), c)
	must(b, err)
	defer fs.Close()
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for b.Loop() {
		all := 0
		for i := range 400 {
			d, err := fs.OpenDir(lookupBench(b, fs, fmt.Sprintf("d%03d", i)))
			must(b, err)
			must(b, d.ReadPlus(0, func(_ DirEntry, e Entry) bool { all++; return true }))
			d.Close()
		}
		if all != files {
			b.Fatal(all)
		}
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/files, "B/node")
}
