package union

import (
	"strings"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// findData finds the data of a metacopy file in the layers that have data alone, at
// an absolute path there, and remembers where. No symlink is followed.
func (fs *FS) findData(n *Node, path string) (realPos, error) {
	names := strings.Split(path[1:], "/")
	last := len(names) - 1
	for _, l := range fs.data {
		dir := fs.dataDir(l, names[:last])
		if dir == nil {
			continue
		}
		d, err := fs.real(dir)
		if err != nil {
			continue
		}
		var st sys.Stat
		err = sys.StatBare(d.fd, names[last], &st)
		fs.dirs.done(d)
		if err != nil || !st.IsReg() {
			continue
		}
		pos := realPos{dir, names[last]}
		n.mu.Lock()
		n.more.data, n.more.dataSt = pos, dataInfo{blocks: st.Blocks}
		n.mu.Unlock()
		return pos, nil
	}
	fs.say("metacopy file: %q is in no layer of data", path)
	return realPos{}, syscall.ENOENT
}

// dataKey is a directory in a layer of data.
type dataKey struct {
	parent *realDir
	name   string
}

// dataDir is a directory of a layer of data, one for all files in it; nil where
// there is none.
func (fs *FS) dataDir(l *layer, names []string) *realDir {
	dir := l.root
	for _, name := range names {
		key := dataKey{dir, name}
		if known, ok := fs.dataDirs.Load(key); ok {
			dir = known.(*realDir)
			continue
		}
		d, err := fs.real(dir)
		if err != nil {
			return nil
		}
		var st sys.Stat
		err = sys.StatBare(d.fd, name, &st)
		fs.dirs.done(d)
		if err != nil || !st.IsDir() {
			return nil
		}
		next, _ := fs.dataDirs.LoadOrStore(key, &realDir{layer: l, parent: dir, name: name, ino: st.Ino})
		dir = next.(*realDir)
	}
	return dir
}

func closeFd(fd int) { sys.CloseBare(fd) }
