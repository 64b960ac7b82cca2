package union

import (
	"errors"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"syscall"
	"testing"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/internal/treegen"
)

// TestManyAtOnce: several goroutines change one small tree at the same time, files
// are open meanwhile, directories are read, and few descriptors may be kept.
// Nothing hangs, no answer is one that no order explains, every reference comes
// back, and what is there at the end is what the kernel sees in the layers.
func TestManyAtOnce(t *testing.T) {
	testenv.Root(t)
	base := testenv.FS(t, "tmpfs")
	rounds, ops := 6, 250
	if s := os.Getenv("UNION_CONCURRENT_ROUNDS"); s != "" {
		rounds, _ = strconv.Atoi(s)
	}
	for round := range rounds {
		c := Config{Redirect: RedirectOn, MaxDirs: 4}
		switch round % 5 {
		case 1:
			c.Metacopy = true
		case 2:
			c.Index = true
		case 3:
			c.Metacopy, c.Index = true, true
		case 4:
			c.Index, c.NFSExport = true, true
		}
		rc := drawCase(uint64(1000+round), c, 2, 60)
		dir, err := os.MkdirTemp(base, "c")
		must(t, err)
		rc.build(t, dir)
		c = rc.withUpper(t, dir, "")
		u := openUnion(t, c)
		u.shared = true
		if round < 4 {
			u.fs.large = 1 // all files are built before the locks are taken
		}
		var wg sync.WaitGroup
		for g := range 8 {
			wg.Go(func() {
				r := rand.New(rand.NewPCG(uint64(round), uint64(g)))
				gen := treegen.New(r, treegen.Config{Root: true, Names: []string{"a", "b", "c"}, Depth: 3, FileSize: 5000})
				for range ops {
					o := gen.Next()
					if err := apply(u, o); err != nil && !explained(err) {
						t.Errorf("%s: %v", o, err)
					}
					openAndLook(t, u, o.Path, r)
				}
			})
		}
		wg.Wait()
		is := listing(t, u)
		u.close()
		k := mountKernel(t, c)
		if d := diffLines(is, listing(t, k)); d != "" {
			t.Errorf("round %d: the union (-) shows what the kernel (+) does not see:\n%s", round, d)
		}
		k.close()
	}
}

// explained tells whether an error is one that two orders of things can give.
func explained(err error) bool {
	for _, e := range []error{syscall.ENOENT, syscall.EEXIST, syscall.ENOTDIR, syscall.EISDIR, syscall.ENOTEMPTY, syscall.EINVAL,
		syscall.ENODATA, syscall.EPERM, syscall.EOPNOTSUPP, syscall.EBUSY, syscall.ESTALE, syscall.EACCES, syscall.ELOOP, syscall.EXDEV, syscall.ENXIO} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// openAndLook keeps something open while others change it.
func openAndLook(t *testing.T, u *unionSide, p string, r *rand.Rand) {
	if u.fs.config.NFSExport { // what just was there, or somebody else makes
		if e, err := u.fs.Recall(firstPlace + r.Uint64N(50)); err == nil {
			_, _ = u.fs.Setattr(rootCaller, e.Node, nil, SetAttr{Valid: SetMode, Mode: 0o755})
			u.fs.Forget(e.Node.ID(), 1)
		} else if err != syscall.ESTALE {
			t.Errorf("by a handle: %v", err)
		}
	}
	_ = u.walk(p, func(n *Node) error {
		if n.isDir() {
			d, err := u.fs.OpenDir(n)
			if err != nil {
				return err
			}
			defer d.Close()
			return d.ReadPlus(0, func(_ DirEntry, e Entry) bool { u.fs.Forget(e.Node.ID(), 1); return true })
		}
		if n.typ != sys.S_IFREG {
			return nil
		}
		flags := []uint32{syscall.O_RDONLY, syscall.O_RDWR}[r.IntN(2)]
		f, err := u.fs.Open(Caller{}, n, flags)
		if err != nil {
			return err
		}
		defer f.Close()
		var b [100]byte
		if _, err := f.ReadAt(b[:], 0); err != nil {
			t.Errorf("%s: read: %v", p, err)
		}
		if flags == syscall.O_RDWR {
			if _, err := f.WriteAt([]byte("x"), 0, false); err != nil {
				t.Errorf("%s: write: %v", p, err)
			}
		}
		if _, err := u.fs.Getattr(n, f); err != nil {
			t.Errorf("%s: fstat: %v", p, err)
		}
		if _, err := u.fs.Setattr(rootCaller, n, f, SetAttr{Valid: SetMode, Mode: 0o640}); err != nil {
			t.Errorf("%s: fchmod: %v", p, err)
		}
		return nil
	})
}
