package thin

import (
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"

	"github.com/layerctl/layerctl/devmapper/dm"
)

// Gone is a device of a pool that is no more: nobody can open the pool again.
type Gone struct {
	Name string
	Why  string
}

// deviceNames are those of our pools and their devices: directory, rest.
var deviceNames = regexp.MustCompile(`^(layerctl-\d+\.\d+-\d+-)(.+)$`)

// GonePools lists devices of other pools of ours that are left in the kernel while the
// pool's files were deleted, or the pool itself; each pool's own device comes last. A
// pool on devices is not told from one whose directory is not seen from here: it is
// left out.
func (p *Pool) GonePools() ([]Gone, error) {
	all, err := p.ctl.List()
	if err != nil {
		return nil, err
	}
	devices := map[string][]string{} // by the pool's prefix
	for _, n := range all {
		if m := deviceNames.FindStringSubmatch(n.Name); m != nil && m[1] != p.Prefix() {
			devices[m[1]] = append(devices[m[1]], n.Name)
		}
	}
	var gone []Gone
	for _, prefix := range slices.Sorted(maps.Keys(devices)) {
		names := devices[prefix]
		why := p.whyGone(prefix+"pool", names)
		if why == "" {
			continue
		}
		slices.SortFunc(names, func(a, b string) int { return compareNames(a, b, prefix+"pool") })
		for _, name := range names {
			gone = append(gone, Gone{name, why})
		}
	}
	return gone, nil
}

// compareNames sorts the pool last.
func compareNames(a, b, pool string) int {
	if (a == pool) != (b == pool) {
		if a == pool {
			return 1
		}
		return -1
	}
	return strings.Compare(a, b)
}

// whyGone says why a pool that has these devices cannot be opened again, "" if it may be.
func (p *Pool) whyGone(pool string, names []string) string {
	if !slices.Contains(names, pool) {
		return "its pool " + pool + " is not there"
	}
	_, metadata, err := p.deviceNumbers(pool)
	if err != nil {
		return ""
	}
	if file, deleted := backing(metadata); deleted {
		return "the file that its pool's metadata is on was deleted (" + file + ")"
	}
	return ""
}

// backing is the file of a loop device, and whether it was deleted.
func backing(d dm.Dev) (file string, deleted bool) {
	b, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%s/loop/backing_file", d))
	if err != nil {
		return "", false
	}
	return strings.CutSuffix(strings.TrimSuffix(string(b), "\n"), " (deleted)")
}

// Ours reports whether a device was made by this package: its UUID says so.
func (p *Pool) Ours(name string) bool {
	i, err := p.ctl.Info(name)
	return err == nil && i.UUID == uuid(name)
}
