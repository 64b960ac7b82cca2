package drivertest

import (
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/internal/treegen"
	"github.com/layerctl/layerctl/layer"
)

var modelCases = []testCase{
	{"random operations", randomOperations},
	{"lists that once failed", replayLists},
}

// commitOp ends a layer in a list of operations and begins the next on top of
// it. It is treegen's to print and parse and ours to do.
const commitOp treegen.Verb = "commit"

const (
	modelRounds  = 4
	modelOps     = 120
	modelPerOps  = 20 // operations of one layer
	shrinkRounds = 150
)

//go:embed testdata/*.ops
var replays embed.FS

// randomOperations does the same random changes to a stack of layers and to a
// plain directory.
func randomOperations(k *kit) {
	if file := os.Getenv("LAYERCTL_REPLAY"); file != "" {
		text, err := os.ReadFile(file)
		k.check(err)
		k.replay(file, string(text))
		return
	}
	seed := testenv.Number(k, "LAYERCTL_SEED", uint64(time.Now().UnixNano()))
	for round := range modelRounds {
		ops := k.drawn(seed + uint64(round))
		if err := k.model(ops); err != nil {
			k.modelFailed(seed+uint64(round), ops, err)
			return
		}
	}
}

// drawn draws one round's list from a seed.
func (k *kit) drawn(seed uint64) []treegen.Op {
	g := treegen.New(rand.New(rand.NewPCG(seed, seed)), treegen.Config{Root: k.fs.privileged, Sockets: true})
	var ops []treegen.Op
	for n := range modelOps {
		if n > 0 && n%modelPerOps == 0 {
			ops = append(ops, treegen.Op{Verb: commitOp})
		}
		ops = append(ops, g.Next())
	}
	return ops
}

// modelFailed shrinks a failing list and prints it, ready for testdata.
func (k *kit) modelFailed(seed uint64, ops []treegen.Op, err error) {
	short := treegen.Shrink(ops, shrinkRounds, func(ops []treegen.Op) bool { return k.model(ops) != nil })
	if again := k.model(short); again != nil {
		err = again
	}
	k.Errorf("LAYERCTL_SEED=%d: %v\nthe shortest failing list (keep it in drivers/drivertest/testdata/NAME.ops):\n%s",
		seed, err, treegen.Format(short))
}

func (k *kit) replay(name, text string) {
	ops, err := treegen.Parse(text)
	k.check(err)
	if err := k.model(ops); err != nil {
		k.Errorf("%s: %v", name, err)
	}
}

func replayLists(k *kit) {
	names, err := fs.Glob(replays, "testdata/*.ops")
	k.check(err)
	for _, name := range names {
		text, err := replays.ReadFile(name)
		k.check(err)
		k.replay(name, string(text))
	}
}

// modelRun is one list being done. The plain directory is the model; it takes
// the driver's named differences.
type modelRun struct {
	k     *kit
	plain string
	layer drivers.Ref // being written to
	dir   string      // its mount
	below drivers.Ref // the layer that it is on; the zero Ref for none
	was   []string    // the tree of below
	// lower holds the plain files that the driver has in layers below.
	lower map[inode]bool
}

// inode is a file of the plain directory: its number may be used again, the time
// of its making is not.
type inode struct {
	ino  uint64
	born sys.Time
}

func inodeOf(st *sys.Stat) inode { return inode{st.Ino, st.Btime} }

// model does a list on both sides and returns the first difference.
func (k *kit) model(ops []treegen.Op) (err error) {
	m := &modelRun{k: k, plain: k.dir()}
	k.check(errors.Join(os.Chmod(m.plain, 0o755), m.pinRoot(m.plain)))
	var made []drivers.Ref
	defer func() {
		m.unmount()
		for _, r := range slices.Backward(made) {
			err = errors.Join(err, k.driver.Remove(k.ctx, r.ID))
		}
		err = errors.Join(err, os.RemoveAll(m.plain))
	}()
	ops = append(slices.Clone(ops), treegen.Op{Verb: commitOp})
	for i, o := range ops {
		if m.dir == "" {
			if err := m.begin(); err != nil {
				return err
			}
			made = append(made, m.layer)
		}
		if err := m.do(o); err != nil {
			return fmt.Errorf("operation %d, %s: %w", i+1, o, err)
		}
	}
	return nil
}

// begin makes and mounts the next layer.
func (m *modelRun) begin() error {
	k := m.k
	m.layer = k.ref(m.below)
	if err := k.driver.Create(k.ctx, m.layer, drivers.CreateOptions{Volatile: true}); err != nil {
		return err
	}
	m.dir = k.mount(m.layer, drivers.MountOptions{})
	if m.below.ID == 0 {
		return m.pinRoot(m.dir)
	}
	return nil
}

func (m *modelRun) pinRoot(dir string) error {
	return os.Chtimes(dir, time.Unix(pinned.Sec, 0), time.Unix(pinned.Sec, 0))
}

func (m *modelRun) unmount() {
	if m.dir != "" {
		m.k.umount(m.dir)
		m.dir = ""
	}
}

// do does one operation on both sides and compares what it returned.
func (m *modelRun) do(o treegen.Op) error {
	if o.Verb == commitOp {
		return m.commit()
	}
	got, err := treegen.Apply(m.dir, []treegen.Op{o})
	if err != nil {
		return err
	}
	if got[0] == syscall.EXDEV && m.maybeEXDEV(o) {
		return nil
	}
	if got[0] == 0 && o.Verb == treegen.Link && m.k.caps.LinksSettle {
		m.unmount()
		m.dir = m.k.mount(m.layer, drivers.MountOptions{})
	}
	if got[0] == 0 && m.k.caps.BreaksHardLinks {
		if err := m.separate(o); err != nil {
			return err
		}
	}
	want, err := treegen.Apply(m.plain, []treegen.Op{o})
	if err != nil {
		return err
	}
	if got[0] != want[0] && !absentACL(o, got[0], want[0]) && !notEmpty(got[0], want[0]) {
		return fmt.Errorf("%v, a plain directory %v", got[0], want[0])
	}
	return nil
}

// absentACL: taking away an ACL that is not there is ENODATA on some file systems
// and nothing on others; either changes nothing.
func absentACL(o treegen.Op, a, b syscall.Errno) bool {
	return o.Verb == treegen.Rmxattr && strings.HasPrefix(o.Attr, "system.posix_acl_") &&
		(a == 0 && b == syscall.ENODATA || a == syscall.ENODATA && b == 0)
}

// notEmpty: a rename onto a directory that is not empty is ENOTEMPTY or EEXIST, as
// the file system likes (rename(2)).
func notEmpty(a, b syscall.Errno) bool {
	return a == syscall.ENOTEMPTY && b == syscall.EEXIST || a == syscall.EEXIST && b == syscall.ENOTEMPTY
}

// maybeEXDEV reports whether the driver may refuse to rename: DirRenameEXDEV
// is about directories that a layer below has.
func (m *modelRun) maybeEXDEV(o treegen.Op) bool {
	if !m.k.caps.DirRenameEXDEV || o.Verb != treegen.Rename && o.Verb != treegen.Exchange {
		return false
	}
	return slices.ContainsFunc([]string{o.Path, o.To}, func(p string) bool {
		st, err := sys.LstatPath(m.plain + "/" + p)
		return err == nil && st.IsDir() && m.lower[inodeOf(&st)]
	})
}

// separate does by hand what the driver's copy-up did by itself when o
// succeeded: a changed name of a hard-link group of a layer below leaves the
// group. A rename of a name to itself changes nothing.
func (m *modelRun) separate(o treegen.Op) error {
	var paths []string
	switch o.Verb {
	case treegen.Write, treegen.Append, treegen.Truncate, treegen.Rewrite, treegen.Retouch,
		treegen.Chmod, treegen.Chown, treegen.Utimes, treegen.Setxattr, treegen.Rmxattr, treegen.Link, treegen.Rename:
		paths = []string{o.Path}
	case treegen.Exchange:
		paths = []string{o.Path, o.To}
	}
	if o.Path == o.To {
		return nil
	}
	for _, p := range paths {
		st, err := sys.LstatPath(m.plain + "/" + p)
		if err != nil || st.IsDir() || !m.lower[inodeOf(&st)] {
			continue
		}
		if st.Nlink < 2 { // copied up whole: what is linked to it from now on is the layer's own group
			delete(m.lower, inodeOf(&st))
			continue
		}
		if err := m.separateName(p); err != nil {
			return err
		}
	}
	return nil
}

// separateName leaves the directory's mtime alone.
func (m *modelRun) separateName(p string) error {
	parent := m.plain
	if i := strings.LastIndexByte(p, '/'); i > 0 {
		parent += "/" + p[:i]
	}
	st, err := sys.StatPath(parent)
	if err != nil {
		return err
	}
	root, err := sys.OpenDir(m.plain)
	if err != nil {
		return err
	}
	defer root.Close()
	if err := separate(root, p); err != nil {
		return err
	}
	d, err := sys.OpenDir(parent)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Utimes("", st.Atime, st.Mtime)
}

// commit compares the trees, commits the layer and compares them again, and
// its changeset with the exact walk's.
func (m *modelRun) commit() error {
	k := m.k
	want, err := list(m.plain)
	if err != nil {
		return err
	}
	if err := m.compare("the writable layer", want); err != nil {
		return err
	}
	m.unmount()
	if _, err := k.driver.Commit(k.ctx, m.layer, drivers.CommitOptions{Volatile: true}); err != nil {
		return err
	}
	m.dir = k.mount(m.layer, drivers.MountOptions{})
	if err := m.compare("the committed layer", want); err != nil {
		return err
	}
	if err := m.compareDiff(); err != nil {
		return err
	}
	m.unmount()
	m.below, m.was = m.layer, want
	m.lower = map[inode]bool{}
	return inodes(m.plain, m.lower)
}

func (m *modelRun) compare(what string, want []string) error {
	got, err := list(m.dir)
	if err != nil {
		return err
	}
	if d := difference(got, want); d != "" {
		return fmt.Errorf("%s (- plain directory, + driver):\n%s", what, d)
	}
	return nil
}

// compareDiff compares the driver's changeset with the walk over both mounts.
func (m *modelRun) compareDiff() error {
	k := m.k
	differ, ok := k.driver.(drivers.Differ)
	if !ok {
		return nil
	}
	var below string
	if m.below.ID != 0 {
		below = k.mount(m.below, drivers.MountOptions{})
		defer k.umount(below)
	}
	o := layer.DiffOptions{OverrideStat: !k.fs.privileged}
	want, err := Collect(k.ctx, layer.DiffTrees(k.ctx, below, m.dir, o))
	if err != nil {
		return fmt.Errorf("walk: %w", err)
	}
	got, err := Collect(k.ctx, differ.Diff(k.ctx, m.below, m.layer))
	if err != nil {
		return fmt.Errorf("diff: %w", err)
	}
	if d := difference(got.Lines, want.Lines); d != "" {
		return fmt.Errorf("the changes (- walk, + driver):\n%s", d)
	}
	if string(got.Tar) != string(want.Tar) {
		return errors.New("the same changes, other tars")
	}
	return nil
}

// inodes collects the files of a tree.
func inodes(dir string, into map[inode]bool) error {
	d, err := sys.OpenDir(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return inodesBelow(d, into)
}

func inodesBelow(d *sys.Fd, into map[inode]bool) error {
	names, err := d.ReadDir()
	if err != nil {
		return err
	}
	for _, n := range names {
		st, err := d.Stat(n.Name)
		if err != nil {
			return err
		}
		into[inodeOf(&st)] = true
		if !st.IsDir() {
			continue
		}
		sub, err := d.Openat(n.Name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
		if err != nil {
			return err
		}
		err = inodesBelow(sub, into)
		sub.Close()
		if err != nil {
			return err
		}
	}
	return nil
}
