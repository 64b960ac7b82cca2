package main

import (
	"os"
	"runtime"
	"runtime/debug"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

const longHelp = `layerd serves the layers of a store to containerd, which needs no rebuilding: a
snapshotter for each driver (layerd-overlay, layerd-btrfs, layerd-fuse,
layerd-native, layerd-devmapper) and a differ that knows what changed without
looking at what did not. "layerd config containerd" prints what containerd has to
be told.

The store is that of layerctl: both may be at work at the same time. What
containerd sees are its own keys; its garbage collector removes nothing of
layerctl's, and nothing of another snapshotter's.

SIGTERM ends the service when the calls at work are done, SIGHUP reads the
configuration again. Mounts stay, whatever becomes of layerd.`

// flags are those of the command line; they go before the configuration.
type flags struct {
	config   string
	root     string
	address  string
	logLevel string
}

// newCommand builds the command tree.
func newCommand() *cobra.Command {
	var f flags
	c := &cobra.Command{
		Use: "layerd", Short: "Serve layers to containerd", Long: longHelp, Args: cobra.NoArgs,
		Version: versionString(), SilenceErrors: true, SilenceUsage: true,
		RunE: func(cmd *cobra.Command, _ []string) error { return serve(cmd.Context(), &f) },
	}
	c.SetVersionTemplate("layerd {{.Version}}\n")
	c.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return usageError{cmd.CommandPath(), err} })
	p := c.PersistentFlags()
	p.StringVarP(&f.config, "config", "c", "", "the configuration file (default "+defaultConfig+", which need not be there)")
	p.StringVar(&f.root, "root", "", "the store's directory, instead of the configuration's")
	p.StringVar(&f.address, "address", "", "the socket's path, instead of the configuration's")
	p.StringVar(&f.logLevel, "log-level", "", "debug, info, warn or error, instead of the configuration's")
	_ = c.RegisterFlagCompletionFunc("log-level", cobra.FixedCompletions([]string{"debug", "info", "warn", "error"}, cobra.ShellCompDirectiveNoFileComp))
	c.AddCommand(configCommand(&f), versionCommand(), manCommand())
	wrapArgs(c)
	return c
}

// wrapArgs makes a wrong number of arguments, of a command and those below it, a
// usage error.
func wrapArgs(c *cobra.Command) {
	if check := c.Args; check != nil {
		c.Args = func(cmd *cobra.Command, args []string) error {
			if err := check(cmd, args); err != nil {
				return usageError{cmd.CommandPath(), err}
			}
			return nil
		}
	}
	for _, sub := range c.Commands() {
		wrapArgs(sub)
	}
}

// settings is the configuration with the flags over it.
func (f *flags) settings() (*config, error) {
	c, err := readConfig(f.config)
	if err != nil {
		return nil, err
	}
	if f.root != "" {
		c.Root = f.root
	}
	if f.address != "" {
		c.Listen.Address = f.address
	}
	if f.logLevel != "" {
		if err := c.Log.Level.UnmarshalText([]byte(f.logLevel)); err != nil {
			return nil, usageError{"layerd", err}
		}
	}
	return c, c.check()
}

func configCommand(f *flags) *cobra.Command {
	c := &cobra.Command{Use: "config", Short: "Print configurations: layerd's own, and containerd's",
		Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	c.AddCommand(
		&cobra.Command{Use: "default", Short: "Print the configuration of an empty file, with every option", Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error { return print(cmd, newConfig()) }},
		&cobra.Command{Use: "dump", Short: "Check the configuration and print it, flags and defaults among it", Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				c, err := f.settings()
				if err != nil {
					return err
				}
				return print(cmd, c)
			}},
		containerdCommand(f),
	)
	return c
}

func print(cmd *cobra.Command, c *config) error {
	b, err := c.text()
	if err == nil {
		_, err = cmd.OutOrStdout().Write(b)
	}
	return err
}

func versionCommand() *cobra.Command {
	return &cobra.Command{Use: "version", Short: "Print the program's version", Args: cobra.NoArgs,
		Run: func(cmd *cobra.Command, _ []string) {
			cmd.SetOut(os.Stdout)
			cmd.Printf("layerd %s %s/%s\n", versionString(), runtime.GOOS, runtime.GOARCH)
		}}
}

// versionString is the version that the linker or the module system knows.
func versionString() string {
	if version != "unknown" {
		return version
	}
	if bi, ok := debug.ReadBuildInfo(); ok && bi.Main.Version != "" {
		return bi.Main.Version
	}
	return "devel"
}

// manCommand writes man pages; hidden, it is for packagers.
func manCommand() *cobra.Command {
	return &cobra.Command{
		Use: "man DIR", Short: "Write the man pages into a directory", Args: cobra.ExactArgs(1), Hidden: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return err
			}
			root := cmd.Root()
			root.DisableAutoGenTag = true
			date := time.Unix(0, 0).UTC() // so that equal programs give equal pages
			return doc.GenManTree(root, &doc.GenManHeader{Title: "LAYERD", Section: "8", Source: "layerctl", Date: &date}, args[0])
		},
	}
}
