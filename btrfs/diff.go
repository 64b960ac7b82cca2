package btrfs

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"strconv"
	"strings"
	"syscall"

	"github.com/layerctl/layerctl/btrfs/ioctl"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/layer"
)

// Diff lets the kernel say by SEND which paths of the two trees may differ, and
// compares exactly those: O(changes). What SEND says of a path is not looked at,
// only that it names it. Without the right to send, from nothing, between layers
// that have no parent in common, between two that made or changed a file at the same
// moment, and where there is no room for the snapshot that an active layer is sent
// from, it walks both trees.
func (d *driver) Diff(ctx context.Context, from, to drivers.Ref) iter.Seq2[layer.Change, error] {
	return func(yield func(layer.Change, error) bool) {
		err := d.diff(ctx, from, to, yield)
		if err != nil && err != errStopped {
			yield(layer.Change{}, d.wrap("diff", to.ID, err))
		}
	}
}

// errStopped says that the consumer of a sequence has enough.
var errStopped = errors.New("stopped")

func (d *driver) diff(ctx context.Context, from, to drivers.Ref, yield func(layer.Change, error) bool) error {
	send := d.admin && from.ID != 0 && bottom(from) == bottom(to)
	if send && d.quota != ioctl.QuotaOff {
		_ = d.dropQgroups(someQgroups) // of the snapshots of earlier ones
	}
	b, err := d.still(ctx, to, send)
	if err != nil {
		return err
	}
	defer b.close()
	a := &stillTree{}
	if from.ID != 0 {
		if a, err = d.still(ctx, from, send); err != nil {
			return fmt.Errorf("from %s: %w", from.ID, err)
		}
		defer a.close()
	}
	o := layer.DiffOptions{OverrideStat: d.keepsStat()}
	if send && !a.live && !b.live {
		if o.Candidates, err = d.candidates(ctx, from, to, a.fd, b.fd); err != nil {
			return err
		}
	}
	for ch, err := range layer.DiffTrees(ctx, a.path, b.path, o) {
		if err != nil {
			return err
		}
		if !yield(ch, nil) {
			return errStopped
		}
	}
	return nil
}

// candidates asks the kernel what may differ; nil if it cannot know.
func (d *driver) candidates(ctx context.Context, from, to drivers.Ref, a, b *sys.Fd) (func(string) ([]string, bool, error), error) {
	since, apart, err := d.apart(from, to)
	if err == nil && apart {
		apart, err = takenForOne(a, b, since)
	}
	if err != nil || apart {
		return nil, err
	}
	c, err := touched(ctx, a, b)
	switch {
	case err == nil:
		return c.Names, nil
	case cannotSend(err):
		return nil, nil
	}
	return nil, err
}

// cannotSend: the kernel cannot say what changed, and the walk can: a path is too
// long for SEND, or the subvolume is being worked on.
func cannotSend(err error) bool {
	for _, e := range []syscall.Errno{syscall.EPERM, syscall.EAGAIN, syscall.ENAMETOOLONG, syscall.ENOTTY, syscall.EOPNOTSUPP, syscall.EOVERFLOW} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// bottom is the layer that a chain stands on.
func bottom(r drivers.Ref) drivers.ID {
	if n := len(r.Parents); n > 0 {
		return r.Parents[n-1]
	}
	return r.ID
}

// stillTree is a tree that is looked at, and what holds it.
type stillTree struct {
	path string // "" is the empty tree
	fd   *sys.Fd
	live bool // there is no room for a snapshot of it, so that it cannot be sent
	drop func()
}

func (t *stillTree) close() {
	t.fd.Close()
	if t.drop != nil {
		t.drop()
	}
}

// still gives the tree of a layer; with send it is read-only, for which an active
// one is shown by a snapshot.
func (d *driver) still(ctx context.Context, r drivers.Ref, send bool) (*stillTree, error) {
	l, err := d.layer(r.ID)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	tree, err := l.tree()
	if err != nil {
		return nil, err
	}
	t := &stillTree{path: d.treePath(r.ID, l.kind), fd: tree}
	if l.kind == writable {
		err = refuseNested(tree)
	}
	if err == nil && send {
		err = l.hold(d.destroyer(context.WithoutCancel(ctx)), t)
		if t.live = noRoom(err); t.live {
			err = nil
		}
	}
	if err != nil {
		t.close()
		return nil, err
	}
	return t, nil
}

// noRoom reports whether a file system is full, or read-only.
func noRoom(err error) bool { return drivers.IsFull(err) || errors.Is(err, syscall.EROFS) }

// hold makes a tree one that can be sent.
func (l *layerDir) hold(r destroyer, t *stillTree) error {
	ro, err := ioctl.ReadOnly(t.fd)
	switch {
	case err != nil || ro:
		return err
	case l.kind != writable: // a view of nothing
		return ioctl.SetReadOnly(t.fd, true)
	}
	l.sweepSnapshots(r)
	return l.snapshot(r, t)
}

// snapshot makes t a snapshot of it, in a directory of its own that is locked for
// as long as it is in use: a directory that nobody holds was left by a crash.
func (l *layerDir) snapshot(r destroyer, t *stillTree) error {
	name, dir, lock, err := l.snapshotDir()
	if err != nil {
		return err
	}
	in, err := l.Dup()
	if err != nil {
		lock.Close()
		dir.Close()
		return err
	}
	drop := func() {
		_ = r.layer(in, name)
		lock.Close()
		dir.Close()
		in.Close()
	}
	if err := ioctl.Snapshot(t.fd, dir, "s", true); err != nil {
		drop()
		return err
	}
	s, err := dir.Openat("s", sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		drop()
		return err
	}
	t.fd.Close()
	t.fd, t.drop = s, drop
	t.path = l.Name() + "/" + name + "/s"
	return nil
}

// snapshotDir makes a directory and locks it; another one if a sweeper was
// between the two.
func (l *layerDir) snapshotDir() (name string, dir *sys.Fd, lock *sys.Lock, err error) {
	for {
		name = diffPrefix + strconv.FormatUint(rand.Uint64(), 36)
		if err := l.Mkdir(name, 0o700); err != nil {
			return "", nil, nil, err
		}
		dir, err = l.Openat(name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
		if errors.Is(err, syscall.ENOENT) {
			continue
		}
		if err != nil {
			return "", nil, nil, err
		}
		lock, err = dir.TryLock(sys.LockExclusive)
		if err == nil {
			var there bool
			if there, err = l.Fd.Exists(name); there {
				return name, dir, lock, nil
			}
			lock.Close()
		}
		dir.Close()
		if err != nil && !errors.Is(err, sys.ErrLocked) && !errors.Is(err, syscall.ENOENT) {
			return "", nil, nil, err
		}
	}
}

// sweepSnapshots deletes the snapshots of diffs that were killed.
func (l *layerDir) sweepSnapshots(r destroyer) {
	names, err := l.ReadDir()
	if err != nil {
		return
	}
	for _, e := range names {
		if !strings.HasPrefix(e.Name, diffPrefix) {
			continue
		}
		dir, err := l.Openat(e.Name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
		if err != nil {
			continue
		}
		if lock, err := dir.TryLock(sys.LockExclusive); err == nil {
			_ = r.layer(l.Fd, e.Name)
			lock.Close()
		}
		dir.Close()
	}
}
