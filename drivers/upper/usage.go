package upper

import (
	"context"
	"errors"
	"syscall"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/layer"
)

// Usage measures the layer's own directory, O(changes); a committed layer's
// stands in committed.json.
func (l *Layers) Usage(ctx context.Context, r drivers.Ref) (drivers.Usage, error) {
	s, err := l.load(r.ID)
	if err != nil {
		return drivers.Usage{}, l.wrap("usage", r.ID, err)
	}
	if s.committed != nil {
		return drivers.Usage{Bytes: s.committed.Bytes, Inodes: s.committed.Inodes}, nil
	}
	c, err := l.survey(ctx, r.ID, surveyOptions{})
	return c.usage, l.wrap("usage", r.ID, err)
}

// census is what a walk of a layer's directory finds.
type census struct {
	usage     drivers.Usage
	metacopy  bool     // files without data
	whiteouts []string // paths, if asked for
	nested    string   // the first btrfs subvolume in the layer
}

type surveyOptions struct {
	metacopy  bool // look for files without data
	whiteouts bool // list the whiteouts
}

// surveyor walks a layer's directory, one open directory for each level.
type surveyor struct {
	ctx  context.Context
	l    *Layers
	o    surveyOptions
	w    layer.Whiteouts
	c    census
	dev  uint64
	seen map[[2]uint64]struct{} // devices and inodes of files of several names
	n    int
}

func (l *Layers) survey(ctx context.Context, id drivers.ID, o surveyOptions) (census, error) {
	fs, err := sys.OpenDir(l.Dir(id))
	if err != nil {
		return census{}, err
	}
	defer fs.Close()
	v := surveyor{ctx: ctx, l: l, o: o, w: l.whiteouts(), seen: map[[2]uint64]struct{}{}}
	s, err := fs.Stat("")
	if err != nil {
		return census{}, err
	}
	v.dev = s.Dev
	v.add(&s)
	err = v.dir(fs, "")
	return v.c, err
}

func (v *surveyor) dir(dir *sys.Fd, path string) error {
	return dir.EachDirents(func(some []sys.Dirent) error {
		for _, e := range some {
			if v.n++; v.n%512 == 0 && v.ctx.Err() != nil {
				return v.ctx.Err()
			}
			err := v.entry(dir, path, e.Name)
			if err != nil && !errors.Is(err, syscall.ENOENT) { // an active layer changes meanwhile
				return err
			}
		}
		return nil
	})
}

func (v *surveyor) entry(dir *sys.Fd, path, name string) error {
	s, err := dir.Stat(name)
	if err != nil {
		return err
	}
	v.add(&s)
	if err := v.examine(dir, path+name, name, &s); err != nil || !s.IsDir() {
		return err
	}
	sub, err := dir.Openat(name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer sub.Close()
	return v.dir(sub, path+name+"/")
}

// add counts one inode once.
func (v *surveyor) add(s *sys.Stat) {
	if s.Nlink > 1 && !s.IsDir() {
		if _, twice := v.seen[[2]uint64{s.Dev, s.Ino}]; twice {
			return
		}
		v.seen[[2]uint64{s.Dev, s.Ino}] = struct{}{}
	}
	v.c.usage.Inodes++
	v.c.usage.Bytes += s.Blocks * 512
}

func (v *surveyor) examine(dir *sys.Fd, path, name string, s *sys.Stat) error {
	if v.c.nested == "" && isNested(s, v.dev) {
		v.c.nested = path
	}
	if v.o.whiteouts {
		is, err := v.w.IsWhiteout(dir, name, s)
		if err != nil {
			return err
		}
		if is {
			v.c.whiteouts = append(v.c.whiteouts, path)
		}
	}
	if v.o.metacopy && s.IsReg() && !v.c.metacopy {
		_, err := dir.Getxattr(name, v.l.xattr("metacopy"))
		if err != nil && !isAbsentXattr(err) {
			return err
		}
		v.c.metacopy = err == nil
	}
	return nil
}
