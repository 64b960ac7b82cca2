package server_test

import (
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/layerctl/layerctl/fuse/server"
	"github.com/layerctl/layerctl/fuse/union"
	"golang.org/x/sys/unix"
)

// cpu is the processor time that a process has used.
func cpu(t testing.TB, pid int) time.Duration {
	var ts unix.Timespec
	must(t, unix.ClockGettime(int32(^pid<<3|2), &ts)) // CPUCLOCK_SCHED of the process
	return time.Duration(ts.Nano())
}

// goFuse answers what BenchmarkGetattr asks, for go-fuse's server.
type goFuse struct {
	fuse.RawFileSystem
	u        *union.FS
	requests atomic.Uint64
}

func goFuseAttr(to *fuse.Attr, a *union.Attr) {
	to.Ino, to.Size, to.Mode, to.Nlink = a.Ino, uint64(a.Size), a.Mode, a.Nlink
}

func (g *goFuse) Lookup(_ <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	e, err := g.u.Lookup(g.u.Node(h.NodeId), name)
	if err != nil {
		return fuse.ToStatus(err)
	}
	out.NodeId = e.Node.ID()
	goFuseAttr(&out.Attr, &e.Attr)
	return fuse.OK
}

func (g *goFuse) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	g.requests.Add(1)
	a, err := g.u.Getattr(g.u.Node(in.NodeId), nil)
	goFuseAttr(&out.Attr, &a)
	return fuse.ToStatus(err)
}

func (g *goFuse) Open(<-chan struct{}, *fuse.OpenIn, *fuse.OpenOut) fuse.Status { return fuse.OK }

func serveGoFuse(u *union.FS, dir string) error {
	g := &goFuse{RawFileSystem: fuse.NewDefaultRawFileSystem(), u: u}
	srv, err := fuse.NewServer(g, filepath.Join(dir, "m"), &fuse.MountOptions{DirectMountStrict: true})
	if err != nil {
		return err
	}
	go srv.Serve()
	if err := srv.WaitMount(); err != nil {
		return err
	}
	sayReady()
	go counts(func() server.Counts { return server.Counts{Requests: g.requests.Load()} })
	srv.Wait()
	return u.Close()
}

// BenchmarkGetattr is the round trip of the smallest request, and what the
// server spends on it; "go-fuse" is the same by go-fuse's own server.
func BenchmarkGetattr(b *testing.B) {
	for _, name := range []string{"ours", "go-fuse"} {
		b.Run(name, func(b *testing.B) {
			dir := dirs(b, "ext4")
			must(b, os.WriteFile(filepath.Join(dir, "l", "f"), []byte("x"), 0o644))
			m := serve(b, setup{Dir: dir, Options: server.Options{Timeout: -1}, GoFuse: name == "go-fuse"})
			f, err := unix.Open(m.path("f"), unix.O_RDONLY, 0)
			must(b, err)
			defer unix.Close(f)
			var st unix.Stat_t
			n, before := m.counts().Requests, cpu(b, m.cmd.Process.Pid)
			b.ResetTimer()
			for range b.N {
				must(b, unix.Fstat(f, &st))
			}
			b.StopTimer()
			spent := cpu(b, m.cmd.Process.Pid) - before
			n = m.counts().Requests - n
			if n < uint64(b.N) {
				b.Fatalf("%d requests for %d calls: the kernel kept the attributes", n, b.N)
			}
			b.ReportMetric(float64(spent.Nanoseconds())/1e3/float64(n), "server-us/op")
		})
	}
}
