package union

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/kprobe"
	"github.com/layerctl/layerctl/internal/sys"
)

// With Config.Index, workdir/index has an entry for each lower file with several
// links that was copied up, named by the fileID of the lower file. The entry is a
// link of the copy, and the names in upper are links of it: so names that are not
// copied up yet find the copy. How many links the union shows stands in xattr nlink
// of the copy (see linkCount).
//
// With Config.NFSExport everything that is copied up has an entry. A directory's is
// an empty directory whose xattr upper names the one in upper. An entry becomes a
// whiteout when the object is gone, so that its handle does not find the lower one.
//
// Xattr origin of upper's root and xattr upper of index tie upper, index and the
// first lower to one another: with other ones the entries mean nothing.

// layerRoot is the root of a layer: a descriptor that is not O_PATH, and the UUID of
// its file system.
type layerRoot struct {
	fd   int
	uuid [16]byte
}

// resolve opens (O_PATH) an object by its id in the first layer that has it; -1
// where none does. Directories of the same file system outside of the layer count
// as not there; of a file nobody can tell.
func resolve(id *fileID, layers []layerRoot) (fd int, layer int, err error) {
	for i, l := range layers {
		if l.uuid != id.uuid {
			continue
		}
		n, err := openID(l.fd, id)
		if err == nil {
			return n, i, nil
		}
		if err != syscall.ESTALE && err != syscall.ENOENT {
			return -1, 0, err
		}
	}
	return -1, 0, nil
}

// openID opens an object of the layer at root by its handle.
func openID(root int, id *fileID) (int, error) {
	n, err := sys.OpenHandleBare(root, &id.handle, sys.O_PATH)
	if err == syscall.EBADF { // root is O_PATH
		var readable int
		if readable, err = sys.ReopenBare(root, sys.O_RDONLY|sys.O_DIRECTORY); err != nil {
			return -1, err
		}
		n, err = sys.OpenHandleBare(readable, &id.handle, sys.O_PATH)
		sys.CloseBare(readable)
	}
	if err != nil {
		return -1, err
	}
	var st sys.Stat
	if err = sys.StatBare(n, "", &st); err == nil && st.IsDir() {
		err = belongs(n, root)
	}
	if err != nil {
		sys.CloseBare(n)
		return -1, err
	}
	return n, nil
}

// belongs is ESTALE unless the directory n is root or below it.
func belongs(n, root int) error {
	d, err := sys.DupBare(n)
	if err != nil {
		return err
	}
	dir := sys.NewFd(d, "directory of a handle")
	defer dir.Close()
	if root, err = sys.DupBare(root); err != nil {
		return err
	}
	top := sys.NewFd(root, "layer")
	defer top.Close()
	in, err := inside(dir, top)
	if err == nil && !in {
		err = syscall.ESTALE
	}
	return err
}

// mayIndex tells whether all layers have what an index needs, and why not.
func (u *upper) mayIndex(lowers []layerRoot) error {
	switch {
	case !u.can.xattrs:
		return errors.New("the upper's file system takes no xattrs of overlayfs")
	case u.can.handles != kprobe.Yes:
		return errors.New("this process cannot open files by handle")
	case !u.hasUUID:
		return errors.New("the upper's file system does not say its UUID")
	}
	var id fileID
	for i, l := range lowers {
		if err := identify(l.fd, "", l.uuid, &id); err != nil {
			return fmt.Errorf("lower %d has no file handles: %w", i+1, err)
		}
	}
	return nil
}

// verifyOrigins ties upper's root to the first lower's, and index to upper's root,
// or checks that they are tied: ESTALE where to others. It returns what the tie
// says.
func (u *upper) verifyOrigins(lower layerRoot) error {
	var id fileID
	if err := identify(lower.fd, "", lower.uuid, &id); err != nil {
		return err
	}
	if err := u.tie(u.root.Int(), u.xattrs.origin, &id, true); err != nil {
		return fmt.Errorf("upper belongs to another lower: %w", err)
	}
	if err := u.identifyUpper(u.root.Int(), &id); err != nil {
		return err
	}
	// Early kernels kept it in origin.
	err := u.tie(u.index.Int(), u.xattrs.origin, &id, false)
	if err == nil || err == syscall.ENODATA {
		err = u.tie(u.index.Int(), u.xattrs.upper, &id, true)
	}
	if err != nil {
		return fmt.Errorf("index belongs to another upper: delete it, or do without index: %w", err)
	}
	return nil
}

func (u *upper) identifyUpper(fd int, id *fileID) error {
	if err := identify(fd, "", u.uuid, id); err != nil {
		return err
	}
	id.inUpper = true
	return nil
}

// tie checks that an xattr of a directory has the id, and with set writes it if it
// is not there.
func (u *upper) tie(fd int, attr string, id *fileID, set bool) error {
	var want, have [fbHeader + sys.MaxHandle + 1]byte
	value := id.appendTo(want[:0])
	n, err := sys.GetxattrBare(fd, "", attr, have[:])
	var stored fileID
	if err == nil {
		if known, _ := stored.parse(attr, have[:n]); !known {
			err = syscall.ENODATA // as good as none
		}
	}
	switch {
	case err == nil && bytes.Equal(have[:n], value):
		return nil
	case err == nil:
		return fmt.Errorf("%s: %w: %w", attr, errdefs.ErrFailedPrecondition, syscall.ESTALE)
	case err == syscall.ENODATA && set:
		return sys.SetxattrBare(fd, "", attr, value, 0)
	}
	return err
}

// copyUpIndexed copies up what goes by way of index. A directory is built with an
// entry beside it; anything else is built as the entry, and linked from there.
func (u *upper) copyUpIndexed(ctx context.Context, r *copyRequest) error {
	if r.src.id == nil {
		return syscall.EIO
	}
	name := r.src.id.indexName()
	if r.src.stat.IsDir() {
		return u.build(ctx, r, spot{r.dir, r.name}, func(at spot) error { return u.indexDir(at, name) })
	}
	var st sys.Stat
	err := sys.StatBare(u.index.Int(), name, &st)
	switch {
	case err == syscall.ENOENT:
		err = u.build(ctx, r, spot{u.index.Int(), name}, nil)
		if err == nil {
			err = u.step("copy-up: indexed")
		}
		if err == nil {
			err = u.setNlink(r.src.id, 'U', r.nlink, 1)
		}
	case err == nil && st.Type() != r.src.stat.Type():
		err = fmt.Errorf("index entry %s is of another type than what was copied up: %w", name, syscall.EIO)
	}
	if err != nil || r.dir < 0 {
		return err
	}
	return u.linkUp(r)
}

// indexDir makes the entry of a directory that is being copied up.
func (u *upper) indexDir(at spot, name string) error {
	n, err := sys.OpenBare(at.dir, at.name, sys.O_PATH|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer sys.CloseBare(n)
	var id fileID
	if err := u.identifyUpper(n, &id); err != nil {
		return err
	}
	temp := u.tempName()
	if err := sys.MkdirBare(u.index.Int(), temp, 0); err != nil {
		return err
	}
	var b [fbHeader + sys.MaxHandle]byte
	err = sys.SetxattrBare(u.index.Int(), temp, u.xattrs.upper, id.appendTo(b[:0]), 0)
	if err == nil {
		err = u.step("copy-up: index entry")
	}
	if err == nil {
		err = sys.RenameBare(u.index.Int(), temp, u.index.Int(), name, 0)
	}
	if err != nil {
		_ = removeTree(u.index.Int(), temp)
	}
	return err
}

// linkUp gives an indexed file the name that is copied up. The link count is
// written relative to the lower first, whose count the link does not change.
func (u *upper) linkUp(r *copyRequest) error {
	name := r.src.id.indexName()
	if err := u.setNlink(r.src.id, 'L', r.nlink, r.src.stat.Nlink); err != nil {
		return err
	}
	if err := u.step("copy-up: counted"); err != nil {
		return err
	}
	if err := sys.LinkBare(u.index.Int(), name, r.dir, r.name); err != nil {
		return err
	}
	_ = u.step("copy-up: linked")
	if err := u.countUpper(r.src.id, r.nlink); err != nil {
		u.log("link count of index entry %s: %v", name, err)
	}
	return nil
}

// setNlink sets xattr nlink of an entry: the union shows shown links where upper
// ('U') or the lower ('L') has real.
func (u *upper) setNlink(id *fileID, base byte, shown, real uint32) error {
	var b [16]byte
	c := linkCount{base, int32(shown) - int32(real)}
	return sys.SetxattrBare(u.index.Int(), id.indexName(), u.xattrs.nlink, c.appendTo(b[:0]), 0)
}

// countUpper sets xattr nlink of an entry relative to upper's own count, so that a
// link or unlink in upper, which changes that, changes what is shown with it. It
// comes before each such change.
func (u *upper) countUpper(id *fileID, shown uint32) error {
	var st sys.Stat
	if err := sys.StatBare(u.index.Int(), id.indexName(), &st); err != nil {
		return err
	}
	return u.setNlink(id, 'U', shown, st.Nlink)
}

// openIndexed opens (O_PATH) what the index entry of a lower object stands for: the
// copy itself, or the directory in upper. -1 where there is none. gone: the object
// was removed from the union.
func (u *upper) openIndexed(id *fileID) (fd int, gone bool, err error) {
	name := id.indexName()
	n, err := sys.OpenBare(u.index.Int(), name, sys.O_PATH, 0)
	if err == syscall.ENOENT {
		return -1, false, nil
	}
	if err != nil {
		return -1, false, err
	}
	var st sys.Stat
	if err := sys.StatBare(n, "", &st); err != nil {
		sys.CloseBare(n)
		return -1, false, err
	}
	if u.isWhiteout(n, "", &st) {
		sys.CloseBare(n)
		return -1, true, nil
	}
	if !st.IsDir() {
		return n, false, nil
	}
	fd, err = u.openIndexedDir(n)
	sys.CloseBare(n)
	return fd, false, err
}

// openIndexedDir opens the directory that a directory's entry names: ESTALE where it
// is gone.
func (u *upper) openIndexedDir(entry int) (int, error) {
	var b [fbHeader + sys.MaxHandle + 1]byte
	n, err := sys.GetxattrBare(entry, "", u.xattrs.upper, b[:])
	if err != nil {
		return -1, err
	}
	var id fileID
	if known, err := id.parse(u.xattrs.upper, b[:n]); err != nil || !known {
		return -1, syscall.ENODATA
	}
	if id.uuid != u.uuid {
		return -1, syscall.ESTALE
	}
	return openID(u.root.Int(), &id)
}

// isWhiteout tells whether name below dir ("": dir itself), of which st is, is a
// whiteout as they are written here.
func (u *upper) isWhiteout(dir int, name string, st *sys.Stat) bool {
	if st.IsWhiteout() {
		return true
	}
	if !st.IsReg() || st.Size != 0 || !u.can.xattrs {
		return false
	}
	_, err := sys.GetxattrBare(dir, name, u.xattrs.whiteout, nil)
	return err == nil
}

// dropIndexed is called when the union shows no name of an indexed object any
// more.
func (u *upper) dropIndexed(id *fileID) error {
	name := id.indexName()
	var st sys.Stat
	err := sys.StatBare(u.index.Int(), name, &st)
	if err == syscall.ENOENT {
		return nil
	}
	if err != nil {
		return err
	}
	if !st.IsDir() && st.Nlink != 1 {
		// Somebody gave the lower file another name meanwhile: names in upper count.
		u.log("index entry %s has %d links and should have 1", name, st.Nlink)
		return u.setNlink(id, 'U', st.Nlink-1, st.Nlink)
	}
	return u.retireEntry(name)
}

// retireEntry takes an entry away, or with exportAll puts a whiteout in its place.
func (u *upper) retireEntry(name string) error {
	if !u.exportAll || u.can.whiteouts == whiteoutFile {
		return removeTree(u.index.Int(), name)
	}
	temp, err := u.newWhiteout()
	if err != nil {
		return err
	}
	if err = sys.RenameBare(u.work.Int(), temp, u.index.Int(), name, 0); err == syscall.EISDIR {
		if err = u.exchange(temp, u.index.Int(), name); err == nil {
			u.discard(temp)
		}
	}
	if err != nil {
		u.discard(temp)
	}
	return err
}

// cleanIndex goes through index once, when the union is opened: leftovers of a
// killed server and entries of what is gone go. What is not understood is an error,
// since it may be in use by a later version.
func (u *upper) cleanIndex(lowers []layerRoot) error {
	names, err := u.index.ReadDir()
	if err != nil {
		return err
	}
	for _, e := range names {
		if e.Name[0] == '#' {
			err = removeTree(u.index.Int(), e.Name)
		} else {
			err = u.cleanEntry(e.Name, lowers)
		}
		if err != nil {
			return fmt.Errorf("index entry %s: %w", e.Name, err)
		}
	}
	return nil
}

// cleanEntry looks at one entry.
func (u *upper) cleanEntry(name string, lowers []layerRoot) error {
	var id fileID
	known, err := id.parseIndexName(name)
	if err != nil {
		return fmt.Errorf("%w: %w", err, syscall.EINVAL)
	}
	if !known {
		return fmt.Errorf("of a later version or another machine: %w", syscall.EINVAL)
	}
	fate, err := u.verifyEntry(name, &id, lowers)
	if err != nil {
		return err
	}
	switch fate {
	case entryStale:
		u.log("index entry %s is stale", name)
		return removeTree(u.index.Int(), name)
	case entryOrphan:
		u.log("index entry %s is of what is gone", name)
		return u.retireEntry(name)
	}
	return nil
}

// entryFate is what becomes of an index entry.
type entryFate int

const (
	entryGood   entryFate = iota
	entryStale            // tells nothing: removed
	entryOrphan           // of an object that is gone: removed, or a whiteout with exportAll
)

func (u *upper) verifyEntry(name string, id *fileID, lowers []layerRoot) (entryFate, error) {
	n, err := sys.OpenBare(u.index.Int(), name, sys.O_PATH, 0)
	if err != nil {
		return entryGood, err
	}
	defer sys.CloseBare(n)
	var st sys.Stat
	if err := sys.StatBare(n, "", &st); err != nil {
		return entryGood, err
	}
	if u.isWhiteout(n, "", &st) || st.IsDir() && !u.exportAll {
		return entryGood, nil
	}
	object := n
	if st.IsDir() {
		object, err = u.openIndexedDir(n)
		switch {
		case err == syscall.ESTALE:
			return entryOrphan, nil
		case err != nil:
			return entryStale, nil // no xattr upper
		}
		defer sys.CloseBare(object)
	}
	if !u.hasOrigin(object, id) {
		return entryStale, nil
	}
	if st.IsDir() || st.Nlink != 1 {
		return entryGood, nil
	}
	return u.verifyLone(n, id, &st, lowers)
}

// hasOrigin tells whether an object in upper was copied up from id.
func (u *upper) hasOrigin(object int, id *fileID) bool {
	var have, want [fbHeader + sys.MaxHandle + 1]byte
	n, err := sys.GetxattrBare(object, "", u.xattrs.origin, have[:])
	return err == nil && bytes.Equal(have[:n], id.appendTo(want[:0]))
}

// verifyLone looks at an entry whose copy has no other name in upper: it is in use
// as long as lower names are shown.
func (u *upper) verifyLone(n int, id *fileID, st *sys.Stat, lowers []layerRoot) (entryFate, error) {
	origin, _, err := resolve(id, lowers)
	if err != nil || origin < 0 {
		return entryStale, err
	}
	defer sys.CloseBare(origin)
	var low sys.Stat
	if err := sys.StatBare(origin, "", &low); err != nil {
		return entryGood, err
	}
	if low.Type() != st.Type() {
		return entryStale, nil
	}
	var f facts
	if err := u.xattrs.readFacts(n, "", &f); err != nil && !errors.As(err, new(*corruptError)) {
		return entryGood, err
	}
	if shown, ok := f.nlink.shown(st.Nlink, low.Nlink); !f.hasNlink || !ok || shown == 0 {
		return entryOrphan, nil
	}
	return entryGood, nil
}
