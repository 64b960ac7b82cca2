package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"

	"github.com/layerctl/layerctl"
	"github.com/layerctl/layerctl/drivers"
)

// defaultConfig is where the configuration is looked for; it need not be there.
const defaultConfig = "/etc/layerd/config.toml"

// config is the configuration file: every option, with what `config default` says
// of it. Options marked (reload) take effect at SIGHUP, others at the next start.
type config struct {
	Root      string               `toml:"root" comment:"The store's directory, which layerctl --root names, too."`
	GC        duration             `toml:"gc_interval" comment:"(reload) How often the bytes of removed snapshots are removed besides when containerd asks; \"0s\" is never."`
	Volatile  bool                 `toml:"volatile" comment:"Flush nothing: faster, and lost in a power cut."`
	Stop      duration             `toml:"stop_timeout" comment:"(reload) How long calls at work may go on at SIGTERM."`
	Listen    listenConfig         `toml:"listen" comment:"The socket of the service. One that systemd hands over, named layerd, is taken instead."`
	Log       logConfig            `toml:"log"`
	Limits    limitsConfig         `toml:"limits" comment:"Bounds on what a client may ask for; 0 is the default."`
	Diff      diffConfig           `toml:"diff" comment:"The diff service."`
	Metrics   metricsConfig        `toml:"metrics"`
	Views     map[string]view      `toml:"views" comment:"The snapshotters: a name, which is a view of the store and what containerd calls it, and its driver."`
	DriverOpt map[string]stringMap `toml:"driver_options" comment:"Options of drivers, as layerctl's --driver-option has them: [driver_options.overlay] redirect_dir = \"on\""`
}

type stringMap = map[string]string

type listenConfig struct {
	Address string   `toml:"address" comment:"Path of the unix socket."`
	Mode    fileMode `toml:"mode" comment:"Its mode."`
	UID     int      `toml:"uid" comment:"Its owner; -1 is whoever runs layerd."`
	GID     int      `toml:"gid"`
	UIDs    []uint32 `toml:"allow_uids" comment:"Who may connect, by user (SO_PEERCRED), whatever the mode says."`
	GIDs    []uint32 `toml:"allow_gids" comment:"Who may connect, by its first group."`
}

type logConfig struct {
	Level  slog.Level `toml:"level" comment:"(reload) debug (every call), info, warn or error."`
	Format string     `toml:"format" comment:"text or json, on standard error."`
}

type limitsConfig struct {
	Message int    `toml:"message_bytes" comment:"Bytes of one message: 16 MiB."`
	Streams uint32 `toml:"calls_per_connection" comment:"Calls at a time on one connection: 1000."`
	Labels  int    `toml:"labels_bytes" comment:"Bytes of the labels of one snapshot: 1 MiB."`
	Label   int    `toml:"label_bytes" comment:"Bytes of one label: 4096."`
	Window  int64  `toml:"window_bytes" comment:"Memory that a zstd layer may ask for: 32 MiB."`
	Entries int64  `toml:"layer_entries" comment:"Entries of one layer: 4,000,000."`
	Size    int64  `toml:"layer_bytes" comment:"Uncompressed bytes of one layer: 1 TiB."`
}

type diffConfig struct {
	Enabled       bool     `toml:"enabled" comment:"Whether it is served. Without it containerd's own differ does the work, and no view may have rebase."`
	Containerd    string   `toml:"containerd_address" comment:"The socket of the containerd whose content is read and written."`
	Lease         duration `toml:"lease" comment:"How long a layer is kept that was made for a request without a lease, for somebody to name it."`
	SkipWhiteouts bool     `toml:"skip_whiteout_names" comment:"Leave out names that begin with .wh. instead of failing."`
}

type metricsConfig struct {
	Address string `toml:"address" comment:"Where Prometheus finds metrics (/metrics), HOST:PORT or the path of a unix socket; \"\" is nowhere."`
}

type view struct {
	Driver string `toml:"driver"`
	Socket string `toml:"socket,omitempty" comment:"A socket for this view alone, for clients that name another or none."`
	Rebase bool   `toml:"rebase" comment:"Tell containerd that layers may be unpacked in parallel (capability rebase)."`
}

// duration is a time.Duration as a configuration spells it: "1m30s".
type duration time.Duration

func (d duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

func (d *duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	*d = duration(v)
	return err
}

// fileMode is a mode as a configuration spells it: "0600".
type fileMode fs.FileMode

func (m fileMode) MarshalText() ([]byte, error) { return fmt.Appendf(nil, "%04o", m), nil }

func (m *fileMode) UnmarshalText(b []byte) error {
	v, err := strconv.ParseUint(string(b), 8, 9)
	*m = fileMode(v)
	return err
}

// newConfig is the configuration of an empty file.
func newConfig() *config {
	c := &config{
		Root: "/var/lib/layerctl",
		GC:   duration(10 * time.Minute),
		Stop: duration(30 * time.Second),
		Listen: listenConfig{
			Address: "/run/layerd/layerd.sock", Mode: 0o600, UID: -1, GID: -1, UIDs: []uint32{0}, GIDs: []uint32{},
		},
		Log:       logConfig{Level: slog.LevelInfo, Format: "text"},
		Diff:      diffConfig{Enabled: true, Containerd: "/run/containerd/containerd.sock", Lease: duration(time.Hour)},
		Views:     map[string]view{},
		DriverOpt: map[string]stringMap{},
	}
	for _, f := range layerctl.Drivers().Factories() {
		c.Views["layerd-"+f.Name] = view{Driver: f.Name, Rebase: canRebase(f.Name)}
	}
	return c
}

// canRebase reports whether a driver can put a parent below a layer at Commit, where
// it works: a configuration is checked before any driver is opened.
func canRebase(driver string) bool { return driver == "overlay" || driver == "fuse" }

// readConfig reads a file; one that is not named need not be there.
func readConfig(path string) (*config, error) {
	c, named := newConfig(), path != ""
	if !named {
		path = defaultConfig
	}
	b, err := os.ReadFile(path)
	if err != nil && (named || !errors.Is(err, fs.ErrNotExist)) {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	if err := c.parse(b); err != nil {
		return nil, fmt.Errorf("configuration %s: %w", path, err)
	}
	return c, nil
}

// parse reads a file's text over the defaults. A table views replaces those there
// are: who names some wants no others.
func (c *config) parse(b []byte) error {
	defaults := c.Views
	c.Views = nil
	d := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields()
	if err := d.Decode(c); err != nil {
		return fmt.Errorf("%w: %w", errdefs.ErrInvalidArgument, explain(err))
	}
	if c.Views == nil {
		c.Views = defaults
		for name, v := range c.Views {
			v.Rebase = v.Rebase && c.Diff.Enabled
			c.Views[name] = v
		}
	}
	return c.check()
}

// explain says where in a file an error is.
func explain(err error) error {
	var strict *toml.StrictMissingError
	var decode *toml.DecodeError
	switch {
	case errors.As(err, &strict):
		var keys []string
		for _, e := range strict.Errors {
			line, _ := e.Position()
			keys = append(keys, fmt.Sprintf("line %d: no option %s", line, strings.Join(e.Key(), ".")))
		}
		return errors.New(strings.Join(keys, "; "))
	case errors.As(err, &decode):
		line, column := decode.Position()
		return fmt.Errorf("line %d, column %d: %w", line, column, err)
	}
	return err
}

// check refuses what cannot be.
func (c *config) check() error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
	}
	for option, path := range map[string]string{"root": c.Root, "listen.address": c.Listen.Address} {
		if !filepath.IsAbs(path) {
			return bad("%s = %q is not an absolute path", option, path)
		}
	}
	if c.Log.Format != "text" && c.Log.Format != "json" {
		return bad("log.format = %q is neither text nor json", c.Log.Format)
	}
	if len(c.Views) == 0 {
		return bad("no views")
	}
	sockets := map[string]string{c.Listen.Address: "listen.address"}
	for _, name := range slices.Sorted(maps.Keys(c.Views)) {
		v := c.Views[name]
		f, err := layerctl.Drivers().Lookup(v.Driver)
		switch {
		case err != nil:
			return fmt.Errorf("views.%s: %w", name, err)
		case v.Rebase && !canRebase(f.Name):
			return bad("views.%s: driver %s cannot put a parent below a layer: no rebase", name, f.Name)
		case v.Rebase && !c.Diff.Enabled:
			return bad("views.%s: rebase needs the diff service", name)
		case v.Socket != "" && !filepath.IsAbs(v.Socket):
			return bad("views.%s: socket = %q is not an absolute path", name, v.Socket)
		case v.Socket != "" && sockets[v.Socket] != "":
			return bad("views.%s: socket %s is that of %s", name, v.Socket, sockets[v.Socket])
		}
		if v.Socket != "" {
			sockets[v.Socket] = name
		}
	}
	return c.checkDriverOptions()
}

func (c *config) checkDriverOptions() error {
	for _, driver := range slices.Sorted(maps.Keys(c.DriverOpt)) {
		f, err := layerctl.Drivers().Lookup(driver)
		if err == nil {
			err = drivers.CheckOptions(f.Options, c.DriverOpt[driver])
		}
		if err != nil {
			return fmt.Errorf("driver_options.%s: %w", driver, err)
		}
	}
	return nil
}

// text is the configuration as a file.
func (c *config) text() ([]byte, error) {
	var b bytes.Buffer
	e := toml.NewEncoder(&b)
	e.SetIndentTables(false)
	err := e.Encode(c)
	return b.Bytes(), err
}
