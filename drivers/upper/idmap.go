package upper

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
	lmount "github.com/layerctl/layerctl/mount"
)

// An id-mapped layer shows its parents' files shifted. The kernel's overlayfs gets
// id-mapped clones of the lowers (containerd's convention: uidmap= and gidmap=
// beside lowerdir= are about the lowers); what is written goes to the upper as it
// is, with host ids. So such an upper is shifted back where it meets the stored
// ids of others: for Diff by an id-mapped clone, at Commit on disk. A union that
// maps ids both ways itself has none of that (Config.StoredIDs).

// checkIDMap refuses maps that are half given, empty or ambiguous.
func checkIDMap(m drivers.IDMap) error {
	if m.IsZero() {
		return nil
	}
	if len(m.UIDs) == 0 || len(m.GIDs) == 0 {
		return fmt.Errorf("id map: both user and group ids must be mapped: %w", errdefs.ErrInvalidArgument)
	}
	if err := checkRanges("uid", m.UIDs); err != nil {
		return err
	}
	return checkRanges("gid", m.GIDs)
}

func checkRanges(what string, rs []drivers.IDRange) error {
	for i, r := range rs {
		if r.Size == 0 || r.ContainerID+r.Size < r.ContainerID || r.HostID+r.Size < r.HostID {
			return fmt.Errorf("id map: %s range %d:%d:%d: %w", what, r.ContainerID, r.HostID, r.Size, errdefs.ErrInvalidArgument)
		}
		for _, q := range rs[:i] {
			if overlap(r.ContainerID, q.ContainerID, r.Size, q.Size) || overlap(r.HostID, q.HostID, r.Size, q.Size) {
				return fmt.Errorf("id map: %s ranges overlap: %w", what, errdefs.ErrInvalidArgument)
			}
		}
	}
	return nil
}

func overlap(a, b, aSize, bSize uint32) bool { return a < b+bSize && b < a+aSize }

// shift maps a stored id to the one shown; one outside every range stays.
func shift(rs []drivers.IDRange, id uint32) uint32 {
	for _, r := range rs {
		if id >= r.ContainerID && id-r.ContainerID < r.Size {
			return r.HostID + id - r.ContainerID
		}
	}
	return id
}

// inverse swaps the sides of a map.
func inverse(m drivers.IDMap) drivers.IDMap {
	return drivers.IDMap{UIDs: inverseRanges(m.UIDs), GIDs: inverseRanges(m.GIDs)}
}

func inverseRanges(rs []drivers.IDRange) []drivers.IDRange {
	out := make([]drivers.IDRange, len(rs))
	for i, r := range rs {
		out[i] = drivers.IDRange{ContainerID: r.HostID, HostID: r.ContainerID, Size: r.Size}
	}
	return out
}

// unshifted shows the layer's upper with container ids.
func (l *Layers) unshifted(ctx context.Context, s *state) (Tree, error) {
	m, err := lmount.Detached(ctx, []lmount.Mount{bind(l.Dir(s.id), true, inverse(s.about.IDMap))})
	if err != nil {
		return nil, err
	}
	return m, nil
}

// identity is what of a file's metadata depends on ids: its owner, and the
// xattrs that name ids. The mode is there because chown(2) drops setuid.
type identity struct {
	UID    uint32            `json:"uid"`
	GID    uint32            `json:"gid"`
	Mode   uint32            `json:"mode"`
	Xattrs map[string][]byte `json:"xattrs,omitempty"`
}

// identityXattrs are the xattrs in which the kernel maps ids.
var identityXattrs = []string{"security.capability", "system.posix_acl_access", "system.posix_acl_default"}

// targetXattr notes on each file what it is to become, before it is changed: a
// second attempt after a crash must not shift twice. The kernel hides it, as all
// of trusted.overlay.*, and Diff leaves it out.
const targetXattr = "trusted.overlay.layerctl.target"

// unshift stores the container ids of an id-mapped layer again. The kernel
// translates them: they are read through an id-mapped mount and written plainly.
func (l *Layers) unshift(ctx context.Context, s *state) error {
	if !s.hostIDs() {
		return nil
	}
	shown, err := l.unshifted(ctx, s)
	if err != nil {
		return err
	}
	defer shown.Close()
	from, err := sys.OpenDir(shown.Path())
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := sys.OpenDir(l.Dir(s.id))
	if err != nil {
		return err
	}
	defer to.Close()
	st, err := to.Stat("")
	if err != nil {
		return err
	}
	u := unshifter{ctx: ctx, l: l, back: inverse(s.about.IDMap), dev: st.Dev}
	return u.file(from, to, "")
}

type unshifter struct {
	ctx  context.Context
	l    *Layers
	back drivers.IDMap // from host to container ids
	dev  uint64        // of the layer
	n    int
}

// file shifts one name, "" for the open directory itself; a directory after its
// content, because its owner must be mapped for as long as it is read through
// the map.
func (u *unshifter) file(from, to *sys.Fd, name string) error {
	if u.n++; u.n%256 == 0 {
		if err := u.l.step(u.ctx, "commit: some ids shifted"); err != nil {
			return err
		}
	}
	st, err := to.Stat(name)
	if err != nil {
		return err
	}
	if isNested(&st, u.dev) {
		return nestedError(to.Name() + "/" + name)
	}
	if _, err := u.target(from, to, name, &st); err != nil {
		return err
	}
	if st.IsDir() {
		if err := u.below(from, to, name); err != nil {
			return err
		}
	}
	t, err := u.target(from, to, name, &st)
	if err != nil {
		return err
	}
	return t.apply(to, name, &st)
}

func (u *unshifter) below(from, to *sys.Fd, name string) error {
	if name != "" {
		var err error
		if from, err = from.Openat(name, sys.O_RDONLY|sys.O_DIRECTORY, 0); err != nil {
			return err
		}
		defer from.Close()
		if to, err = to.Openat(name, sys.O_RDONLY|sys.O_DIRECTORY, 0); err != nil {
			return err
		}
		defer to.Close()
	}
	ents, err := to.ReadDir()
	if err != nil {
		return err
	}
	for _, e := range ents {
		if err := u.file(from, to, e.Name); err != nil {
			return err
		}
	}
	return nil
}

// target returns what a file is to become: what was noted, else what its ids map
// to, which it notes. The kernel maps those in xattrs: read from the id-mapped
// mount.
func (u *unshifter) target(from, to *sys.Fd, name string, st *sys.Stat) (identity, error) {
	var t identity
	v, err := to.Getxattr(name, targetXattr)
	if err == nil {
		return t, json.Unmarshal([]byte(v), &t)
	}
	if !errors.Is(err, syscall.ENODATA) {
		return t, err
	}
	t = identity{UID: shift(u.back.UIDs, st.UID), GID: shift(u.back.GIDs, st.GID), Mode: st.Mode & 0o7777, Xattrs: map[string][]byte{}}
	for _, n := range identityXattrs {
		switch v, err := from.Getxattr(name, n); {
		case err == nil:
			t.Xattrs[n] = []byte(v)
		case !isAbsentXattr(err):
			return t, err
		}
	}
	b, err := json.Marshal(t)
	if err != nil {
		return t, err
	}
	return t, to.Setxattr(name, targetXattr, string(b))
}

// apply gives the file its identity. Repeatable.
func (t *identity) apply(to *sys.Fd, name string, st *sys.Stat) error {
	if err := to.Chown(name, t.UID, t.GID); err != nil {
		return err
	}
	if st.Type() != sys.S_IFLNK {
		if err := chmodAt(to, name, t.Mode); err != nil {
			return err
		}
	}
	for n, v := range t.Xattrs {
		if err := to.Setxattr(name, n, string(v)); err != nil {
			return err
		}
	}
	return nil
}

// chmodAt sets the mode of a name, "" for the open directory itself.
func chmodAt(dir *sys.Fd, name string, mode uint32) error {
	if name == "" {
		return dir.Chmod(mode)
	}
	return dir.ChmodAt(name, mode)
}

// forgetTargets removes the notes of unshift.
func forgetTargets(dir *sys.Fd, name string) {
	_ = dir.Removexattr(name, targetXattr)
	sub := dir
	if name != "" {
		var err error
		if sub, err = dir.Openat(name, sys.O_RDONLY|sys.O_DIRECTORY, 0); err != nil {
			return
		}
		defer sub.Close()
	}
	ents, err := sub.ReadDir()
	if err != nil {
		return
	}
	for _, e := range ents {
		forgetTargets(sub, e.Name)
	}
}
