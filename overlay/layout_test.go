package overlay

import (
	"strings"

	"github.com/layerctl/layerctl/drivers"
)

// The layout of package drivers/upper, which these tests look into: other programs
// rely on it, too.
const (
	formatFile    = "format.json"
	emptyDir      = "empty.dir"
	delSuffix     = ".del"
	fsDir         = "fs"
	workDir       = "work"
	appliedFile   = "applied.json"
	rebaseFile    = "rebase.json"
	volatileFile  = "volatile"
	incompatDir   = "incompat"
	targetXattr   = "trusted.overlay.layerctl.target"
	openAtRemoval = 200 // descriptors that a removal holds at most
)

func (b *bench) path(elem ...string) string { return b.Root() + "/" + strings.Join(elem, "/") }
func (b *bench) fs(id drivers.ID) string    { return b.Dir(id) }
