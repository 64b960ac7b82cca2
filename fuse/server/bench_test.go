package server_test

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/layerctl/layerctl/fuse/server"
	"golang.org/x/sys/unix"
)

// cpu is the processor time that a process has used.
func cpu(t testing.TB, pid int) time.Duration {
	var ts unix.Timespec
	must(t, unix.ClockGettime(int32(^pid<<3|2), &ts)) // CPUCLOCK_SCHED of the process
	return time.Duration(ts.Nano())
}

// BenchmarkGetattr is the round trip of the smallest request, and what the
// server spends on it.
func BenchmarkGetattr(b *testing.B) {
	for name, o := range map[string]server.Options{
		"idle=1": {Timeout: -1, MaxIdle: 1},
		"idle=2": {Timeout: -1, MaxIdle: 2},
		"idle=4": {Timeout: -1, MaxIdle: 4},
	} {
		b.Run(name, func(b *testing.B) {
			dir := dirs(b, "ext4")
			must(b, os.WriteFile(filepath.Join(dir, "l", "f"), []byte("x"), 0o644))
			m := serve(b, setup{Dir: dir, Options: o})
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
