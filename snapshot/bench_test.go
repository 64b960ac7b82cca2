package snapshot_test

import (
	"context"
	"fmt"
	"os"
	"sync/atomic"
	"testing"

	"github.com/layerctl/layerctl/snapshot"
)

// benchStore is a store on the file system of LAYERCTL_BENCH_DIR, else of the
// test's temporary directory.
func benchStore(b *testing.B, changes ...func(*snapshot.Options)) *snapshot.View {
	dir := os.Getenv("LAYERCTL_BENCH_DIR")
	if dir == "" {
		dir = b.TempDir()
	}
	root, err := os.MkdirTemp(dir, "bench")
	must(b, err)
	b.Cleanup(func() { os.RemoveAll(root) })
	changes = append(changes, func(o *snapshot.Options) { o.NoListings = true })
	s := open(b, root, changes...)
	v := view(b, s, "bench", "overlay")
	must(b, v.Create(context.Background(), "act", "", snapshot.CreateOptions{}))
	must(b, v.Commit(context.Background(), "base", "act"))
	return v
}

// workersOf runs f b.N times in n goroutines.
func workersOf(b *testing.B, n int, f func(ctx context.Context, i int64) error) {
	var next atomic.Int64
	b.SetParallelism(n) // of GOMAXPROCS each
	b.ResetTimer()
	b.RunParallel(func(p *testing.PB) {
		for p.Next() {
			if err := f(context.Background(), next.Add(1)); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "/s")
}

func each(b *testing.B, f func(b *testing.B, workers int)) {
	b.Run("1", func(b *testing.B) { f(b, 0) })
	b.Run("16", func(b *testing.B) { f(b, 8) }) // of 2 processors
}

// BenchmarkPrepare: peers (PEERS.md): containerd overlay 288/s with 1 worker, 265/s
// with 16.
func BenchmarkPrepare(b *testing.B) {
	each(b, func(b *testing.B, workers int) {
		v := benchStore(b)
		run(b, v, workers, func(ctx context.Context, i int64) error {
			_, err := v.Prepare(ctx, fmt.Sprint(i), "base")
			return err
		})
	})
}

// BenchmarkLife is Prepare, Commit, Remove and Cleanup: peers: containerd overlay
// 630/s in memory, 181/s on a disk, without flushing at Commit.
func BenchmarkLife(b *testing.B) {
	for _, volatile := range []bool{false, true} {
		b.Run(map[bool]string{false: "durable", true: "volatile"}[volatile], func(b *testing.B) {
			each(b, func(b *testing.B, workers int) {
				v := benchStore(b, func(o *snapshot.Options) { o.Volatile = volatile })
				run(b, v, workers, func(ctx context.Context, i int64) error {
					key := fmt.Sprint(i)
					if _, err := v.Prepare(ctx, key, "base"); err != nil {
						return err
					}
					if err := v.Commit(ctx, "c"+key, key); err != nil {
						return err
					}
					if err := v.Remove(ctx, "c"+key); err != nil || i%32 != 0 {
						return err
					}
					return v.Cleanup(ctx)
				})
			})
		})
	}
}

func run(b *testing.B, v *snapshot.View, workers int, f func(ctx context.Context, i int64) error) {
	before := v.Store().Batches()
	defer func() { b.ReportMetric(float64(v.Store().Batches()-before)/float64(b.N), "flushes/op") }()
	if workers == 0 {
		b.ResetTimer()
		for i := range int64(b.N) {
			must(b, f(context.Background(), i))
		}
		b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "/s")
		return
	}
	workersOf(b, workers, f)
}

// BenchmarkGate is a read when the database is closed each time, as in a short
// program: open, one transaction, close.
func BenchmarkGate(b *testing.B) {
	v := benchStore(b)
	root := v.Store().Root()
	for b.Loop() {
		s, err := snapshot.Open(context.Background(), root, snapshot.Options{Registry: registry()})
		must(b, err)
		must(b, second(view(b, s, "bench", "").Stat(context.Background(), "base")))
		must(b, s.Close())
	}
}

// BenchmarkProgram is what a short program that makes one snapshot costs beyond
// its start.
func BenchmarkProgram(b *testing.B) {
	v := benchStore(b)
	root := v.Store().Root()
	for i := 0; b.Loop(); i++ {
		s, err := snapshot.Open(context.Background(), root, snapshot.Options{Registry: registry()})
		must(b, err)
		must(b, second(view(b, s, "bench", "").Prepare(context.Background(), fmt.Sprint(i), "base")))
		must(b, s.Close())
	}
}

// BenchmarkStat is a read of a hot database.
func BenchmarkStat(b *testing.B) {
	v := benchStore(b)
	for b.Loop() {
		must(b, second(v.Stat(context.Background(), "base")))
	}
}

// BenchmarkWalk is a walk over 10,000 snapshots.
func BenchmarkWalk(b *testing.B) {
	v := benchStore(b, func(o *snapshot.Options) { o.Volatile = true })
	for i := range 10000 {
		must(b, second(v.Prepare(context.Background(), fmt.Sprintf("a key as long as they are, number %d", i), "base")))
	}
	for b.Loop() {
		if n := len(keys(b, v)); n != 10001 {
			b.Fatal(n)
		}
	}
}
