package fuse

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
)

// The driver's options and their values, the default first.
var optionTable = []drivers.Option{
	{Name: "redirect_dir", Default: "follow",
		Help: "follow|on. on: a directory of a parent can be renamed. follow: none is made, those there are are read"},
	{Name: "volatile", Default: "off",
		Help: "off|on. on: every writable mount is volatile: nothing is flushed, the layer is lost in a crash of the machine"},
}

func factoryOptions() []drivers.Option { return slices.Clone(optionTable) }

// options are the driver's parsed options. Immutable.
type options struct {
	redirect string // "follow", "on"
	volatile bool
}

// parseOptions checks options by name and value; ErrInvalidArgument names the
// first that is wrong, in alphabetical order.
func parseOptions(m map[string]string) (options, error) {
	set := map[string]string{}
	var known []string
	for _, o := range optionTable {
		set[o.Name] = o.Default
		known = append(known, o.Name)
	}
	for _, name := range slices.Sorted(maps.Keys(m)) {
		i := slices.Index(known, name)
		if i < 0 {
			return options{}, fmt.Errorf("fuse: unknown option %q (known: %s): %w", name, strings.Join(known, ", "), errdefs.ErrInvalidArgument)
		}
		values, _, _ := strings.Cut(optionTable[i].Help, ".")
		if !slices.Contains(strings.Split(values, "|"), m[name]) {
			return options{}, fmt.Errorf("fuse: option %s=%q: want one of %s: %w", name, m[name], values, errdefs.ErrInvalidArgument)
		}
		set[name] = m[name]
	}
	return options{redirect: set["redirect_dir"], volatile: set["volatile"] == "on"}, nil
}
