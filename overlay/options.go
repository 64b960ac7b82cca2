package overlay

import (
	"fmt"
	"slices"
	"sort"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
)

// The driver's options and their values, the default first.
var optionTable = []struct {
	name   string
	values []string
	help   string
}{
	{"metacopy", []string{"off", "on"},
		"on: a change of owner, mode or xattr copies no data up; implies redirect_dir=on. Not in a user namespace"},
	{"redirect_dir", []string{"follow", "on", "off", "nofollow"},
		"on: a directory of a parent can be renamed. follow (off is the same): none is made, those there are are read"},
	{"xino", []string{"off", "auto", "on"},
		"inode numbers over several file systems; a root lies on one, so it changes only what mountinfo shows"},
	{"volatile", []string{"off", "on"},
		"on: every writable mount is volatile: no flushing by overlayfs, the layer is lost in a crash"},
}

// options are the driver's parsed options and what the kernel knows of them.
// Immutable after Open.
type options struct {
	metacopy  string // "on", "off"
	redirect  string // "on", "follow", "nofollow"
	xino      string
	volatile  bool
	userxattr bool            // in a user namespace: user.overlay.*
	known     map[string]bool // the mount options that this kernel has
}

// factoryOptions is the documentation of the options.
func factoryOptions() []drivers.Option {
	var os []drivers.Option
	for _, t := range optionTable {
		os = append(os, drivers.Option{Name: t.name, Default: t.values[0], Help: strings.Join(t.values, "|") + ". " + t.help})
	}
	return os
}

// parseOptions checks options by name and value; ErrInvalidArgument names the
// first that is wrong, in alphabetical order.
func parseOptions(m map[string]string) (options, error) {
	set := map[string]string{}
	for _, t := range optionTable {
		set[t.name] = t.values[0]
	}
	var names []string
	for n := range m {
		names = append(names, n)
	}
	sort.Strings(names)
	for _, n := range names {
		if err := checkOption(n, m[n]); err != nil {
			return options{}, err
		}
		set[n] = m[n]
	}
	return combine(set, m)
}

func checkOption(name, value string) error {
	var known []string
	for _, t := range optionTable {
		known = append(known, t.name)
		if t.name != name {
			continue
		}
		if !slices.Contains(t.values, value) {
			return fmt.Errorf("overlay: option %s=%q: want one of %s: %w", name, value, strings.Join(t.values, ", "), errdefs.ErrInvalidArgument)
		}
		return nil
	}
	return fmt.Errorf("overlay: unknown option %q (known: %s): %w", name, strings.Join(known, ", "), errdefs.ErrInvalidArgument)
}

// combine resolves what depends on each other: as the kernel, metacopy needs
// redirect_dir=on, and says so when both were asked for.
func combine(set, asked map[string]string) (options, error) {
	o := options{metacopy: set["metacopy"], redirect: set["redirect_dir"], xino: set["xino"], volatile: set["volatile"] == "on"}
	if o.redirect == "off" {
		o.redirect = "follow"
	}
	if o.metacopy == "on" && o.redirect != "on" {
		if v, ok := asked["redirect_dir"]; ok {
			return options{}, fmt.Errorf("overlay: metacopy=on needs redirect_dir=on, not %s: %w", v, errdefs.ErrInvalidArgument)
		}
		o.redirect = "on"
	}
	return o, nil
}

// inUserNS fits the options to user.overlay.* xattrs: the kernel refuses
// redirects and metacopy with them, because any user could forge one.
func (o options) inUserNS() (options, error) {
	if o.metacopy == "on" || o.redirect == "on" {
		return options{}, fmt.Errorf("overlay: metacopy=on and redirect_dir=on do not go with userxattr, "+
			"which a user namespace needs: %w", errdefs.ErrInvalidArgument)
	}
	o.userxattr, o.redirect = true, "nofollow"
	return o, nil
}
