package uniontest

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerctl/layerctl/internal/testenv"
)

// Config says what Run runs.
type Config struct {
	Subject *Subject
	// FS are kinds of file system for layers, ext4 if nil. All cases run on the
	// first, those of the union on the others.
	FS []string
	// User says that the test runs as root of a user namespace, and Dir is where.
	User bool
	Dir  string
}

// group is cases of one concept.
type group struct {
	name  string
	cases map[string]func(*Kit)
	union bool // about layers, and so run on every file system
	user  bool // run in a user namespace, too
}

// Cases returns every case by "group/name".
func Cases() map[string]func(*Kit) {
	all := map[string]func(*Kit){}
	for _, g := range groups() {
		for name, f := range g.cases {
			all[g.name+"/"+name] = f
		}
	}
	return all
}

// fsys is a file system that cases share.
type fsys struct {
	kind string
	user bool // in a user namespace
	dir  string
	n    int
	ran  int

	mu      sync.Mutex
	running Mounted // guarded by mu: what the watchdog kills
}

func (f *fsys) newDir(t testing.TB) string {
	f.n++
	d := filepath.Join(f.dir, fmt.Sprint(f.n))
	if err := os.Mkdir(d, 0o755); err != nil {
		t.Fatal(err)
	}
	return d
}

// watch names the mount that a hanging case's watchdog kills.
func (f *fsys) watch(m Mounted) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.running = m
}

// guard kills a server whose case does not end.
func (f *fsys) guard(t *testing.T) (stop func()) {
	timer := time.AfterFunc(watchdog, func() {
		f.mu.Lock()
		m := f.running
		f.mu.Unlock()
		t.Errorf("the case did not end within %v", watchdog)
		if m != nil {
			m.Kill()
		}
	})
	return func() { timer.Stop() }
}

// Run runs the cases as subtests FS/GROUP/CASE.
func Run(t *testing.T, c Config) {
	old := unix.Umask(0o022)
	defer unix.Umask(old)
	for i, kind := range kinds(c) {
		t.Run(kind, func(t *testing.T) {
			f := &fsys{kind: kind, user: c.User, dir: c.Dir}
			if f.dir == "" {
				f.dir = testenv.FS(t, kind, testenv.Size(8<<30))
				letThrough(t, f.dir)
			}
			f.runAll(t, c.Subject, i == 0)
			t.Logf("%d cases on %s", f.ran, kind)
		})
	}
}

func kinds(c Config) []string {
	all := c.FS
	if all == nil {
		all = []string{"ext4"}
	}
	if only := os.Getenv("LAYERCTL_FS"); only != "" {
		all = slices.DeleteFunc(slices.Clone(all), func(k string) bool { return !slices.Contains(strings.Split(only, ","), k) })
	}
	return all
}

// letThrough lets other users reach dir.
func letThrough(t *testing.T, dir string) {
	t.Helper()
	for ; dir != "/"; dir = filepath.Dir(dir) {
		st, err := os.Stat(dir)
		if err == nil && st.Mode().Perm()&0o011 != 0o011 {
			err = os.Chmod(dir, st.Mode().Perm()|0o111)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func (f *fsys) runAll(t *testing.T, s *Subject, whole bool) {
	for _, g := range groups() {
		if !whole && !g.union || f.user && !g.user {
			continue
		}
		t.Run(g.name, func(t *testing.T) {
			for _, name := range slices.Sorted(maps.Keys(g.cases)) {
				t.Run(name, func(t *testing.T) {
					f.ran++
					f.run(t, s, g.cases[name])
				})
			}
		})
	}
}

// run runs one case on a subject.
func (f *fsys) run(t *testing.T, s *Subject, run func(*Kit)) {
	testenv.Leaks(t)
	if why := s.Defects[t.Name()[strings.Index(t.Name(), "/")+1:]]; why != "" {
		testenv.Optional(t, "known defect of "+s.Name+": "+why)
	}
	if s.Kernel {
		f.once(t, s, s, run)
		return
	}
	var ours, kernels *Kit
	t.Run("acts", func(t *testing.T) { ours = f.once(t, s, Kernel(), run) })
	t.Run("reads", func(t *testing.T) { kernels = f.once(t, Kernel(), s, run) })
	if ours == nil || kernels == nil || ours.unlike != "" || ours.saved == nil || kernels.saved == nil {
		return
	}
	a, b := kernels.saved, ours.saved
	if ours.unrepaired || f.user { // where there are no handles the kernel marks less
		a, b = unrepaired(a), unrepaired(b)
	}
	if d := difference(a, b); d != "" && !t.Failed() {
		t.Errorf("on disk the upper of %s (+) is not the kernel's (-):\n%s", s.Name, d)
	}
}

// once runs a case with one actor and one reader.
func (f *fsys) once(t *testing.T, actor, reader *Subject, run func(*Kit)) *Kit {
	defer f.guard(t)()
	k := newKit(t, f, actor, reader)
	t.Cleanup(k.cleanup) // after what the case opened is closed
	run(k)
	k.finish()
	return k
}

// repairs is what the kernel writes to directories of an upper made by hand.
var repairs = regexp.MustCompile(` (trusted|user)\.overlay\.(impure="y"|origin="\.\.\.")`)

// unrepaired takes from directories what was repaired.
func unrepaired(lines []string) []string {
	var all []string
	for _, l := range lines {
		if strings.Contains(l, "\" d ") {
			l = repairs.ReplaceAllString(l, "")
		}
		all = append(all, l)
	}
	return all
}
