package union

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/internal/treegen"
)

// apply does an Op on a side, by its single calls.
func apply(s side, o treegen.Op) error {
	now := sys.Time{Sec: o.Sec % 1_000_000_000, Nsec: o.Nsec}
	touch := func(err error, p string) error {
		if err == nil {
			return s.utimes(p, now, now)
		}
		return err
	}
	for _, p := range []string{o.Path, o.To} {
		if o.Verb == treegen.Symlink && p == o.To {
			continue
		}
		for i := range p {
			if p[i] != '/' {
				continue
			}
			if a, err := s.stat(p[:i]); err != nil || a.Mode&sys.S_IFMT != sys.S_IFDIR {
				return err // through a symlink
			}
		}
	}
	switch o.Verb {
	case treegen.Write, treegen.Rewrite, treegen.Append, treegen.Retouch, treegen.Truncate:
		if a, err := s.stat(o.Path); err != nil || a.Mode&sys.S_IFMT != sys.S_IFREG {
			return err // who opens special files, and follows symlinks, is the kernel's client side
		}
	}
	if o.Verb == treegen.Setxattr || o.Verb == treegen.Rmxattr {
		a, err := s.stat(o.Path)
		if typ := a.Mode & sys.S_IFMT; err != nil || strings.HasPrefix(o.Attr, "user.") && typ != sys.S_IFREG && typ != sys.S_IFDIR {
			return err // also the client's side
		}
	}
	data := func(n int64) string { return string(treegen.Content(o.Seed, n)) }
	switch o.Verb {
	case treegen.Create, treegen.Replace:
		err := s.create(o.Path, data(o.Size))
		if err == nil {
			err = s.chmod(o.Path, o.Mode)
		}
		return touch(err, o.Path)
	case treegen.Write, treegen.Rewrite:
		return touch(s.write(o.Path, o.Off, data(o.Size)), o.Path)
	case treegen.Append, treegen.Retouch:
		a, err := s.stat(o.Path)
		if err != nil {
			return err
		}
		return touch(s.write(o.Path, a.Size, data(o.Size)), o.Path)
	case treegen.Truncate:
		if o.Size == 0 {
			return touch(s.trunc(o.Path), o.Path)
		}
		return touch(s.truncate(o.Path, o.Size), o.Path)
	case treegen.Chmod:
		a, err := s.stat(o.Path)
		if err != nil || a.Mode&sys.S_IFMT == sys.S_IFLNK {
			return err // the kernel's client side answers for symlinks
		}
		return s.chmod(o.Path, o.Mode)
	case treegen.Chown:
		return s.chown(o.Path, o.UID, o.GID)
	case treegen.Utimes:
		return s.utimes(o.Path, now, now)
	case treegen.Setxattr:
		return s.setxattr(o.Path, o.Attr, o.Value)
	case treegen.Rmxattr:
		return s.removexattr(o.Path, o.Attr)
	case treegen.Mkdir:
		return touch(s.mkdir(o.Path, o.Mode), o.Path)
	case treegen.Rmdir:
		return s.rmdir(o.Path)
	case treegen.Symlink:
		return touch(s.symlink(o.To, o.Path), o.Path)
	case treegen.Mknod:
		return touch(s.mknod(o.Path, o.Mode, o.Major, o.Minor), o.Path)
	case treegen.Link:
		return s.link(o.Path, o.To)
	case treegen.Rename:
		return s.rename(o.Path, o.To, 0)
	case treegen.Exchange:
		return s.rename(o.Path, o.To, sys.RENAME_EXCHANGE)
	case treegen.Unlink:
		return s.unlink(o.Path)
	case treegen.RmTree, treegen.Recreate:
		err := rmTree(s, o.Path)
		if err == nil && o.Verb == treegen.Recreate {
			err = s.mkdir(o.Path, o.Mode)
		}
		return err
	}
	panic("verb " + o.Verb)
}

func rmTree(s side, p string) error {
	a, err := s.stat(p)
	if err != nil {
		return err
	}
	if a.Mode&sys.S_IFMT != sys.S_IFDIR {
		return s.unlink(p)
	}
	l, err := s.readdir(p)
	if err != nil {
		return err
	}
	for _, e := range l {
		if err := rmTree(s, path.Join(p, e.Name)); err != nil {
			return err
		}
	}
	return s.rmdir(p)
}

// randomCase is one random stack of layers and what is then done to it.
type randomCase struct {
	c      Config
	layers [][]treegen.Op
	ops    []treegen.Op
}

func drawCase(seed uint64, c Config, lowers, n int) randomCase {
	r := rand.New(rand.NewPCG(seed, 1))
	gen := treegen.New(r, treegen.Config{Root: true, Names: []string{"a", "b", "c", "d"}, Depth: 4})
	rc := randomCase{c: c}
	for range lowers {
		rc.layers = append(rc.layers, gen.Ops(n))
	}
	rc.ops = gen.Ops(2 * n)
	return rc
}

// build makes the lowers: the first a plain tree, each next the upper of a mount
// of those before.
func (rc *randomCase) build(t testing.TB, dir string) {
	rc.c.Lowers = nil
	for i, ops := range rc.layers {
		l := filepath.Join(dir, "l"+strconv.Itoa(i))
		must(t, os.Mkdir(l, 0o755))
		if i == 0 {
			_, err := treegen.Apply(l, ops)
			must(t, err)
			rc.c.Lowers = []string{l}
			continue
		}
		work := filepath.Join(dir, "w"+strconv.Itoa(i))
		must(t, os.Mkdir(work, 0o755))
		c := rc.c
		c.Upper, c.Work = l, work
		k := mountKernel(t, c)
		for _, o := range ops {
			_ = apply(k, o)
		}
		k.close()
		rc.c.Lowers = append([]string{l}, rc.c.Lowers...)
	}
}

// withUpper makes an upper and a workdir in dir, for the lowers that build made.
func (rc *randomCase) withUpper(t testing.TB, dir, suffix string) Config {
	t.Helper()
	c := rc.c
	c.Upper, c.Work = filepath.Join(dir, "upper"+suffix), filepath.Join(dir, "work"+suffix)
	must(t, os.Mkdir(c.Upper, 0o755))
	must(t, os.Mkdir(c.Work, 0o755))
	return c
}

// run applies the ops to both sides and returns what differs.
func (rc *randomCase) run(t testing.TB, dir string) (diff string) {
	var configs [2]Config
	var sides [2]side
	for i := range sides {
		configs[i] = rc.withUpper(t, dir, strconv.Itoa(i))
	}
	sides[0], sides[1] = mountKernel(t, configs[0]), openUnion(t, configs[1])
	for n, o := range rc.ops {
		a, b := errno(apply(sides[0], o)), errno(apply(sides[1], o))
		if a != b {
			diff += fmt.Sprintf("op %d %s: kernel %s, union %s\n", n, o, a, b)
			break
		}
	}
	var lists [2][]string
	for i, s := range sides {
		lists[i] = listing(t, s)
	}
	diff += diffLines(lists[0], lists[1])
	for _, s := range sides {
		s.close()
	}
	if diff != "" {
		return diff
	}
	k, u := mountKernel(t, configs[1]), openUnion(t, configs[0])
	defer k.close()
	defer u.close()
	if d := diffLines(lists[1], listing(t, k)); d != "" {
		diff += "what the union (-) wrote, the kernel (+) reads otherwise:\n" + d
	}
	if d := diffLines(lists[0], listing(t, u)); d != "" {
		diff += "what the kernel (-) wrote, the union (+) reads otherwise:\n" + d
	}
	return diff
}

// kind is what sort of difference it is, so that a list is not shortened to one
// that fails in another way.
func kind(diff string) string {
	switch word, _, _ := strings.Cut(diff, " "); word {
	case "op":
		return diff[strings.LastIndex(diff, "kernel"):]
	case "what":
		return diff[:19] + strconv.FormatBool(strings.Contains(diff, "d_ino"))
	default:
		return word + strconv.FormatBool(strings.Contains(diff, "d_ino"))
	}
}

func TestRandomOpsLikeTheKernel(t *testing.T) {
	testenv.Root(t)
	seeds := 6
	if s := os.Getenv("UNION_RANDOM_SEEDS"); s != "" {
		seeds, _ = strconv.Atoi(s)
	}
	first := 0
	if s := os.Getenv("UNION_RANDOM_FIRST"); s != "" {
		first, _ = strconv.Atoi(s)
	}
	base := testenv.FS(t, "tmpfs")
	for name, c := range map[string]Config{
		"plain":    {},
		"redirect": {Redirect: RedirectOn},
		"metacopy": {Redirect: RedirectOn, Metacopy: true},
		"index":    {Index: true},
		"all":      {Redirect: RedirectOn, Metacopy: true, Index: true},
	} {
		t.Run(name, func(t *testing.T) {
			for seed := first; seed < first+seeds; seed++ {
				rc := drawCase(uint64(seed), c, 3, 40)
				fails := func(ops []treegen.Op) string {
					dir, err := os.MkdirTemp(base, "r")
					must(t, err)
					if os.Getenv("UNION_RANDOM_KEEP") == "" {
						defer os.RemoveAll(dir)
					}
					r := rc
					r.ops = ops
					r.build(t, dir)
					return r.run(t, dir)
				}
				d := fails(rc.ops)
				if d == "" {
					continue
				}
				short := treegen.Shrink(rc.ops, 60, func(ops []treegen.Op) bool { return kind(fails(ops)) == kind(d) })
				t.Fatalf("seed %d:\n%s\nshortest:\n%s\n%s", seed, d, treegen.Format(short), fails(short))
			}
		})
	}
}
