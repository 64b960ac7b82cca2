package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/layerctl/layerctl"
	"github.com/layerctl/layerctl/image"
	"github.com/layerctl/layerctl/internal/userns"
	"github.com/layerctl/layerctl/layer"
	"github.com/layerctl/layerctl/snapshot"
)

// viewName is the view of the store whose keys the program shows.
const viewName = "cli"

// app is one run of the program: its flags and what is open.
type app struct {
	root     string
	driver   string
	format   string
	progress string
	quiet    bool
	volatile bool
	options  []string // --driver-option

	importOptions importOptions
	limits        layer.Limits // --limit
	mayMake       bool         // the verb makes the store where there is none

	in       io.Reader
	out, err io.Writer

	store    *snapshot.Store // nil until openStore
	readOnly bool            // the store's file system is
	images   *image.Store    // nil until openImages
}

func newApp() *app { return &app{in: os.Stdin, out: os.Stdout, err: os.Stderr} }

// note tells the user something on standard error.
func (a *app) note(format string, args ...any) {
	fmt.Fprintf(a.err, "layerctl: %s\n", printable(fmt.Sprintf(format, args...)))
}

// defaultRoot is the store's place when --root does not say.
func defaultRoot() (string, error) {
	if !userns.Ordinary() {
		return "/var/lib/layerctl", nil
	}
	data := os.Getenv("XDG_DATA_HOME")
	if !filepath.IsAbs(data) {
		home := os.Getenv("HOME")
		if !filepath.IsAbs(home) {
			return "", fmt.Errorf("no place for the store: neither XDG_DATA_HOME nor HOME is set: use --root")
		}
		data = filepath.Join(home, ".local/share")
	}
	return filepath.Join(data, "layerctl"), nil
}

// setRoot makes the root absolute.
func (a *app) setRoot() error {
	if a.root == "" {
		dir, err := defaultRoot()
		a.root = dir
		return err
	}
	dir, err := filepath.Abs(a.root)
	a.root = dir
	return err
}

// openStore opens the store once; one on a read-only file system for reading.
func (a *app) openStore(ctx context.Context) (*snapshot.Store, error) {
	if a.store != nil {
		return a.store, nil
	}
	if err := a.needStore(); err != nil {
		return nil, err
	}
	options, err := driverOptions(a.options)
	if err != nil {
		return nil, err
	}
	s, err := layerctl.Open(ctx, a.root, layerctl.Options{Volatile: a.volatile, DriverOptions: options})
	if errors.Is(err, syscall.EROFS) && a.storeExists() {
		a.readOnly = true
		s, err = layerctl.Open(ctx, a.root, layerctl.Options{ReadOnly: true})
	}
	if err != nil {
		return nil, err
	}
	a.store = s
	a.reportRecovery(s)
	return s, nil
}

// needStore refuses a root without a store to a verb that does not make one: a
// mistyped --root is no empty store.
func (a *app) needStore() error {
	if a.mayMake {
		return nil
	}
	entries, err := os.ReadDir(a.root)
	entries = slices.DeleteFunc(entries, func(e fs.DirEntry) bool { return e.Name() == "keeper" }) // what unshare leaves
	if err == nil && len(entries) > 0 || err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil // a store, or opening it says what is wrong with it
	}
	return hintf(fmt.Errorf("no store at %s: %w", a.root, errdefs.ErrNotFound),
		"is --root right? `layerctl import` and `layerctl load` make a store")
}

// reportRecovery says what a crash had left and opening has repaired.
func (a *app) reportRecovery(s *snapshot.Store) {
	if a.quiet {
		return
	}
	for _, f := range s.Recovered() {
		a.note("recovered: %v", f)
	}
}

// openView opens the program's view of the store, bound to --driver.
func (a *app) openView(ctx context.Context) (*snapshot.View, error) {
	s, err := a.openStore(ctx)
	if err != nil {
		return nil, err
	}
	return s.View(viewName, a.driver)
}

// openImages opens the image part of the store once.
func (a *app) openImages(ctx context.Context) (*image.Store, error) {
	if a.images != nil {
		return a.images, nil
	}
	if _, err := a.openStore(ctx); err != nil {
		return nil, err
	}
	s, err := image.Open(filepath.Join(a.root, "images"))
	a.images = s
	return s, err
}

// Close closes what is open. Idempotent.
func (a *app) Close() error {
	var err error
	if a.images != nil {
		err = a.images.Close()
	}
	if a.store != nil {
		err = errors.Join(err, a.store.Close())
	}
	a.images, a.store = nil, nil
	return err
}

// sayVolatile says out loud that nothing is flushed.
func (a *app) sayVolatile() {
	if a.volatile && !a.quiet {
		a.note("volatile: nothing is flushed; a power cut may lose what this command makes")
	}
}

// verbError wraps an error with the verb and its object, unless the error
// begins with them already.
func verbError(err error, words ...string) error {
	var status exitStatus
	if err == nil || errors.As(err, &status) || errors.As(err, &usageError{}) {
		return err
	}
	prefix := strings.Join(words, " ")
	if strings.HasPrefix(err.Error(), prefix+":") {
		return err
	}
	return fmt.Errorf("%s: %w", prefix, err)
}

// usagef refuses a command line.
func usagef(cmd *cobra.Command, format string, args ...any) error {
	return usageError{cmd, fmt.Errorf(cmd.Name()+": "+format+": %w", append(args, errdefs.ErrInvalidArgument)...)}
}
