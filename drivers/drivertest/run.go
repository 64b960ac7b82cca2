package drivertest

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/testenv"
)

// Config says what is tested. Only Factory is needed.
type Config struct {
	Factory drivers.Factory
	// Options are the driver options of every Open; nil for none.
	Options map[string]string
	// FS are the kinds of file system that the driver must work on; nil means
	// ext4, xfs, btrfs and tmpfs.
	FS []string
	// RootOnly leaves the unprivileged run out: the driver cannot do without root.
	RootOnly bool
	// Flushes says that what a volatile commit need not flush is flushed by something
	// else: the power cuts that it would have to lose are shown by other drivers.
	Flushes bool
	// Must lists the capabilities, by their field's name in drivers.Capabilities,
	// that the driver has to have as root: "Diff", "Rebase", or only on some file
	// systems, "Quota:ext4,xfs".
	Must []string
	// MustUnprivileged is Must for the unprivileged run.
	MustUnprivileged []string
}

func (c Config) kinds() []string {
	kinds := c.FS
	if kinds == nil {
		kinds = []string{"ext4", "xfs", "btrfs", "tmpfs"}
	}
	if only := os.Getenv("LAYERCTL_FS"); only != "" {
		kinds = slices.DeleteFunc(slices.Clone(kinds), func(k string) bool { return !slices.Contains(strings.Split(only, ","), k) })
	}
	if testing.Short() {
		kinds = kinds[:min(1, len(kinds))]
	}
	return kinds
}

// Main is the body of the driver package's TestMain: a private mount namespace,
// and a check that nothing is left in the end. Each setup runs once before, with a
// directory of its own use that is removed in the end. It does not return.
func Main(m *testing.M, setups ...func(dir string) error) {
	var all []testenv.Setup
	for _, s := range setups {
		all = append(all, s)
	}
	testenv.Main(m, all...)
}

// testCase is one named test; it gets a driver opened on an empty root.
type testCase struct {
	name string
	run  func(k *kit)
}

// cases is the suite. A case belongs to the file of its concept.
// With -short, what has no two goroutines in it and takes long is left out: that
// is for runs under the race detector.
func cases() []testCase {
	if testing.Short() {
		return slices.Concat(lifecycleCases, mountCases, usageCases, busyCases, parallelCases, rebaseCases, differenceCases)
	}
	return slices.Concat(lifecycleCases, mountCases, stackCases, usageCases, exactCases(), busyCases,
		parallelCases, stepCases, rebaseCases, differenceCases, modelCases, powerCases)
}

// Run runs the whole suite, as subtests FS/CASE. It prints for each file system
// how many leaf tests passed and were skipped.
func Run(t *testing.T, c Config) {
	if runChild(t, c) {
		return
	}
	for _, kind := range c.kinds() {
		t.Run(kind, func(t *testing.T) {
			f := &fsys{cfg: c, kind: kind, privileged: true, dir: testenv.FS(t, kind)}
			letThrough(t, f.dir)
			f.run(t)
			if !c.RootOnly && !testing.Short() {
				t.Run("unprivileged", f.unprivileged)
			}
		})
	}
}

// letThrough lets other users reach dir: tests run as some.
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

// fsys is a file system that the cases share. Immutable but for count.
type fsys struct {
	cfg        Config
	kind       string
	privileged bool
	dir        string
	count      counter // of the goroutine that runs the cases
}

func (f *fsys) String() string {
	if f.privileged {
		return f.kind
	}
	return f.kind + "/unprivileged"
}

// run runs every case, then says what came of them.
func (f *fsys) run(t *testing.T) {
	for _, c := range cases() {
		f.count.run(t, c.name, func(t *testing.T) { f.runCase(t, c) })
	}
	fmt.Printf("drivertest: %s on %s: %d passed, %d skipped\n", f.cfg.Factory.Name, f, f.count.passed, f.count.skipped)
}

func (f *fsys) runCase(t *testing.T, c testCase) {
	testenv.Leaks(t)
	c.run(newKit(t, f))
}

// counter counts leaf tests: those that had no subtest of their own.
type counter struct{ passed, skipped, failed int }

// run runs a subtest and counts it, unless it had counted subtests itself.
func (c *counter) run(t *testing.T, name string, f func(*testing.T)) {
	before := *c
	ran := false
	var skipped, failed bool
	t.Run(name, func(t *testing.T) {
		ran = true
		defer func() { skipped, failed = t.Skipped(), t.Failed() }()
		f(t)
	})
	switch {
	case !ran || *c != before && !failed: // left out by -run, or counted below
	case failed:
		c.failed++
	case skipped:
		c.skipped++
	default:
		c.passed++
	}
}
