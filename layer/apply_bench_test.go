package layer

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/layerctl/layerctl/internal/testenv"
)

// benchTars gives the archives to unpack: made-up trees always, and the real
// images of $LAYERCTL_IMAGES (a directory with *.tar of root file systems).
func benchTars(b *testing.B) map[string]string {
	b.Helper()
	tars := map[string]string{}
	dir := testenv.Scratch(b)
	for _, shape := range []struct {
		name  string
		files int
		size  int
	}{{"small", 20_000, 2_000}, {"large", 20, 10 << 20}} {
		path := filepath.Join(dir, shape.name+".tar")
		if err := os.WriteFile(path, benchTar(shape.files, shape.size), 0o600); err != nil {
			b.Fatal(err)
		}
		tars[shape.name] = path
	}
	if images := os.Getenv("LAYERCTL_IMAGES"); images != "" {
		found, _ := filepath.Glob(images + "/*rootfs*.tar")
		for _, f := range found {
			tars[filepath.Base(f)] = f
		}
	}
	return tars
}

func benchTar(files, size int) []byte {
	a := newTar()
	data := bytes.Repeat([]byte("layerctl"), size/8+1)[:size]
	for i := range files {
		if i%50 == 0 {
			a.add(dirHeader(fmt.Sprintf("d%d/", i/50)))
		}
		a.file(fmt.Sprintf("d%d/file%d", i/50, i), string(data))
	}
	return a.bytes()
}

// BenchmarkApply unpacks with Apply, listing and content digests included, and
// with GNU tar, which takes no digest, turn by turn: flushed and not. MB/s is of
// the tar.
func BenchmarkApply(b *testing.B) {
	fs := testenv.FS(b, "ext4", testenv.Size(6<<30))
	for name, path := range benchTars(b) {
		for _, volatile := range []bool{true, false} {
			how := map[bool]string{true: "volatile", false: "durable"}[volatile]
			b.Run(name+"/apply/"+how, func(b *testing.B) {
				benchUnpack(b, fs, path, func(dir string) error { return benchApply(dir, path, volatile) })
			})
			b.Run(name+"/gnutar/"+how, func(b *testing.B) {
				tar := testenv.Program(b, "tar", "tar")
				benchUnpack(b, fs, path, func(dir string) error { return benchGNU(tar, dir, path, volatile) })
			})
		}
	}
}

func benchUnpack(b *testing.B, fs, tar string, unpack func(dir string) error) {
	st, err := os.Stat(tar)
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(st.Size())
	var walls, cpus []float64
	for b.Loop() {
		dir := filepath.Join(fs, "t")
		if err := os.Mkdir(dir, 0o755); err != nil {
			b.Fatal(err)
		}
		begin, cpu := time.Now(), childCPU()
		if err := unpack(dir); err != nil {
			b.Fatal(err)
		}
		walls = append(walls, float64(time.Since(begin).Milliseconds()))
		cpus = append(cpus, float64((childCPU() - cpu).Milliseconds()))
		b.StopTimer()
		if err := os.RemoveAll(dir); err != nil {
			b.Fatal(err)
		}
		_ = exec.Command("sync", "-f", fs).Run()
		b.StartTimer()
	}
	b.ReportMetric(median(walls), "median-ms")
	b.ReportMetric(median(cpus), "median-cpu-ms")
}

func median(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}

// childCPU is what this process and its ended children have used, which a busy
// machine disturbs less than the clock.
func childCPU() time.Duration {
	var sum time.Duration
	for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
		var u syscall.Rusage
		if syscall.Getrusage(who, &u) == nil {
			sum += time.Duration(u.Utime.Nano() + u.Stime.Nano())
		}
	}
	return sum
}

func benchApply(dir, path string, volatile bool) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	l := NewListingWriter(io.Discard)
	defer l.Close()
	return Apply(benchContext, dir, f, ApplyOptions{Volatile: volatile, Listing: l})
}

func benchGNU(tar, dir, path string, volatile bool) error {
	if out, err := exec.Command(tar, "--numeric-owner", "--xattrs", "--xattrs-include=*", "-xpf", path, "-C", dir).CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	if volatile {
		return nil
	}
	return exec.Command("sync", "-f", dir).Run()
}
