package union

import (
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// findOrigin finds the lower file that one in the upper was copied from, whose
// number it keeps.
func (fs *FS) findOrigin(dir *Node, name string, id *fileID, f *found) {
	roots := make([]layerRoot, 0, len(fs.layers))
	var lowers []*layer
	for _, l := range fs.layers {
		if !l.upper && !l.data {
			roots = append(roots, layerRoot{l.fd.Int(), l.uuid})
			lowers = append(lowers, l)
		}
	}
	fd, at, err := resolve(id, roots)
	if err != nil || fd < 0 {
		return
	}
	defer sys.CloseBare(fd)
	if sys.StatBare(fd, "", &f.lowSt) == nil {
		f.hasLow, f.lowFS = true, lowers[at].fsid
	}
}

// findData finds the data of a metacopy file in the layers that have data alone.
func (fs *FS) findData(n *Node, path string) (realPos, error) { return realPos{}, syscall.EIO }

func closeFd(fd int) { sys.CloseBare(fd) }
