package union

import (
	"syscall"
	"testing"

	"github.com/layerctl/layerctl/internal/testenv"
)

// TestOpenLater: a lower file is opened below when somebody asks for its data, and
// these are then what they would be had it been opened at once, whatever became of
// the file meanwhile.
func TestOpenLater(t *testing.T) {
	testenv.Root(t)
	for name, c := range map[string]Config{"plain": {}, "index": {Index: true}, "nfs_export": {Index: true, NFSExport: true}} {
		t.Run(name, func(t *testing.T) {
			c = layersFor(t, testenv.FS(t, "ext4"), 1, c, linkedLowers(t))
			u := openUnion(t, c)
			defer func() { _ = u.fs.Close() }() // of a test that has failed
			for _, x := range []struct {
				p, want string
				do      func(p string) error
			}{
				{"alone", "one", func(string) error { return nil }},
				{"e/f", "f", func(p string) error { return u.unlink(p) }},
				{"b", "linked", func(p string) error { return u.rename(p, "renamed", 0) }},
				{"a", "LINKED", func(p string) error { return u.write(p, 0, "LINKED") }},
				{"d/x", "", func(p string) error { return u.trunc(p) }},
				{"alone", "one", func(p string) error { return u.chmod(p, 0o600) }},
			} {
				must(t, u.open(x.p, syscall.O_RDONLY, func(f *File) error {
					if !f.Upper() && f.now.Load() != unopened {
						t.Errorf("%s is open below already", x.p)
					}
					must(t, x.do(x.p))
					b := make([]byte, 100)
					n, err := f.ReadAt(b, 0)
					if err != nil || string(b[:n]) != x.want {
						t.Errorf("%s reads %q, %v, want %q", x.p, b[:n], err, x.want)
					}
					_, err = u.fs.Getattr(f.node, f)
					return err
				}))
			}
			u.close()
		})
	}
}
