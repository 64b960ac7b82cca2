package upper

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"

	"github.com/layerctl/layerctl/internal/sys"
)

// scratchPrefix begins the names of scratch directories.
const scratchPrefix = "probe."

// Scratch is a directory in which a driver's probe tries things, locked for as
// long as it does. What a killed probe leaves PrepareRoot deletes.
type Scratch struct {
	parent *sys.Fd
	path   string
	name   string
	dir    *sys.Fd
	lock   *sys.Lock
}

// NewScratch makes a scratch directory in dir, which need not be a root.
func NewScratch(dir string) (*Scratch, error) {
	path, err := os.MkdirTemp(dir, scratchPrefix)
	if err != nil {
		return nil, err
	}
	s := &Scratch{path: path, name: filepath.Base(path)}
	if s.parent, err = sys.OpenDir(dir); err == nil {
		if s.dir, err = sys.OpenDir(path); err == nil {
			s.lock, err = s.dir.TryLock(sys.LockShared)
		}
	}
	if err != nil {
		s.Remove()
		return nil, err
	}
	return s, nil
}

// Remove deletes the directory with all below it.
func (s *Scratch) Remove() {
	if s.parent != nil {
		_ = removeTree(context.Background(), s.parent, s.name)
		s.parent.Close()
	}
	if s.dir != nil {
		s.dir.Close()
	}
	s.lock.Close()
}

// Path returns the directory's path.
func (s *Scratch) Path() string { return s.path }

// Dir returns the open directory, which Scratch owns.
func (s *Scratch) Dir() *sys.Fd { return s.dir }

// Mkdir makes a directory in the scratch and returns its path.
func (s *Scratch) Mkdir(name string) (string, error) {
	return filepath.Join(s.path, name), s.dir.Mkdir(name, 0o755)
}

// sweepScratch deletes scratch directories of probes that were killed: those that
// nobody holds locked.
func sweepScratch(root string) error {
	dir, err := sys.OpenDir(root)
	if err != nil {
		return err
	}
	defer dir.Close()
	ents, err := dir.ReadDir()
	if err != nil {
		return err
	}
	for _, e := range ents {
		if !strings.HasPrefix(e.Name, scratchPrefix) {
			continue
		}
		if err := sweepOne(dir, e.Name); err != nil {
			return err
		}
	}
	return nil
}

func sweepOne(dir *sys.Fd, name string) error {
	p, err := dir.Openat(name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer p.Close()
	l, err := p.TryLock(sys.LockExclusive)
	if sys.IsLocked(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer l.Close()
	return removeTree(context.Background(), dir, name)
}
