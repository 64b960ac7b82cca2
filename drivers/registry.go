package drivers

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/kprobe"
)

// Config is what a Factory opens a driver with.
type Config struct {
	// Root is the driver's own directory; Open makes it (mode 0700) if its parent
	// exists. One process's drivers never share a Root, several processes may.
	Root string
	// Options are the driver's documented options (Factory.Options), by name.
	// An unknown name or bad value wraps ErrInvalidArgument and names it.
	Options map[string]string
}

// Option documents one driver option.
type Option struct{ Name, Default, Help string }

// CheckOptions refuses names that are not among known; ErrInvalidArgument names
// the unknown one and those there are.
func CheckOptions(known []Option, given map[string]string) error {
	var names []string
	for _, o := range known {
		names = append(names, o.Name)
	}
	for _, name := range slices.Sorted(maps.Keys(given)) {
		if !slices.Contains(names, name) {
			return fmt.Errorf("option %q: %w (known: %s)", name, errdefs.ErrInvalidArgument, strings.Join(names, ", "))
		}
	}
	return nil
}

// Probe is what a Factory found out about a directory.
type Probe struct {
	// Works has three answers; Unknown means that trying failed for a reason that
	// says nothing about the kernel, and Reason tells it.
	Works kprobe.Answer
	// Reason says in words why not, or how well ("overlay with userxattr"): the
	// missing feature, the first kernel that has it, what to do.
	Reason string
	// Features are the single probes behind the answer, for `layerctl info`.
	Features []kprobe.Result
}

// Factory makes one kind of driver.
type Factory struct {
	Name    string // short noun: "overlay"
	Summary string // one line for help and info
	Options []Option
	// Probe tries, in a scratch directory under dir that it removes, whether the
	// driver would work there for this process. dir exists.
	Probe func(ctx context.Context, dir string) Probe
	// Open opens or makes the driver's storage at c.Root.
	Open func(ctx context.Context, c Config) (Driver, error)
	// Examine, if not nil, says more of storage that Open refuses; see Examiner. It
	// repairs nothing.
	Examine func(ctx context.Context, c Config, o ExamineOptions) ([]Finding, error)
}

// Registry is an ordered list of factories, best first. The zero value is empty.
type Registry struct{ factories []Factory }

// NewRegistry returns a registry of the given factories, best first. It panics
// if two have one name: that is a mistake in the program.
func NewRegistry(fs ...Factory) *Registry {
	seen := map[string]bool{}
	for _, f := range fs {
		if seen[f.Name] {
			panic("drivers: two factories named " + f.Name)
		}
		seen[f.Name] = true
	}
	return &Registry{factories: fs}
}

// Factories returns the factories, best first.
func (r *Registry) Factories() []Factory { return append([]Factory(nil), r.factories...) }

// Lookup returns the factory called name; ErrNotFound names those there are.
func (r *Registry) Lookup(name string) (Factory, error) {
	var names []string
	for _, f := range r.factories {
		if f.Name == name {
			return f, nil
		}
		names = append(names, f.Name)
	}
	return Factory{}, fmt.Errorf("driver %q: %w (known: %s)", name, errdefs.ErrNotFound, strings.Join(names, ", "))
}

// Choice is the outcome of Best: the factory taken and what every better one
// answered.
type Choice struct {
	Factory Factory
	Probe   Probe
	Passed  map[string]Probe // the better factories that do not work here, by name
}

// Best returns the first factory that works in dir, and why the better ones do
// not. ErrUnavailable, with every reason, if none does.
func (r *Registry) Best(ctx context.Context, dir string) (Choice, error) {
	c := Choice{Passed: map[string]Probe{}}
	var reasons []error
	for _, f := range r.factories {
		if err := ctx.Err(); err != nil {
			return Choice{}, err
		}
		p := f.Probe(ctx, dir)
		if p.Works == kprobe.Yes {
			c.Factory, c.Probe = f, p
			return c, nil
		}
		c.Passed[f.Name] = p
		reasons = append(reasons, fmt.Errorf("%s: %s", f.Name, p.Reason))
	}
	return Choice{}, fmt.Errorf("no driver works in %s: %w: %w", dir, errdefs.ErrUnavailable, errors.Join(reasons...))
}
