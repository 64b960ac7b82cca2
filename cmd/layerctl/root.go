package main

import (
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/layerctl/layerctl"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/userns"
)

// How a verb wants to run for an ordinary user, as an annotation of its command.
const (
	nsKey   = "namespace"
	nsEnter = "enter" // in the keeper's namespaces, or in its own for as long as it runs
	nsKeep  = "keep"  // in a keeper's namespaces: it may make a mount
	nsDrop  = "drop"  // like enter, and it may remove the last mount
	nsFeed  = "feed"  // like enter, and a directory is read outside
)

const longHelp = `layerctl keeps layers of file systems and stacks them. It imports trees and
images, mounts them read-only or writable, shows what changed, freezes that as a
new layer, and writes layers and images out again.

Names are those of snapshots, references of images, or beginnings of digests
that fit one only. Names and paths come on standard output, all else on standard
error. The exit code is 0, 1 for an error, 2 for wrong usage.`

// command builds the command tree.
func (a *app) command() *cobra.Command {
	root := &cobra.Command{
		Use: "layerctl", Short: "Keep, mount, diff and export layers of file systems", Long: longHelp,
		Version: versionString(), SilenceErrors: true, SilenceUsage: true,
		Args:              cobra.NoArgs,
		PersistentPreRunE: a.before,
		RunE:              func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetVersionTemplate("layerctl {{.Version}}\n")
	root.SetOut(a.out)
	root.SetErr(a.err)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return usageError{cmd, err} })
	f := root.PersistentFlags()
	f.StringVar(&a.root, "root", "", "the store's directory (default /var/lib/layerctl for root, $XDG_DATA_HOME/layerctl for others)")
	f.StringVar(&a.driver, "driver", "", "the driver of new snapshots (default: the best that works; see info)")
	f.StringArrayVar(&a.options, "driver-option", nil, "an option of a driver, `DRIVER.NAME=VALUE`; may be repeated")
	f.StringVar(&a.format, "format", "table", "of lists: table, json or a Go template")
	f.StringVar(&a.progress, "progress", "auto", "of long work, on standard error: auto, plain, json or none")
	f.BoolVarP(&a.quiet, "quiet", "q", false, "print names only, and nothing on standard error but errors and a --progress that is named")
	f.BoolVar(&a.volatile, "volatile", false, "flush nothing: faster, and lost in a power cut")
	root.AddCommand(a.verbs()...)
	for _, c := range append(root.Commands(), root) {
		wrapArgs(c)
	}
	_ = root.RegisterFlagCompletionFunc("driver", a.completeDrivers)
	_ = root.RegisterFlagCompletionFunc("format", cobra.FixedCompletions([]string{"table", "json"}, cobra.ShellCompDirectiveNoFileComp))
	_ = root.RegisterFlagCompletionFunc("progress", cobra.FixedCompletions(progressModes, cobra.ShellCompDirectiveNoFileComp))
	return root
}

func (a *app) verbs() []*cobra.Command {
	return []*cobra.Command{
		a.infoCommand(), a.importCommand(), a.loadCommand(), a.imagesCommand(), a.tagCommand(), a.lsCommand(),
		a.mountCommand(), a.umountCommand(), a.diffCommand(), a.commitCommand(), a.applyCommand(),
		a.exportCommand(), a.saveCommand(), a.usageCommand(), a.rmCommand(), a.gcCommand(), a.dedupCommand(), a.migrateCommand(), a.checkCommand(), a.doctorCommand(),
		a.unshareCommand(), a.versionCommand(), a.manCommand(),
	}
}

// wrapArgs makes a wrong number of arguments a usage error.
func wrapArgs(c *cobra.Command) {
	check := c.Args
	if check == nil {
		return
	}
	c.Args = func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			if cmd.HasParent() { // else it is a verb that there is not
				err = verbError(err, cmd.Name())
			}
			return usageError{cmd, err}
		}
		return nil
	}
}

// before checks the global flags and, for an ordinary user, takes the verb into
// namespaces.
func (a *app) before(cmd *cobra.Command, args []string) error {
	if err := a.setRoot(); err != nil {
		return err
	}
	if err := checkProgress(a.progress); err != nil {
		return usageError{cmd, err}
	}
	if err := checkFormat(a.format); err != nil {
		return usageError{cmd, err}
	}
	if _, err := driverOptions(a.options); err != nil {
		return usageError{cmd, err}
	}
	how := cmd.Annotations[nsKey]
	if how == "" || !userns.Needed() {
		return nil
	}
	c := userns.Command{Args: os.Args[1:], Root: a.root}
	switch how {
	case nsKeep:
		if err := a.needStore(); len(args) > 0 && err != nil {
			return verbError(err, cmd.Name(), args[0])
		}
		c.Keep, c.Mounts = len(args) > 0, a.countAfterFailure // without arguments mount lists
	case nsDrop:
		c.Mounts = a.countMounts
	case nsFeed:
		a.feed(cmd.Context(), &c, args)
	}
	return a.enterNamespaces(c)
}

// driverOptions understands --driver-option: by driver, by name.
func driverOptions(given []string) (map[string]map[string]string, error) {
	all := map[string]map[string]string{}
	for _, o := range given {
		key, value, ok := strings.Cut(o, "=")
		driver, name, dot := strings.Cut(key, ".")
		if !ok || !dot || name == "" {
			return nil, fmt.Errorf("--driver-option %q is not DRIVER.NAME=VALUE: %w", o, errdefs.ErrInvalidArgument)
		}
		f, err := layerctl.Drivers().Lookup(driver)
		if err != nil {
			return nil, fmt.Errorf("--driver-option %q: %w", o, err)
		}
		if err := drivers.CheckOptions(f.Options, map[string]string{name: value}); err != nil {
			return nil, fmt.Errorf("--driver-option %q: %w", o, err)
		}
		if all[driver] == nil {
			all[driver] = map[string]string{}
		}
		all[driver][name] = value
	}
	return all, nil
}

// versionString is the version that the linker or the module system knows, else
// the commit that was built.
func versionString() string {
	if version != "unknown" {
		return version
	}
	if bi, ok := debug.ReadBuildInfo(); ok {
		return versionOf(bi)
	}
	return "devel"
}

func versionOf(bi *debug.BuildInfo) string {
	if bi.Main.Version != "" && bi.Main.Version != "(devel)" {
		return bi.Main.Version
	}
	set := map[string]string{}
	for _, s := range bi.Settings {
		set[s.Key] = s.Value
	}
	v := "devel"
	if rev := set["vcs.revision"]; rev != "" {
		v += "-" + rev[:min(len(rev), 12)]
	}
	if set["vcs.modified"] == "true" {
		v += "+dirty"
	}
	return v + " (" + bi.GoVersion + ")"
}

// versionReport is what version says to scripts.
type versionReport struct {
	Version  string `json:"version"`
	Go       string `json:"go"`
	Platform string `json:"platform"` // GOOS/GOARCH
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the program's version", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if a.format == "table" {
				cmd.Println("layerctl " + versionString())
				return nil
			}
			return a.showOne(versionReport{versionString(), runtime.Version(), runtime.GOOS + "/" + runtime.GOARCH})
		},
	}
}

// manCommand writes man pages; hidden, it is for packagers.
func (a *app) manCommand() *cobra.Command {
	return &cobra.Command{
		Use: "man DIR", Short: "Write the man pages into a directory", Args: cobra.ExactArgs(1), Hidden: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return err
			}
			return writeManPages(cmd.Root(), args[0])
		},
	}
}
