package union

import (
	"fmt"
	"os"
	"testing"
)

// BenchmarkCopyUp is what the copy-up of a file of 4 KiB costs, by us and by the
// kernel (whose figure has the open and close of it in it).
func BenchmarkCopyUp(b *testing.B) {
	for _, kind := range everyFS {
		s := newStage(b, kind)
		must(b, os.Mkdir(s.path("lower/d"), 0o755))
		const files = 4000
		for i := range files {
			must(b, os.WriteFile(s.path("lower/d", fmt.Sprint(i)), make([]byte, 4096), 0o644))
		}
		fresh := func(b *testing.B) {
			b.Helper()
			for _, d := range []string{"upper", "work"} {
				must(b, os.RemoveAll(s.path(d)))
				must(b, os.Mkdir(s.path(d), 0o755))
			}
		}
		volatile := func(c *Config) { c.Volatile = true } // not the disk
		b.Run(kind+"/ours", func(b *testing.B) {
			fresh(b)
			u := s.open(volatile)
			uuid := s.lowerRoot()[0].uuid
			must(b, copyUpOne(u, uuid, s.path("lower/d"), "d", nil))
			i := 0
			for b.Loop() {
				if i == files {
					b.StopTimer()
					must(b, os.RemoveAll(s.path("upper/d")))
					must(b, copyUpOne(u, uuid, s.path("lower/d"), "d", nil))
					i = 0
					b.StartTimer()
				}
				name := fmt.Sprint("d/", i)
				must(b, copyUpOne(u, uuid, s.path("lower", name), name, nil))
				i++
			}
			u.close()
		})
		b.Run(kind+"/kernel", func(b *testing.B) {
			fresh(b)
			unmount := s.kernel("volatile")
			i := 0
			for b.Loop() {
				if i == files {
					b.StopTimer()
					unmount()
					fresh(b)
					unmount = s.kernel("volatile")
					i = 0
					b.StartTimer()
				}
				f, err := os.OpenFile(s.m+fmt.Sprint("/d/", i), os.O_WRONLY, 0)
				must(b, err)
				f.Close()
				i++
			}
			unmount()
		})
	}
}
