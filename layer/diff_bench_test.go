package layer

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/continuity/fs"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

// benchTree makes files of 1 to 8 KiB, 100 to a directory.
func benchTree(b *testing.B, dir string, files int) {
	b.Helper()
	data := []byte(strings.Repeat("0123456789abcdef", 512))
	for i := range files {
		d := fmt.Sprintf("%s/%03d/%03d", dir, i/1000, i/100%10)
		if i%100 == 0 {
			if err := os.MkdirAll(d, 0o755); err != nil {
				b.Fatal(err)
			}
		}
		if err := os.WriteFile(fmt.Sprintf("%s/file%d", d, i), data[:1024+i*37%7168], 0o644); err != nil {
			b.Fatal(err)
		}
	}
}

// cpu reports the processor time of each round, children's too: it can be
// compared on a machine that does other things as well.
func cpu(b *testing.B) func() {
	begin := cpuTime()
	return func() { b.ReportMetric(float64(cpuTime()-begin)/1e6/float64(b.N), "cpu-ms/op") }
}

func cpuTime() int64 {
	var self, children syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &self)
	syscall.Getrusage(syscall.RUSAGE_CHILDREN, &children)
	return self.Utime.Nano() + self.Stime.Nano() + children.Utime.Nano() + children.Stime.Nano()
}

// benchPair makes two trees of 20,000 files, 10 of which differ: the second a copy
// of the first, or an overlay mount over it.
func benchPair(b *testing.B, overlay bool) (from, to string) {
	dir := b.TempDir()
	from, to = dir+"/from", dir+"/to"
	benchTree(b, from, 20_000)
	script := `cp -a "$0/from" "$0/to"`
	if overlay {
		testenv.Root(b)
		script = `mkdir "$0/to" "$0/upper" "$0/work" && mount -t overlay -o "lowerdir=$0/from,upperdir=$0/upper,workdir=$0/work" overlay "$0/to"`
		b.Cleanup(func() { syscall.Unmount(to, 0) })
	}
	if out, err := exec.Command("sh", "-c", script, dir).CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	for i := range 10 {
		p := fmt.Sprintf("%s/%03d/005/file%d", to, i, i*1000+500)
		if err := os.Remove(p); err != nil {
			b.Fatal(err)
		}
		if err := os.WriteFile(p, []byte("changed"), 0o644); err != nil {
			b.Fatal(err)
		}
	}
	return from, to
}

// Two trees of 20,000 files, 10 of them different. "copy": no file is shared, so
// that DiffTrees reads them all, while continuity's fs.Changes believes mtime and
// size; "overlay": unchanged files are known to be the lower ones.
func BenchmarkDiff(b *testing.B) {
	for _, name := range []string{"copy", "overlay"} {
		b.Run(name, func(b *testing.B) {
			from, to := benchPair(b, name == "overlay")
			o := DiffOptions{}
			if name == "overlay" { // what is below is on one file system, and a copied-up file has another ctime
				o.SameFile = func(f, t *sys.Stat) bool { return f.Ino == t.Ino && f.Ctime == t.Ctime }
			}
			b.Run("layer", func(b *testing.B) {
				defer cpu(b)()
				for b.Loop() {
					n := 0
					for c, err := range DiffTrees(b.Context(), from, to, o) {
						if err != nil {
							b.Fatal(err)
						}
						if c.Entry.Type == TypeReg {
							n++
						}
					}
					if n != 10 {
						b.Fatalf("%d files changed", n)
					}
				}
			})
			b.Run("continuity", func(b *testing.B) {
				defer cpu(b)()
				for b.Loop() {
					n := 0
					err := fs.Changes(context.Background(), from, to, func(k fs.ChangeKind, p string, st os.FileInfo, err error) error {
						if err == nil && k != fs.ChangeKindUnmodified && st.Mode().IsRegular() {
							n++
						}
						return err
					})
					if err != nil || n != 10 {
						b.Fatalf("%d files changed, %v", n, err)
					}
				}
			})
		})
	}
}

// With candidates the size of the trees does not count.
func BenchmarkDiffPruned(b *testing.B) {
	from, to := benchPair(b, false)
	candidates := func(dir string) ([]string, bool, error) {
		switch strings.Count(dir, "/") {
		case 0:
			if dir != "." {
				return []string{"005"}, false, nil
			}
			return []string{"000", "001", "002", "003", "004", "005", "006", "007", "008", "009"}, false, nil
		}
		i := 0
		if _, err := fmt.Sscanf(dir, "%d/", &i); err != nil {
			return nil, false, err
		}
		return []string{fmt.Sprintf("file%d", i*1000+500)}, false, nil
	}
	for b.Loop() {
		got, err := Collect(DiffTrees(b.Context(), from, to, DiffOptions{Candidates: candidates}))
		if err != nil || len(got) != 20 { // the files and their directories
			b.Fatalf("%d changes, %v", len(got), err)
		}
	}
}

// benchSource is a real tree: LAYERCTL_IMAGES names images with an unpacked one
// in them, else Go's own tree is taken.
func benchSource(b *testing.B) string {
	if d := os.Getenv("LAYERCTL_IMAGES"); d != "" {
		return filepath.Join(d, "full-rootfs")
	}
	out, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		testenv.Optional(b, "the go command is not there")
	}
	return strings.TrimSpace(string(out))
}

func BenchmarkWriteTar(b *testing.B) {
	src := benchSource(b)
	var size int64
	b.Run("layer", func(b *testing.B) {
		defer cpu(b)()
		for b.Loop() {
			r, err := WriteTar(b.Context(), io.Discard, DiffTrees(b.Context(), "", src, DiffOptions{}), TarOptions{})
			if err != nil {
				b.Fatal(err)
			}
			size = r.Size
		}
		b.SetBytes(size)
	})
	// Through a pipe, as tar knows /dev/null and reads nothing; with a digest, too.
	for name, script := range map[string]string{"tar": "cat >/dev/null", "tar+sha256sum": "sha256sum >/dev/null"} {
		b.Run(name, func(b *testing.B) {
			defer cpu(b)()
			for b.Loop() {
				if out, err := exec.Command("sh", "-c", `tar --xattrs --sort=name -C "$0" -cf - . | `+script, src).CombinedOutput(); err != nil {
					b.Fatalf("%v: %s", err, out)
				}
			}
			b.SetBytes(size)
		})
	}
}

func BenchmarkWalk(b *testing.B) {
	src := benchSource(b)
	for b.Loop() {
		n := 0
		for _, err := range Walk(b.Context(), src) {
			if err != nil {
				b.Fatal(err)
			}
			n++
		}
		b.ReportMetric(float64(n), "entries")
	}
}
