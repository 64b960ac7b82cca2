package uniontest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/internal/treegen"
)

const (
	firstSeed    = 1 // of a default run
	defaultSeeds = 36
	shrinkTries  = 200
)

// Differential draws random operations and does them on the kernel's overlayfs
// and on the subject. See the package comment for what the environment changes.
func Differential(t *testing.T, s *Subject) {
	old := unix.Umask(0o022)
	defer unix.Umask(old)
	kind := kinds(Config{})[0]
	d := &differential{T: t, subject: s, dir: testenv.FS(t, kind, testenv.Size(4<<30))}
	if file := os.Getenv("LAYERCTL_REPLAY"); file != "" {
		d.replay(file)
		return
	}
	if d.kept(); d.Failed() {
		return
	}
	seed, end := d.environment()
	n := 0
	for ; n < defaultSeeds || time.Now().Before(end); n++ {
		if !d.round(seed + uint64(n)) {
			break
		}
	}
	t.Logf("%d lists, %d operations, from seed %d", n, d.ops, seed)
}

// environment says from which seed lists are drawn, and until when beyond the
// default number.
func (d *differential) environment() (seed uint64, end time.Time) {
	d.Helper()
	seed = firstSeed
	if text := os.Getenv("LAYERCTL_DIFFERENTIAL"); text != "" {
		long, err := time.ParseDuration(text)
		if err != nil {
			d.Fatal(err)
		}
		end = time.Now().Add(long)
		seed = uint64(time.Now().UnixNano())
	}
	return testenv.Number(d, "LAYERCTL_SEED", seed), end
}

// differential is the test being run.
type differential struct {
	*testing.T
	subject *Subject
	dir     string
	runs    int
	ops     int
}

// kept replays the lists that once failed.
func (d *differential) kept() {
	names, _ := filepath.Glob("testdata/*.ops")
	for _, name := range names {
		d.replay(name)
	}
}

func (d *differential) replay(name string) {
	text, err := os.ReadFile(name)
	if err != nil {
		d.Fatal(err)
	}
	ops, err := treegen.Parse(string(text))
	if err == nil {
		err = d.run(ops)
	}
	if err != nil {
		d.Errorf("%s: %v", name, err)
	}
}

// round does one list, shrinks it if it fails, and reports whether to go on.
func (d *differential) round(seed uint64) bool {
	ops := draw(seed, os.Getuid() == 0)
	err := d.run(ops)
	if err == nil {
		return true
	}
	d.Logf("LAYERCTL_SEED=%d: %v\nshrinking", seed, err)
	head := ops[0]
	list := func(ops []treegen.Op) []treegen.Op { return append([]treegen.Op{head}, ops...) }
	tail := treegen.Shrink(ops[1:], shrinkTries, func(ops []treegen.Op) bool { return d.run(list(ops)) != nil })
	if again := d.run(list(tail)); again != nil {
		err = again
	}
	d.Errorf("LAYERCTL_SEED=%d: %v\nthe shortest failing list (keep it in fuse/uniontest/testdata/NAME.ops):\n%s",
		seed, err, treegen.Format(list(tail)))
	return false
}

// run does a list on both sides and returns the first difference.
func (d *differential) run(ops []treegen.Op) (err error) {
	if len(ops) == 0 || ops[0].Verb != opUnion {
		return errors.New("a list begins with its options")
	}
	d.runs++
	dir := filepath.Join(d.dir, fmt.Sprint(d.runs))
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	var options []string
	if ops[0].Attr != "" {
		options = strings.Split(ops[0].Attr, ",")
	}
	lowers, rest, err := d.layers(dir, options, ops[1:])
	if err != nil {
		return err
	}
	p := &pair{differential: d, longNames: hasLongNames(lowers)}
	defer p.end()
	for i, s := range []*Subject{Kernel(), d.subject} {
		one, err := newSide(filepath.Join(dir, "side"+fmt.Sprint(i)), s, lowers, options)
		if err != nil {
			return err
		}
		one.list.since = now(d)
		// which names of a file come into the upper says which directories merge,
		// and those show one link
		one.noLinks = slices.Contains(options, "index=on") && d.subject.differs(LinksLater) != ""
		p.sides = append(p.sides, one)
	}
	return p.run(rest)
}

// layers makes the lowers, nearest first: each is the upper of a kernel overlay
// over those below it.
func (d *differential) layers(dir string, options []string, ops []treegen.Op) (lowers []string, rest []treegen.Op, err error) {
	for n := 0; ; n++ {
		end := slices.IndexFunc(ops, func(o treegen.Op) bool { return o.Verb == opLayer })
		if end < 0 && n > 0 {
			return lowers, ops, nil
		}
		l := filepath.Join(dir, fmt.Sprintf("l%d", n))
		if err := os.Mkdir(l, 0o755); err != nil {
			return nil, nil, err
		}
		if end < 0 {
			return []string{l}, ops, nil
		}
		if err := d.layer(l, lowers, options, ops[:end]); err != nil {
			return nil, nil, err
		}
		lowers, ops = append([]string{l}, lowers...), ops[end+1:]
	}
}

// layer makes one lower.
func (d *differential) layer(l string, below, options []string, ops []treegen.Op) error {
	target := l
	if len(below) > 0 {
		work, mnt := l+".w", l+".m"
		if err := errors.Join(os.Mkdir(work, 0o755), os.Mkdir(mnt, 0o755)); err != nil {
			return err
		}
		s := (&Kit{spec: Spec{Lowers: below, Upper: l, Work: work, Options: withoutIndex(options)}}).full()
		m, err := Kernel().Mount(d.Context(), s, mnt)
		if err != nil {
			return err
		}
		defer func() {
			if err := m.Unmount(); err != nil {
				d.Error(err)
			}
		}()
		target = mnt
	}
	_, err := treegen.Apply(target, ops)
	return err
}

// withoutIndex leaves index=on out: an index belongs to the upper that it was
// made for, and that becomes a lower.
func withoutIndex(options []string) []string {
	return slices.DeleteFunc(slices.Clone(options), func(o string) bool { return o == "index=on" })
}

func newSide(dir string, s *Subject, lowers, options []string) (*side, error) {
	one := &side{subject: s, mnt: dir + "/m", open: map[uint32]*os.File{}, noTimes: slices.Contains(options, "metacopy=on")}
	one.list.comparable = true
	for _, p := range []string{dir, dir + "/m", dir + "/u", dir + "/w"} {
		if err := os.Mkdir(p, 0o755); err != nil {
			return nil, err
		}
	}
	at := time.Unix(born.Sec, int64(born.Nsec)) // before everything that is now
	if err := os.Chtimes(dir+"/u", at, at); err != nil {
		return nil, err
	}
	one.spec = (&Kit{spec: Spec{Lowers: lowers, Upper: dir + "/u", Work: dir + "/w", Options: options}}).full()
	return one, nil
}
