package thin

import (
	"context"
	"errors"

	"github.com/layerctl/layerctl/internal/sys"
)

const (
	// mostAhead bounds what a pool is given that nobody will look after.
	mostAhead = 256 << 30
	// mappingBytes of metadata are a mapping of a block, in nodes that are half full, twice.
	mappingBytes = 64
)

// growAhead makes a pool on files as large as its file system has room for, when the last process
// leaves it that would have done so bit by bit, and somebody has its devices open.
// What it gets is sparse; metadata for it is allocated.
func (p *Pool) growAhead(ctx context.Context) error {
	if !p.rec.onFiles() {
		return nil
	}
	if _, err := p.ctl.Info(p.name); isGone(err) {
		return nil
	}
	return p.whileGrowing(func(s Status, data, metadata *sys.Fd) error {
		err := p.growFilesAhead(ctx, s, data, metadata)
		return errors.Join(err, p.reload(ctx, s, data, metadata, s.Policy)) // the metadata may have become larger
	})
}

func (p *Pool) growFilesAhead(ctx context.Context, s Status, data, metadata *sys.Fd) error {
	d, err := p.openFile(dataFile)
	if err != nil {
		return err
	}
	defer d.Close()
	m, err := p.openFile(metadataFile)
	if err != nil {
		return err
	}
	defer m.Close()
	free, err := freeBytes(p.root)
	if err != nil {
		return err
	}
	freeBlocks := d.size/p.rec.Block - int64(s.DataUsed)
	more := min((free-keepFree-d.holes)/(p.rec.Block+mappingBytes), mostAhead/p.rec.Block-freeBlocks)
	if more <= 0 {
		return nil
	}
	// A pool without metadata for its data would be read-only before it is full.
	lacks := (freeBlocks+more)*mappingBytes - (m.size - int64(s.MetadataUsed)*4096)
	if size := min(m.size+(lacks+p.rec.Block-1)/p.rec.Block*p.rec.Block, mostMetadata); size > m.size {
		short, err := p.enlarge(ctx, m.Fd, size, metadata)
		if err = errors.Join(err, short); err != nil {
			return err
		}
	}
	short, err := p.enlarge(ctx, d.Fd, d.size+more*p.rec.Block, data)
	return errors.Join(err, short)
}

// file is one of the pool's.
type file struct {
	*sys.Fd
	size, holes int64
}

func (p *Pool) openFile(name string) (file, error) {
	f, err := p.root.Openat(name, sys.O_RDWR|sys.O_NOFOLLOW, 0)
	if err != nil {
		return file{}, err
	}
	st, err := f.Stat("")
	if err != nil {
		f.Close()
		return file{}, err
	}
	return file{f, st.Size, max(0, st.Size-st.Blocks*sector)}, nil
}
