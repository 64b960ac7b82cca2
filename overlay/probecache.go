package overlay

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/layerctl/layerctl/drivers/upper"
	"github.com/layerctl/layerctl/internal/kprobe"
	"github.com/layerctl/layerctl/internal/sys"
)

// Asking the kernel costs some mounts, and every run of a program would pay for
// them. So what Open found out stands in ROOT/probed.json for as long as nothing
// changes that could make it false: the boot, the file system that the root lies
// on and its mount options, the user and the ids mapped, and the questions.

const probedFile = "probed.json"

// probeVersion counts changes to what is asked and how it is judged.
const probeVersion = 2

// probed is ROOT/probed.json.
type probed struct {
	Key       string         `json:"key"`
	Works     cachedAnswer   `json:"works"`
	All       []cachedAnswer `json:"features"`
	FS        int64          `json:"fs"`
	Userxattr bool           `json:"userxattr,omitempty"`
	Known     []string       `json:"known"`
}

// cachedAnswer is a kprobe.Result without its error.
type cachedAnswer struct {
	Feature string `json:"feature"`
	Yes     bool   `json:"yes"`
	Detail  string `json:"detail,omitempty"`
}

// rootFeatures probes the root, or remembers what was found.
func rootFeatures(ctx context.Context, root string) features {
	dir, err := sys.OpenDir(root)
	if err != nil {
		return features{works: outcome(featOverlay, err, "")}
	}
	defer dir.Close()
	key, err := probeKey(dir, root)
	if err != nil {
		return probeFeatures(ctx, root)
	}
	var p probed
	stored := upper.ReadJSON(dir, probedFile, &p) == nil
	if stored && p.Key == key {
		return p.features()
	}
	f := probeFeatures(ctx, root)
	if stored && errors.Is(f.works.Err, syscall.EROFS) {
		return p.features() // nothing can be tried, only read: as it was when it could be written
	}
	if p, ok := remember(key, f); ok {
		_ = upper.WriteJSON(dir, probedFile, p, false) // another process may be writing the same
	}
	return f
}

// probeKey names all that an answer depends on.
func probeKey(dir *sys.Fd, root string) (string, error) {
	st, err := dir.Stat("")
	if err != nil {
		return "", err
	}
	ids, err := os.ReadFile("/proc/self/uid_map") // the user namespace: the initial one, or ours each time anew
	if err != nil {
		return "", err
	}
	real, err := filepath.EvalSymlinks(root)
	if err != nil {
		return "", err
	}
	in, ok := upper.MountOf(real)
	if !ok {
		return "", os.ErrNotExist
	}
	label, _ := os.ReadFile("/proc/self/attr/current") // a security module decides, too
	return fmt.Sprintf("%d %s %q uid=%d dev=%x %s %q %q %q", probeVersion, upper.BootID(), strings.Fields(string(ids)), os.Geteuid(),
		st.Dev, in.Type, in.Options, in.SuperOptions, label), nil
}

// remember turns definite answers into what is stored; an Unknown is asked again.
func remember(key string, f features) (probed, bool) {
	p := probed{Key: key, FS: int64(f.fs), Userxattr: f.userxattr, Works: cached(f.works)}
	for _, r := range f.all {
		if r.Answer == kprobe.Unknown {
			return p, false
		}
		p.All = append(p.All, cached(r))
	}
	for n, known := range f.known {
		if known {
			p.Known = append(p.Known, n)
		}
	}
	return p, f.works.Answer == kprobe.Yes
}

func cached(r kprobe.Result) cachedAnswer {
	return cachedAnswer{r.Feature, r.Answer == kprobe.Yes, r.Detail}
}

func (a cachedAnswer) result() kprobe.Result {
	r := kprobe.Result{Feature: a.Feature, Answer: kprobe.No, Detail: a.Detail}
	if a.Yes {
		r.Answer = kprobe.Yes
	}
	return r
}

func (p *probed) features() features {
	f := features{fs: sys.FSType(p.FS), userxattr: p.Userxattr, works: p.Works.result(), known: map[string]bool{}}
	for _, a := range p.All {
		f.add(a.result())
	}
	for _, n := range p.Known {
		f.known[n] = true
	}
	return f
}
