package inflate

import (
	"bytes"
	"compress/gzip"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	klauspost "github.com/klauspost/compress/gzip"
)

// BenchmarkReader reads LAYERCTL_GZIP, or Go's sources and programs compressed, with the
// libraries beside us: MB of what comes out by time, and by time of the CPU.
func BenchmarkReader(b *testing.B) {
	data := benchData(b)
	for _, c := range []struct {
		name string
		open func(r io.Reader) (io.Reader, error)
	}{
		{"layerctl", func(r io.Reader) (io.Reader, error) { return NewReader(r) }},
		{"klauspost", func(r io.Reader) (io.Reader, error) { return klauspost.NewReader(r) }},
		{"standard", func(r io.Reader) (io.Reader, error) { return gzip.NewReader(r) }},
	} {
		b.Run(c.name, func(b *testing.B) {
			bytesOut, start := int64(0), cpu()
			for b.Loop() {
				z, err := c.open(bytes.NewReader(data))
				if err != nil {
					b.Fatal(err)
				}
				n, err := io.Copy(struct{ io.Writer }{io.Discard}, z)
				if err != nil {
					b.Fatal(err)
				}
				b.SetBytes(n)
				bytesOut += n
			}
			b.ReportMetric(float64(bytesOut)/1e6/(cpu()-start), "MB/cpu-s")
		})
	}
}

// cpu is the CPU time of the process, in seconds.
func cpu() float64 {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9
}

func benchData(b *testing.B) []byte {
	if file := os.Getenv("LAYERCTL_GZIP"); file != "" {
		data, err := os.ReadFile(file)
		if err != nil {
			b.Fatal(err)
		}
		return data
	}
	root, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		b.Fatal(err)
	}
	var data bytes.Buffer
	w := gzip.NewWriter(&data)
	for _, dir := range []string{"src/cmd/compile", "bin"} {
		err := filepath.WalkDir(filepath.Join(strings.TrimSpace(string(root)), dir), func(path string, e fs.DirEntry, err error) error {
			if err != nil || !e.Type().IsRegular() {
				return err
			}
			f, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			_, err = w.Write(f)
			return err
		})
		if err != nil {
			b.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		b.Fatal(err)
	}
	return data.Bytes()
}
