package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"text/template"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/layerctl/layerctl"
	"github.com/layerctl/layerctl/internal/kprobe"
)

const containerdHelp = `Print what containerd has to be told to use layerd, for the containerd that is
installed here: a drop-in for /etc/containerd/conf.d, with a proxy plugin for
each snapshotter whose driver works here, and one for the differ.

containerd reads drop-ins if there is an /etc/containerd/config.toml that has
imports = ["/etc/containerd/conf.d/*.toml"] before its first table. containerd 1.6
can use the snapshotters alone: it knows no differ of others.`

// containerdVersion is what is known of a containerd.
type containerdVersion struct {
	Text         string // as it is printed
	Major, Minor int
	Config       int // newest version of configuration files that it knows
}

func (v containerdVersion) atLeast(major, minor int) bool {
	return v.Major > major || v.Major == major && v.Minor >= minor
}

// dropIn is what the template needs.
type dropIn struct {
	Containerd containerdVersion
	Address    string
	Root       string
	Platform   string
	Capable    bool // containerd knows capabilities, exports and differs of others
	Diff       bool // the differ is to be used
	Transfer   bool // containerd unpacks in its transfer service
	Views      []dropInView
	Broken     []dropInView
	Parallel   bool // one of the views has rebase
	Unpacks    int  // layers of an image to unpack at a time; 0 is containerd's default
}

// dropInView is a snapshotter, and why it does not work here.
type dropInView struct {
	Name, Driver, Address string
	Capabilities          []string
	Reason                string
}

var dropInTemplate = template.Must(template.New("").Funcs(template.FuncMap{"quote": strconv.Quote, "list": tomlList}).Parse(
	`# layerd's snapshotters{{if .Diff}} and differ{{end}}, for containerd {{.Containerd.Text}}.
# Printed by "layerd config containerd"; put it into /etc/containerd/conf.d/layerd.toml.
# containerd reads it if there is a config.toml that has, before its first table,
#   imports = ["/etc/containerd/conf.d/*.toml"]
{{- if not .Capable}}
# This containerd knows no differs of others: its own one unpacks and diffs.
{{- end}}
version = {{.Containerd.Config}}
{{range .Views}}
[proxy_plugins.{{.Name}}]
  type = "snapshot"
  address = {{quote .Address}}
{{- if $.Capable}}
  capabilities = {{list .Capabilities}}
  [proxy_plugins.{{.Name}}.exports]
    root = {{quote $.Root}}
{{- end}}
{{end}}
{{- range .Broken}}
# {{.Name}}: driver {{.Driver}} does not work here: {{.Reason}}
{{end}}
{{- if .Diff}}
[proxy_plugins.layerd]
  type = "diff"
  address = {{quote .Address}}

# layerd makes and unpacks the layers that are its own; all others are containerd's.
[plugins."io.containerd.service.v1.diff-service"]
  default = ["layerd", "walking"]
{{end}}
{{- if .Transfer}}
# What "ctr image pull" and "ctr image import" unpack to, by --snapshotter. The first
# is containerd's own default, which a list of others would replace.
[plugins."io.containerd.transfer.v1.local"]
{{- if .Parallel}}
  # Unpacks layers of one image at the same time; of containerd's own overlayfs, too.
  {{if not .Unpacks}}# {{end}}max_concurrent_unpacks = {{or .Unpacks 4}}
{{- end}}
  [[plugins."io.containerd.transfer.v1.local".unpack_config]]
    platform = {{quote .Platform}}
    snapshotter = "overlayfs"
    differ = "walking"
{{- range .Views}}
  [[plugins."io.containerd.transfer.v1.local".unpack_config]]
    platform = {{quote $.Platform}}
    snapshotter = {{quote .Name}}
    differ = {{if $.Diff}}"layerd"{{else}}"walking"{{end}}
    optional = true
{{- end}}
{{end}}`))

func tomlList(words []string) string {
	var quoted []string
	for _, w := range words {
		quoted = append(quoted, strconv.Quote(w))
	}
	return "[" + strings.Join(quoted, ", ") + "]"
}

func containerdCommand(f *flags) *cobra.Command {
	var program, version string
	var unpacks int
	c := &cobra.Command{
		Use: "containerd", Short: "Print the drop-in for containerd's configuration", Long: containerdHelp, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			conf, err := f.settings()
			if err != nil {
				return err
			}
			v, err := findContainerd(cmd.Context(), program, version)
			if err != nil {
				return err
			}
			d := newDropIn(cmd.Context(), conf, v)
			d.Unpacks = unpacks
			return dropInTemplate.Execute(cmd.OutOrStdout(), d)
		},
	}
	c.Flags().StringVar(&program, "containerd", "containerd", "the containerd to print it for")
	c.Flags().StringVar(&version, "containerd-version", "", "print it for this version, MAJOR.MINOR, instead of asking")
	c.Flags().IntVar(&unpacks, "parallel-unpacks", 0, "how many layers of an image containerd unpacks at a time (default: its own default, one)")
	return c
}

// newDropIn finds out which drivers work at the store's place.
func newDropIn(ctx context.Context, c *config, v containerdVersion) dropIn {
	d := dropIn{Containerd: v, Address: c.Listen.Address, Root: c.Root, Platform: "linux/" + runtime.GOARCH}
	d.Capable = v.atLeast(1, 7)
	d.Diff = d.Capable && c.Diff.Enabled
	d.Transfer = v.atLeast(2, 0)
	dir := existing(c.Root)
	for _, name := range slices.Sorted(maps.Keys(c.Views)) {
		view := c.Views[name]
		out := dropInView{Name: name, Driver: view.Driver, Address: c.Listen.Address}
		if view.Socket != "" {
			out.Address = view.Socket
		}
		f, err := layerctl.Drivers().Lookup(view.Driver)
		if err != nil {
			continue // config.check has seen to it
		}
		p := f.Probe(ctx, dir)
		if p.Works != kprobe.Yes {
			out.Reason = strings.Join(strings.Fields(p.Reason), " ")
			d.Broken = append(d.Broken, out)
			continue
		}
		if view.Rebase && d.Diff {
			out.Capabilities = append(out.Capabilities, "rebase")
			d.Parallel = true
		}
		if slices.ContainsFunc(p.Features, func(r kprobe.Result) bool {
			return strings.HasPrefix(r.Feature, "id-mapped") && r.Answer == kprobe.Yes
		}) {
			out.Capabilities = append(out.Capabilities, "remap-ids")
		}
		d.Views = append(d.Views, out)
	}
	return d
}

// existing is the nearest directory above a path, or the path itself, that is
// there.
func existing(path string) string {
	for {
		_, err := os.Stat(path)
		if !errors.Is(err, fs.ErrNotExist) || path == "/" {
			return path
		}
		path = filepath.Dir(path)
	}
}

// askContainerd bounds how long a containerd may take to say its version.
const askContainerd = time.Minute

// findContainerd asks a containerd for its version, unless one is given.
func findContainerd(ctx context.Context, program, given string) (containerdVersion, error) {
	if given != "" {
		v, ok := parseVersion(given)
		if !ok {
			return v, fmt.Errorf("--containerd-version %q is not MAJOR.MINOR: %w", given, errdefs.ErrInvalidArgument)
		}
		return v, nil
	}
	ctx, cancel := context.WithTimeout(ctx, askContainerd)
	defer cancel()
	out, err := exec.CommandContext(ctx, program, "--version").Output()
	if err != nil {
		return containerdVersion{}, fmt.Errorf("%s --version: %w (--containerd names another program, --containerd-version a version)", program, err)
	}
	fields := strings.Fields(string(out)) // containerd MODULE VERSION REVISION
	if len(fields) < 3 {
		return containerdVersion{}, fmt.Errorf("%s --version says %q: %w", program, out, errdefs.ErrInvalidArgument)
	}
	v, ok := parseVersion(fields[2])
	if !ok {
		return v, fmt.Errorf("%s --version says %q: %w", program, out, errdefs.ErrInvalidArgument)
	}
	if b, err := exec.CommandContext(ctx, program, "config", "default").Output(); err == nil {
		if m := configVersion.FindSubmatch(b); m != nil {
			v.Config, _ = strconv.Atoi(string(m[1]))
		}
	}
	return v, nil
}

var (
	configVersion  = regexp.MustCompile(`(?m)^version = (\d+)`)
	programVersion = regexp.MustCompile(`^v?(\d+)\.(\d+)`)
)

// parseVersion reads the beginning of a version.
func parseVersion(s string) (v containerdVersion, ok bool) {
	m := programVersion.FindStringSubmatch(s)
	if m == nil {
		return v, false
	}
	v.Text, v.Config = s, 2
	v.Major, _ = strconv.Atoi(m[1])
	v.Minor, _ = strconv.Atoi(m[2])
	if v.Major >= 2 {
		v.Config = 3
	}
	return v, true
}
