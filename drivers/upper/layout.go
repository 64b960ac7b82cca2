package upper

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
)

// Names in ROOT and in a layer's directory; see the package doc. Those in ROOT
// have a dot, which no ID has.
const (
	formatFile = "format.json"
	emptyDir   = "empty.dir"
	newSuffix  = ".new"
	delSuffix  = ".del"

	fsDir         = "fs"
	workDir       = "work"
	aboutFile     = "about.json"
	appliedFile   = "applied.json"
	rebaseFile    = "rebase.json"
	rebaseDir     = "rebase"
	volatileFile  = "volatile"
	committedFile = "committed.json"

	formatVersion = 1
)

// format is ROOT/format.json.
type format struct {
	Format int    `json:"format"`
	Xattrs Xattrs `json:"xattrs"`
}

// about is what Create was asked for: ROOT/ID/about.json.
type about struct {
	Parent   drivers.ID    `json:"parent,omitempty"` // 0: none
	View     bool          `json:"view,omitempty"`
	Metacopy bool          `json:"metacopy,omitempty"` // a layer below has files without data
	Project  uint32        `json:"project,omitempty"`  // of the quota; 0: none
	IDMap    drivers.IDMap `json:"idmap,omitzero"`
	// StoredIDs: the upper of an id-mapped layer has ids as they are stored; else
	// it has those of the host until Commit.
	StoredIDs bool `json:"storedIDs,omitempty"`
}

// committed says that a layer is frozen: ROOT/ID/committed.json.
type committed struct {
	Parent   drivers.ID `json:"parent,omitempty"`
	Metacopy bool       `json:"metacopy,omitempty"` // it or a layer below has files without data
	Bytes    int64      `json:"bytes"`
	Inodes   int64      `json:"inodes"`
}

// applied is what Apply did without knowing parents: ROOT/ID/applied.json.
type applied struct {
	Implied [][]byte `json:"implied"` // directories with made-up metadata, parents first; bytes, since a path need not be UTF-8
}

func (a *applied) implies(p string) bool {
	return slices.ContainsFunc(a.Implied, func(q []byte) bool { return string(q) == p })
}

// state is a layer as it stands on disk.
type state struct {
	id        drivers.ID
	about     about
	committed *committed  // nil: writable, or a view
	applied   bool        // it was applied without parents, which Commit may still name
	rebase    *rebasePlan // a Commit has begun to fit it to parents; nil: none has
}

// parent returns the layer below: Commit may have given another than Create.
func (s *state) parent() drivers.ID {
	if s.committed != nil {
		return s.committed.Parent
	}
	return s.about.Parent
}

func (s *state) metacopy() bool {
	return s.about.Metacopy || s.committed != nil && s.committed.Metacopy
}

// hostIDs reports whether the upper has the ids of the host.
func (s *state) hostIDs() bool { return !s.about.IDMap.IsZero() && !s.about.StoredIDs }

func (s *state) writable() bool { return s.committed == nil && !s.about.View }

// path returns a path in ROOT.
func (l *Layers) path(elem ...string) string {
	return l.root + "/" + strings.Join(elem, "/")
}

// Dir returns the path of a layer's own files: its upper, or the lower that it is
// to others.
func (l *Layers) Dir(id drivers.ID) string { return l.path(id.String(), fsDir) }

// load reads a layer's state; ErrNotFound if it is not there.
func (l *Layers) load(id drivers.ID) (*state, error) {
	dir, err := l.openLayer(id)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	s := &state{id: id}
	if err := ReadJSON(dir, aboutFile, &s.about); err != nil {
		return nil, fmt.Errorf("layer %s: %w", id, lost(err))
	}
	var c committed
	switch err := ReadJSON(dir, committedFile, &c); {
	case err == nil:
		s.committed = &c
	case !errors.Is(err, os.ErrNotExist):
		return nil, fmt.Errorf("layer %s: %w", id, err)
	}
	if s.committed != nil {
		return s, nil
	}
	if _, err := dir.Stat(appliedFile); err == nil {
		s.applied = true
	}
	if s.rebase, err = loadRebase(dir); err != nil {
		return nil, fmt.Errorf("layer %s: %w", id, err)
	}
	return s, nil
}

// lost turns an absent file that must be there into ErrDataLoss.
func lost(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%w: %w (a power cut soon after Create leaves this: remove the layer)", errdefs.ErrDataLoss, err)
	}
	return err
}

// loadRef is load, and checks that the caller's chain is the layer's.
func (l *Layers) loadRef(r drivers.Ref) (*state, error) {
	s, err := l.load(r.ID)
	if err != nil {
		return nil, err
	}
	var parent drivers.ID
	if len(r.Parents) > 0 {
		parent = r.Parents[0]
	}
	if parent != s.parent() {
		return nil, fmt.Errorf("layer %s lies on %s, not on %s: %w", r.ID, name(s.parent()), name(parent), errdefs.ErrInvalidArgument)
	}
	return s, nil
}

func name(id drivers.ID) string {
	if id == 0 {
		return "nothing"
	}
	return id.String()
}

// openLayer opens ROOT/ID; ErrNotFound if it is not there.
func (l *Layers) openLayer(id drivers.ID) (*sys.Fd, error) {
	dir, err := sys.OpenDir(l.path(id.String()))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("layer %s: %w", id, errdefs.ErrNotFound)
	}
	return dir, err
}

// IDs yields every layer on disk, those that Create or Remove left half done
// too.
func (l *Layers) IDs(ctx context.Context) iter.Seq2[drivers.ID, error] {
	return func(yield func(drivers.ID, error) bool) {
		names, err := l.names()
		if err != nil {
			yield(0, fmt.Errorf("%s: list %s: %w", l.cfg.Capabilities.Driver, l.root, err))
			return
		}
		seen := map[drivers.ID]bool{}
		for _, n := range names {
			id, ok := parseName(n)
			if !ok || seen[id] {
				continue
			}
			seen[id] = true
			if err := ctx.Err(); err != nil {
				yield(0, err)
				return
			}
			if !yield(id, nil) {
				return
			}
		}
	}
}

func (l *Layers) names() ([]string, error) {
	dir, err := sys.OpenDir(l.root)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	ents, err := dir.ReadDir()
	names := make([]string, len(ents))
	for i, e := range ents {
		names[i] = e.Name
	}
	return names, err
}

// parseName returns the layer that a name in ROOT belongs to, in any state.
func parseName(n string) (drivers.ID, bool) {
	if s, ok := strings.CutSuffix(n, newSuffix); ok {
		n = s
	} else if s, ok := strings.CutSuffix(n, delSuffix); ok {
		n = s
	}
	return drivers.ParseID(n)
}

// ReadJSON reads a small file of a directory. One that is not whole wraps
// ErrDataLoss.
func ReadJSON(dir *sys.Fd, name string, v any) error {
	f, err := dir.Openat(name, sys.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%s/%s: %w: %w", dir.Name(), name, errdefs.ErrDataLoss, err)
	}
	return nil
}

// WriteJSON makes a small file appear whole in a directory: under a temporary
// name, renamed last. durable flushes the file before and the directory after.
func WriteJSON(dir *sys.Fd, name string, v any, durable bool) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	tmp := name + newSuffix
	if err := writeFile(dir, tmp, b, durable); err != nil {
		return err
	}
	if err := dir.Rename(tmp, dir, name, 0); err != nil || !durable {
		return err
	}
	return dir.Sync()
}

func writeFile(dir *sys.Fd, name string, b []byte, durable bool) error {
	f, err := dir.Openat(name, sys.O_WRONLY|sys.O_CREAT|sys.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(b); err != nil {
		return err
	}
	if !durable {
		return nil
	}
	return f.Sync()
}

// openFormat reads or makes ROOT/format.json, and returns the encoding of the
// layers. One that is not among those that can be used is refused: its whiteouts
// would show as devices. It is made to last: a torn one would make the driver
// one that does not open, with every layer that it is given later.
func openFormat(root string, usable []Xattrs) (Xattrs, error) {
	dir, err := sys.OpenDir(root)
	if err != nil {
		return "", err
	}
	defer dir.Close()
	var f format
	err = ReadJSON(dir, formatFile, &f)
	if errors.Is(err, os.ErrNotExist) {
		if err = WriteJSON(dir, formatFile, format{formatVersion, usable[0]}, true); err == nil {
			return usable[0], nil
		}
		if errors.Is(err, os.ErrNotExist) { // another process has just renamed our file
			err = ReadJSON(dir, formatFile, &f)
		}
	}
	if err != nil {
		return "", err
	}
	switch {
	case f.Format > formatVersion:
		return "", fmt.Errorf("%s has format %d, this program knows %d: use a newer one: %w",
			filepath.Join(root, formatFile), f.Format, formatVersion, errdefs.ErrFailedPrecondition)
	case !slices.Contains(usable, f.Xattrs):
		return "", fmt.Errorf("layers in %s have %s.overlay.* xattrs, this process can use %s.overlay.* only "+
			"(one is for root, the other for a user namespace): use another root: %w",
			root, f.Xattrs, usable[0], errdefs.ErrFailedPrecondition)
	}
	return f.Xattrs, nil
}
