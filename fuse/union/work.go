package union

import (
	"context"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// upper is the writable layer with its workdir, and the ways to change it that
// survive a crash. It knows no nodes: callers say where by descriptor and name,
// and hold the locks that keep others away from there.
type upper struct {
	root, workdir *sys.Fd // as configured
	work          *sys.Fd // workdir/work: what is built
	index         *sys.Fd // workdir/index; nil without Config.Index
	xattrs        *xattrNames
	can           abilities
	volatile      bool
	step          func(string) error // never nil
	log           func(format string, args ...any)
}

// openUpper claims upper and work of c, empties work and prepares it. ctx bounds
// the wait for a server that is just going away.
func openUpper(ctx context.Context, c *Config) (*upper, error) { return nil, syscall.ENOSYS }

// close gives up the claims.
func (u *upper) close() error { return syscall.ENOSYS }

// tempName is a new name for something in work.
func (u *upper) tempName() string { return "" }

// removeTree removes name below dir with all that is in it, following nothing.
func removeTree(dir int, name string) error { return syscall.ENOSYS }
