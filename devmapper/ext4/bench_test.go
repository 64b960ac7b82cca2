package ext4

import (
	"fmt"
	"io"
	"os"
	"testing"

	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/layer"
)

// readCounter counts what is read.
type readCounter struct {
	io.ReaderAt
	reads, bytes int
}

func (c *readCounter) ReadAt(p []byte, off int64) (int, error) {
	c.reads++
	c.bytes += len(p)
	return c.ReaderAt.ReadAt(p, off)
}

// BenchmarkDiff compares ten changed files among many: by candidates, and by the
// walk of both trees. Names, blocks and trees are in the page cache.
func BenchmarkDiff(b *testing.B) {
	testenv.Root(b)
	for _, files := range []int{20_000, 200_000} {
		b.Run(fmt.Sprint(files), func(b *testing.B) {
			a := newDisk(b, 4<<30)
			name := func(dir string, n int) string { return fmt.Sprintf("%s/d%d/e%d/f%d", dir, n/1000, n/20, n) }
			a.change(func(dir string) {
				for n := range files {
					a.file(name(dir, n), []byte("some content"))
				}
			})
			c := a.copy()
			c.change(func(dir string) {
				for n := range 10 {
					c.check(os.WriteFile(name(dir, n*files/10+7), []byte("other"), 0))
				}
			})
			ranges := differences(a, c, 64<<10)
			from, unmountFrom := a.mount(true)
			defer unmountFrom()
			to, unmountTo := c.mount(true)
			defer unmountTo()
			diff := func(b *testing.B, o layer.DiffOptions) {
				n := 0
				for _, err := range layer.DiffTrees(b.Context(), from, to, o) {
					if n++; err != nil {
						b.Fatal(err)
					}
				}
				if n != 10 {
					b.Fatalf("%d changes", n)
				}
			}
			b.Run("candidates", func(b *testing.B) {
				f, g := a.open(), c.open()
				defer f.Close()
				defer g.Close()
				var read readCounter
				for b.Loop() {
					read = readCounter{ReaderAt: g}
					names, err := Changed(b.Context(), f, &read, ranges)
					a.check(err)
					diff(b, layer.DiffOptions{Candidates: names.Names})
				}
				b.ReportMetric(float64(read.reads), "reads/op")
				b.ReportMetric(float64(read.bytes>>10), "KiB-read/op")
			})
			b.Run("walk", func(b *testing.B) {
				for b.Loop() {
					diff(b, layer.DiffOptions{})
				}
			})
		})
	}
}
