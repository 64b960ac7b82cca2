package devmapper

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/layerctl/layerctl/devmapper/dmtest"
	"github.com/layerctl/layerctl/devmapper/thin"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/layer"
)

// TestPowerCutAtEveryFlush records what a history of layers writes to a disk, and opens the
// driver on the disk as it was after a power cut at moments of it: right after a flush (of
// what came since, nothing was kept), or with some of what came since. Each time every layer
// that was committed is there and whole, nothing is left of the others once they
// are removed, and the pool's metadata is sound. LAYERCTL_CUT_POINTS says how many moments,
// LAYERCTL_CUT_STEPS how long the history is, LAYERCTL_SEED which one, when not the first.
func TestPowerCutAtEveryFlush(t *testing.T) {
	for name, stack := range stacks {
		t.Run(name, func(t *testing.T) {
			needsDM(t)
			testenv.Leaks(t)
			seed := testenv.Number(t, "LAYERCTL_SEED", 1)
			t.Logf("LAYERCTL_SEED=%d", seed)
			c := &cutter{T: t, stack: stack, r: rand.New(rand.NewPCG(seed, 7))}
			log := c.record(int(testenv.Number(t, "LAYERCTL_CUT_STEPS", 12)), nil)
			c.replay(log, int(testenv.Number(t, "LAYERCTL_CUT_POINTS", stack.points)))
		})
	}
}

// TestPowerCutFindsALayerThatIsNotThere: the test above fails if a layer is said to be
// committed before it is.
func TestPowerCutFindsALayerThatIsNotThere(t *testing.T) {
	needsDM(t)
	testenv.Leaks(t)
	c := &cutter{T: t, r: rand.New(rand.NewPCG(1, 7)),
		stack: stack{fsBytes: 256 * mib, options: map[string]string{"size": "64MiB", "data-size": "128MiB"}}}
	early := func(w *work, id drivers.ID) { c.mark("committed-%s", id) }
	log := c.record(3, early)
	c.complain = func(string, ...any) { c.complaints++ }
	c.fromFirst = true // all moments until one of them is seen through
	c.replay(log, len(log.Entries))
	if c.complaints == 0 {
		t.Error("nothing is found")
	}
}

// TestDroppedWrites: the disk loses whatever is written after some call returned, while
// the driver goes on and closes (dm-flakey). What was committed then is there and whole
// when the driver is opened on the disk again, as after the cuts above.
func TestDroppedWrites(t *testing.T) {
	for name, stack := range stacks {
		t.Run(name, func(t *testing.T) {
			needsDM(t)
			testenv.Leaks(t)
			seed := testenv.Number(t, "LAYERCTL_SEED", 1)
			c := &cutter{T: t, stack: stack, r: rand.New(rand.NewPCG(seed, 11)), mark: func(string, ...any) {}}
			d := dmtest.NewFlakyDisk(t, cutDisk, c.makeDisk())
			c.disk = d
			w := c.begin(nil)
			for cut := range testenv.Number(t, "LAYERCTL_CUT_POINTS", 4) {
				c.stack.up(d, cutDisk, c.dir)
				w.reopen(c.stack.options)
				for range 1 + c.r.IntN(4) {
					w.step()
				}
				d.DropWrites()
				_ = w.Close() // of a disk that does not keep what it says it does
				c.stack.down(d, c.dir)
				d.Keep()
				c.look(fmt.Sprintf("LAYERCTL_SEED=%d, cut %d", seed, cut), slices.Sorted(maps.Keys(w.alive)))
			}
			t.Logf("%d layers", w.last)
		})
	}
}

// The devices of a disk that is cut off.
const (
	cutDisk = "lt-cut-disk"
	cutFS   = "lt-cut-fs"
	cutMeta = "lt-cut-meta"
	cutData = "lt-cut-data"
)

// stack is what is on the disk: a file system with the driver's root, and, unless the pool is
// on files there, its devices.
type stack struct {
	fsBytes, metaBytes, dataBytes int64
	points                        uint64 // moments that are looked at, unless more are asked for
	options                       map[string]string
	quota                         int64 // of layers that grow
}

var stacks = map[string]stack{
	"pool on files": {points: 16, fsBytes: 256 * mib, options: map[string]string{"size": "64MiB", "data-size": "128MiB"}},
	"xfs":           {points: 6, fsBytes: 256 * mib, quota: 360 * mib, options: map[string]string{"filesystem": "xfs", "size": "320MiB", "data-size": "128MiB"}},
	"pool on devices": {points: 16, fsBytes: 16 * mib, metaBytes: 4 * mib, dataBytes: 160 * mib,
		options: map[string]string{"size": "64MiB", "data": thin.Node(cutData), "metadata": thin.Node(cutMeta)}},
}

// disk is what a stack is on.
type disk interface {
	Helper()
	Fatal(args ...any)
	Slice(name, of string, begin, bytes int64) (node string)
	Drop(name string)
}

// up makes the devices on a disk and mounts the file system.
func (s *stack) up(d disk, on, dir string) {
	d.Helper()
	node := d.Slice(cutFS, on, 0, s.fsBytes)
	if s.metaBytes > 0 {
		d.Slice(cutMeta, on, s.fsBytes, s.metaBytes)
		d.Slice(cutData, on, s.fsBytes+s.metaBytes, s.dataBytes)
	}
	if err := sys.Mount(node, dir, "ext4", 0, ""); err != nil {
		d.Fatal(err)
	}
}

func (s *stack) down(d disk, dir string) {
	d.Helper()
	if err := sys.Umount(dir, 0); err != nil {
		d.Fatal(err)
	}
	for _, name := range []string{cutData, cutMeta, cutFS} {
		d.Drop(name)
	}
}

// cutter records a history and cuts it.
type cutter struct {
	*testing.T
	stack stack
	r     *rand.Rand
	disk  disk
	dir   string
	mark  func(format string, args ...any) // notes what is true from then on
	trees map[drivers.ID]map[string]string // of every layer that was ever committed, by path

	recorded   *dmtest.Disk
	complain   func(format string, args ...any) // nil: Errorf
	complaints int                              // replay ends with the first
	fromFirst  bool                             // only moments at which a layer was said to be committed
	leaks      int                              // moments after which the pool had blocks for nobody
}

// record has layers made, changed, committed, shown and removed; before, if not nil, is called
// before each Commit.
func (c *cutter) record(steps int, before func(w *work, id drivers.ID)) *dmtest.Log {
	c.Helper()
	rec := dmtest.NewDisk(c.T, cutDisk, c.makeDisk())
	c.disk, c.mark, c.recorded = rec, rec.Mark, rec
	w := c.begin(before)
	c.stack.up(c.disk, cutDisk, c.dir)
	w.reopen(c.stack.options)
	for range steps {
		w.step()
	}
	w.bench.check(w.Close())
	c.stack.down(c.disk, c.dir)
	log := rec.End()
	c.Logf("%d layers, %d writes, %d flushes", w.last, len(log.Entries), len(flushes(log)))
	return log
}

// makeDisk makes a file with the file system in it.
func (c *cutter) makeDisk() (file string) {
	c.Helper()
	file = filepath.Join(testenv.Scratch(c), "disk")
	err := os.WriteFile(file, nil, 0o600)
	if err == nil {
		err = os.Truncate(file, c.stack.fsBytes+c.stack.metaBytes+c.stack.dataBytes)
	}
	if err != nil {
		c.Fatal(err)
	}
	out, err := exec.Command(testenv.Program(c, "mkfs.ext4", "e2fsprogs"), "-q", "-F", "-b", "4096", "-J", "size=4", "-E", "lazy_itable_init=0,lazy_journal_init=0",
		file, fmt.Sprintf("%dk", c.stack.fsBytes>>10)).CombinedOutput()
	if err != nil {
		c.Fatalf("%v\n%s", err, out)
	}
	return file
}

// begin is a history of no layers.
func (c *cutter) begin(before func(w *work, id drivers.ID)) *work {
	c.Helper()
	c.dir = filepath.Join(testenv.Scratch(c), "m")
	if err := os.Mkdir(c.dir, 0o700); err != nil {
		c.Fatal(err)
	}
	c.trees = map[drivers.ID]map[string]string{}
	return &work{bench: &bench{T: c.T, fs: c.dir}, cutter: c, alive: map[drivers.ID][]drivers.ID{}, before: before}
}

func flushes(log *dmtest.Log) (at []int) {
	for i, e := range log.Entries {
		if e.Durable() {
			at = append(at, i)
		}
	}
	return at
}

// work is a history being made.
type work struct {
	*bench
	cutter *cutter
	last   drivers.ID
	alive  map[drivers.ID][]drivers.ID // committed layers, with the parents of each
	before func(w *work, id drivers.ID)
}

func (w *work) step() {
	r := w.cutter.r
	ids := slices.Sorted(maps.Keys(w.alive))
	switch n := r.IntN(12); {
	case len(ids) == 0 || n == 0:
		w.newLayer(0)
	case n < 6 && len(ids) < 7:
		w.newLayer(ids[r.IntN(len(ids))])
	case n == 6: // one that is never committed
		w.last++
		w.create(w.last, w.under(ids[r.IntN(len(ids))])...)
		w.remove(w.last)
	case n == 7:
		w.last++
		v := drivers.Ref{ID: w.last, Parents: w.under(ids[r.IntN(len(ids))])}
		w.bench.check(w.Create(w.Context(), v, drivers.CreateOptions{ReadOnly: true}))
		w.edit(v, func(string) {})
		w.remove(w.last)
	case n == 8:
		w.bench.check(w.Close())
		w.reopen(w.cutter.stack.options)
	default:
		w.removeOne(ids[r.IntN(len(ids))])
	}
}

// under is the chain from a layer down.
func (w *work) under(id drivers.ID) []drivers.ID {
	return append([]drivers.ID{id}, w.alive[id]...)
}

// removeOne removes a committed layer that no other is on.
func (w *work) removeOne(id drivers.ID) {
	for _, below := range w.alive {
		if slices.Contains(below, id) {
			return
		}
	}
	w.cutter.mark("removing-%s", id)
	w.remove(id)
	delete(w.alive, id)
}

// newLayer makes a layer on another, or on nothing, by a tar or in a mount, and commits it,
// maybe in that mount.
func (w *work) newLayer(on drivers.ID) {
	r := w.cutter.r
	w.last++
	var below []drivers.ID
	tree := map[string]string{}
	if on != 0 {
		below, tree = w.under(on), maps.Clone(w.cutter.trees[on])
	}
	ref, o := drivers.Ref{ID: w.last, Parents: below}, drivers.CreateOptions{}
	if r.IntN(4) == 0 { // its file system grows
		o.Quota = max(96*mib, w.cutter.stack.quota)
	}
	w.bench.check(w.Create(w.Context(), ref, o))
	unmount := func() {}
	if r.IntN(2) == 0 {
		w.apply(ref, tree)
	} else {
		var dir string
		dir, unmount = w.mount(ref)
		w.change(dir, tree)
		if r.IntN(2) == 0 {
			unmount()
		}
	}
	if w.before != nil {
		w.before(w, ref.ID)
	}
	w.commit(ref)
	w.cutter.mark("committed-%s", ref.ID)
	unmount()
	w.cutter.trees[ref.ID] = tree
	w.alive[ref.ID] = below
}

func (w *work) content() []byte {
	r := w.cutter.r
	b := make([]byte, r.IntN(1<<(4+r.IntN(14))))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

func digest(b []byte) string { return fmt.Sprintf("%d %x", len(b), sha256.Sum256(b)) }

func (w *work) apply(ref drivers.Ref, tree map[string]string) {
	w.Helper()
	var b bytes.Buffer
	t := tar.NewWriter(&b)
	for range 1 + w.cutter.r.IntN(6) {
		name, content := fmt.Sprintf("f%d", w.cutter.r.IntN(20)), w.content()
		w.bench.check(t.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(content))}))
		_, err := t.Write(content)
		w.bench.check(err)
		tree[name] = digest(content)
	}
	w.bench.check(t.Close())
	w.bench.check(w.Apply(w.Context(), ref, &b, layer.ApplyOptions{}))
}

func (w *work) change(dir string, tree map[string]string) {
	w.Helper()
	for range 1 + w.cutter.r.IntN(6) {
		names := slices.Sorted(maps.Keys(tree))
		name := fmt.Sprintf("f%d", w.cutter.r.IntN(20))
		if n := w.cutter.r.IntN(4); n < 2 && len(names) > 0 {
			old := names[w.cutter.r.IntN(len(names))]
			if n == 0 {
				w.bench.check(os.Remove(dir + "/" + old))
			} else {
				w.bench.check(os.Rename(dir+"/"+old, dir+"/"+name))
			}
			gone := tree[old]
			if delete(tree, old); n == 1 {
				tree[name] = gone
			}
			continue
		}
		content := w.content()
		w.bench.check(os.WriteFile(dir+"/"+name, content, 0o644))
		tree[name] = digest(content)
	}
}

// replay looks at the disk at so many moments of the log.
func (c *cutter) replay(log *dmtest.Log, points int) {
	c.Helper()
	at := flushes(log)
	every := max(1, float64(len(at))/float64(points))
	rep := c.recorded.Replay(log)
	done := 0
	for f := c.r.Float64() * every; int(f) < len(at) && !c.Failed() && c.complaints == 0; f += every {
		i, next := at[int(f)], len(log.Entries)
		if int(f)+1 < len(at) {
			next = at[int(f)+1]
		}
		kept := said(log.Entries[:next])
		if c.fromFirst && len(kept) == 0 {
			continue
		}
		var also []int
		for j := i + 1; j < next && done%2 == 1; j++ {
			if c.r.IntN(2) == 0 {
				also = append(also, j)
			}
		}
		rep.To(i + 1)
		rep.Cut(cutDisk, also)
		c.look(fmt.Sprintf("after write %d of %d and %d of the %d before the next flush", i, len(log.Entries), len(also), next-i-1), kept)
		c.disk.Drop(cutDisk)
		done++
	}
	c.Logf("%d moments; after %d of them blocks were in use for nobody", done, c.leaks)
}

// said are the layers that were said to be committed, less those whose removal has begun.
func said(entries []dmtest.Entry) (ids []drivers.ID) {
	for _, e := range entries {
		what, name, _ := strings.Cut(strings.TrimRight(e.Mark, "\x00"), "-")
		id, ok := drivers.ParseID(name)
		switch {
		case !ok:
		case what == "committed":
			ids = append(ids, id)
		case what == "removing":
			ids = slices.DeleteFunc(ids, func(i drivers.ID) bool { return i == id })
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}

// look opens the driver after a power cut.
func (c *cutter) look(when string, kept []drivers.ID) {
	c.Helper()
	c.stack.up(c.disk, cutDisk, c.dir)
	defer c.stack.down(c.disk, c.dir)
	complain := func(format string, args ...any) {
		c.Helper()
		if c.complain != nil {
			c.complain(format, args...)
			return
		}
		c.Errorf(when+": "+format, args...)
	}
	b := &bench{T: c.T, fs: c.dir}
	b.reopen(c.stack.options)
	for _, id := range kept {
		l, err := b.layer(id)
		if err != nil || l.Kind != committed {
			complain("layer %s, which was committed: %+v, %v", id, l, err)
			continue
		}
		got, err := b.tree(id)
		if err != nil || !maps.Equal(got, c.trees[id]) {
			complain("layer %s: %v\n%v\nshould have\n%v", id, err, got, c.trees[id])
		}
	}
	var others []drivers.ID
	for id, err := range b.IDs(b.Context()) {
		b.check(err)
		if !slices.Contains(kept, id) {
			others = append(others, id)
		}
	}
	slices.Sort(others)
	slices.Reverse(others)
	b.remove(others...)
	if loose := b.whole(); len(loose) > 0 {
		complain("thin devices %v are nobody's", loose)
	}
	found, err := b.Examine(b.Context(), drivers.ExamineOptions{})
	found = slices.DeleteFunc(found, func(f drivers.Finding) bool { // the kernel's, see metadata.Report
		leaked := f.Fault == drivers.StorageLeaked && strings.Contains(f.Detail, "blocks of data")
		if leaked {
			c.leaks++
		}
		return leaked
	})
	if err != nil || len(found) > 0 {
		complain("%+v, %v", found, err)
	}
	metadata := b.pool.MetadataPath()
	b.check(b.Close())
	if what, err := thin.Check(b.Context(), metadata, false); err != nil || what != "" {
		complain("%s, %v", what, err)
	}
}

// tree is what a layer shows, by path.
func (b *bench) tree(id drivers.ID) (map[string]string, error) {
	got := map[string]string{}
	err := b.lookAt(b.Context(), drivers.Ref{ID: id}, func(s seen) error {
		return fs.WalkDir(os.DirFS(s.path), ".", func(path string, e fs.DirEntry, err error) error {
			if err != nil || e.IsDir() {
				return err
			}
			content, err := os.ReadFile(filepath.Join(s.path, path))
			got[path] = digest(content)
			return err
		})
	})
	return got, err
}
