package upper

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"slices"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/layer"
)

// rebasePlan is what a rebase changes: ROOT/ID/rebase.json, from before the first
// change until the layer is committed. Its parts are done in their order, and each
// can be done again: nothing comes to stand, in the end or on the way, where
// something was taken away.
type rebasePlan struct {
	Parent drivers.ID     `json:"parent,omitempty"` // 0: nothing
	Unlink [][]byte       `json:"unlink,omitempty"` // whiteouts that hide nothing
	Clear  []rebaseName   `json:"clear,omitempty"`  // what leaves its place, what is below before it
	Place  []rebaseName   `json:"place,omitempty"`  // what comes to its place, directories before what is below
	Finish []rebaseFinish `json:"finish,omitempty"` // directories whose names or metadata changed
}

// rebaseName is a name that goes to, or comes from, the staging directory as
// Number. 0: there is no such file, it is a directory to be deleted or made.
// Paths are bytes, since they need not be UTF-8.
type rebaseName struct {
	Path   []byte `json:"path"`
	Number int    `json:"number,omitempty"`
}

// rebaseFinish is a directory as it is to be.
type rebaseFinish struct {
	Path   []byte    `json:"path"`
	Opaque string    `json:"opaque,omitempty"` // value of overlayfs's xattr, if it is to be set
	Mtime  sys.Time  `json:"mtime"`
	All    *metadata `json:"all,omitempty"` // nil: as it is, but for the time
}

func (p *rebasePlan) empty() bool {
	return len(p.Unlink)+len(p.Clear)+len(p.Place)+len(p.Finish) == 0
}

// plan lists what makes the upper on disk what the picture of it is.
func (b *rebaser) plan(parent drivers.ID) (*rebasePlan, error) {
	p := &rebasePlan{Parent: parent}
	for _, u := range b.unlink {
		p.Unlink = append(p.Unlink, []byte(u))
	}
	for _, g := range slices.Sorted(maps.Keys(b.gone)) {
		p.Clear = append(p.Clear, rebaseName{Path: []byte(g)})
	}
	if err := b.place(p, b.root, "."); err != nil {
		return nil, err
	}
	slices.SortFunc(p.Clear, func(x, y rebaseName) int { return layer.ComparePaths(string(y.Path), string(x.Path)) })
	slices.SortFunc(p.Place, func(x, y rebaseName) int { return layer.ComparePaths(string(x.Path), string(y.Path)) })
	slices.SortFunc(p.Finish, func(x, y rebaseFinish) int { return layer.ComparePaths(string(x.Path), string(y.Path)) })
	return p, nil
}

// place lists what is to be done for a node, at its path, and below it.
func (b *rebaser) place(p *rebasePlan, n *rebaseNode, at string) error {
	if n.moved || n.orig == "" {
		if err := b.refuseReturn(at); err != nil {
			return err
		}
		name := rebaseName{Path: []byte(at)}
		if n.orig != "" {
			name.Number = len(p.Place) + 1
			p.Clear = append(p.Clear, rebaseName{Path: []byte(n.orig), Number: name.Number})
		}
		p.Place = append(p.Place, name)
	}
	if !n.dir {
		return nil
	}
	if n.moved || n.touched || n.meta != nil {
		f := rebaseFinish{Path: []byte(at), Mtime: n.mtime, All: n.meta}
		if n.meta != nil {
			f.Mtime = n.meta.Mtime
		}
		if n.mark {
			f.Opaque = *n.opaque
		}
		p.Finish = append(p.Finish, f)
	}
	for _, k := range n.known {
		if k == nil {
			continue
		}
		if err := b.place(p, k, path.Join(at, k.name)); err != nil {
			return err
		}
	}
	return nil
}

// refuseReturn refuses what would come to stand at or below a directory whose
// content went to where a link leads: which of both the archive named later
// decides where that belongs. It is what makes a plan repeatable, too.
func (b *rebaser) refuseReturn(p string) error {
	for at := p; at != "."; at = path.Dir(at) {
		if b.gone[at] {
			return b.twice(p)
		}
	}
	return nil
}

// do carries out a plan, from its beginning; what was done already is passed over.
// step is called before each change.
func (p *rebasePlan) do(dir, upper *sys.Fd, opaqueAttr string, step func() error) error {
	x := rebaseDoer{dir: dir, upper: upper, opaqueAttr: opaqueAttr, step: step}
	for _, u := range p.Unlink {
		if err := x.clear(string(u), func(in *sys.Fd, name string) error { return in.Unlink(name, 0) }); err != nil {
			return err
		}
	}
	if err := x.move(p); err != nil {
		return err
	}
	for _, f := range p.Finish {
		if err := x.finish(f); err != nil {
			return fmt.Errorf("rebase %q: %w", f.Path, err)
		}
	}
	return step()
}

// rebaseDoer carries out a plan.
type rebaseDoer struct {
	dir, upper *sys.Fd
	stage      *sys.Fd // ROOT/ID/rebase, open while there is one
	opaqueAttr string
	step       func() error
}

// at does something with a name of the upper.
func (x *rebaseDoer) at(p string, do func(in *sys.Fd, name string) error) error {
	if err := x.step(); err != nil {
		return err
	}
	in, err := openBeneath(x.upper, path.Dir(p))
	if err == nil {
		defer in.Close()
		err = do(in, path.Base(p))
	}
	if err != nil {
		return fmt.Errorf("rebase %q: %w", p, err)
	}
	return nil
}

// clear is at for what takes a name away: if it is not there, that was done before.
func (x *rebaseDoer) clear(p string, do func(in *sys.Fd, name string) error) error {
	return ignore(x.at(p, do), syscall.ENOENT)
}

// move takes everything that changes its place out of the way, and then puts it
// to where it belongs.
func (x *rebaseDoer) move(p *rebasePlan) (err error) {
	moves := func(n rebaseName) bool { return n.Number > 0 }
	if slices.ContainsFunc(p.Clear, moves) {
		if err := ignore(x.dir.Mkdir(rebaseDir, 0o700), syscall.EEXIST); err != nil {
			return err
		}
		if x.stage, err = x.dir.Openat(rebaseDir, sys.O_RDONLY|sys.O_DIRECTORY, 0); err != nil {
			return err
		}
		defer x.stage.Close()
	}
	for _, n := range p.Clear {
		if err := x.clear(string(n.Path), n.clear(x.stage)); err != nil {
			return err
		}
	}
	for _, n := range p.Place {
		if err := x.at(string(n.Path), n.place(x.stage)); err != nil {
			return err
		}
	}
	return ignore(x.dir.Unlink(rebaseDir, sys.AT_REMOVEDIR), syscall.ENOENT)
}

func (n rebaseName) staged() string { return fmt.Sprint(n.Number) }

func (n rebaseName) clear(stage *sys.Fd) func(in *sys.Fd, name string) error {
	return func(in *sys.Fd, name string) error {
		if n.Number == 0 {
			return in.Unlink(name, sys.AT_REMOVEDIR)
		}
		return in.Rename(name, stage, n.staged(), sys.RENAME_NOREPLACE)
	}
}

func (n rebaseName) place(stage *sys.Fd) func(in *sys.Fd, name string) error {
	return func(in *sys.Fd, name string) error {
		if n.Number == 0 {
			return ignore(in.Mkdir(name, 0o700), syscall.EEXIST)
		}
		err := stage.Rename(n.staged(), in, name, sys.RENAME_NOREPLACE)
		if !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if _, err := in.Stat(name); err != nil {
			return fmt.Errorf("is neither there nor where it was put in between: %w: %w", errdefs.ErrDataLoss, err)
		}
		return nil
	}
}

// finish gives a directory what it is to have. Its time comes last.
func (x *rebaseDoer) finish(f rebaseFinish) error {
	if err := x.step(); err != nil {
		return err
	}
	dir, err := openBeneath(x.upper, string(f.Path))
	if err != nil {
		return err
	}
	defer dir.Close()
	if f.Opaque != "" {
		if err := dir.Setxattr("", x.opaqueAttr, f.Opaque); err != nil {
			return err
		}
	}
	if f.All != nil {
		return f.All.put(dir, x.step)
	}
	return dir.Utimes("", sys.TimeOmit, f.Mtime)
}
