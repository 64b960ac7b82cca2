package devmapper

import (
	"context"
	"io"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/devmapper/metadata"
	"github.com/layerctl/layerctl/devmapper/thin"
	"github.com/layerctl/layerctl/internal/sys"
)

// thinCheck runs the field's own tool on the metadata of one moment.
func (d *driver) thinCheck(ctx context.Context, e *examination) error {
	if _, err := thin.CheckTool(); err != nil {
		e.note("%v: the pool's metadata was checked by layerctl alone", err)
		return nil
	}
	if err := d.pool.Flush(); err != nil { // it takes no metadata snapshot, and changes nothing
		if !d.pool.OnFiles() {
			e.note("no thin_check of a device that a pool in this state has")
			return nil
		}
		found, err := thin.Check(ctx, d.pool.MetadataPath(), false)
		e.damaged(found, d.pool.RepairWords())
		return err
	}
	found, err := d.checkMoment(ctx)
	if errdefs.IsUnavailable(err) {
		e.note("no thin_check: %v", err)
		return nil
	}
	e.damaged(found, d.pool.RepairWords())
	return err
}

// checkMoment has thin_check look at the pool as it is now. A pool has one metadata snapshot,
// which a Diff may be waiting for: it is kept until what it leads to is copied. Where it cannot
// be, thin_check reads it in its place.
func (d *driver) checkMoment(ctx context.Context) (found string, err error) {
	s, err := d.pool.Snapshot(ctx)
	if err != nil {
		return "", err
	}
	kept, err := d.copyMoment(ctx, s.Path)
	if err == nil && kept == nil {
		found, err = thin.Check(ctx, s.Path, true)
	}
	if releaseErr := s.Release(); err == nil {
		err = releaseErr
	}
	if kept == nil {
		return found, err
	}
	defer kept.Close()
	if err != nil {
		return "", err
	}
	path := pathForOthers(kept)
	found, err = thin.Check(ctx, path, true)
	return strings.ReplaceAll(found, path, s.Path), err
}

// copyMoment copies what a metadata snapshot leads to into a sparse file without a name, in
// the root. nil where there is no room for that, where thin_check could not read it there, and
// of damaged metadata, of which a copy may not be all.
func (d *driver) copyMoment(ctx context.Context, path string) (*sys.Fd, error) {
	s, err := d.pool.Status()
	if err != nil {
		return nil, err
	}
	to, err := d.scratch(int64(s.MetadataUsed)*metadata.BlockSize, int64(s.MetadataTotal)*metadata.BlockSize)
	if to == nil || err != nil {
		return nil, err
	}
	from, err := metadata.OpenFile(path)
	if err != nil {
		to.Close()
		return nil, err
	}
	defer from.Close()
	report := metadata.Report{}
	m, err := openMetadata(copying{from, to})
	if err == nil {
		report, err = m.Check(ctx)
	} else if errdefs.IsDataLoss(err) {
		report.Problems, err = []error{err}, nil
	}
	if err != nil || len(report.Problems) > 0 {
		to.Close()
		return nil, err
	}
	return to, nil
}

// scratch makes a sparse file without a name in the root; nil if so many bytes may not be
// taken there, or thin_check, which reads past the page cache, could not read it.
func (d *driver) scratch(bytes, size int64) (*sys.Fd, error) {
	s, err := d.dir.Statfs()
	if err != nil || int64(s.BlocksUser)*s.BlockSize/4 < bytes { // the pool's data may need the space
		return nil, err
	}
	f, err := sys.Open(d.root, sys.O_TMPFILE|sys.O_RDWR, 0o600)
	if err != nil {
		return nil, nil // not every file system can
	}
	direct, err := sys.Open(f.ProcPath(), sys.O_RDONLY|syscall.O_DIRECT, 0)
	if err == nil {
		direct.Close()
		err = f.Truncate(size)
	}
	if err != nil {
		f.Close()
		return nil, nil
	}
	return f, nil
}

// copying reads metadata, and writes what it reads to a file.
type copying struct {
	io.ReaderAt
	to io.WriterAt
}

func (c copying) ReadAt(b []byte, off int64) (int, error) {
	n, err := c.ReaderAt.ReadAt(b, off)
	if n == len(b) {
		_, err = c.to.WriteAt(b, off)
	}
	return n, err
}
