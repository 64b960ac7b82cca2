package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/layerctl/layerctl"
	"github.com/layerctl/layerctl/internal/kprobe"
	"github.com/layerctl/layerctl/internal/userns"
	"github.com/layerctl/layerctl/snapshot"
)

// infoReport is what info says.
type infoReport struct {
	Version string       `json:"version"`
	Root    string       `json:"root"`
	Exists  bool         `json:"exists"` // a store is there
	Kernel  string       `json:"kernel"`
	User    string       `json:"user"`             // "root", or how an ordinary user works
	Default string       `json:"default"`          // the driver of new snapshots; "" if none works
	Drivers []driverInfo `json:"drivers"`          // best first
	Images  int          `json:"images,omitempty"` // in the store
}

type driverInfo struct {
	Name     string          `json:"name"`
	Summary  string          `json:"summary"`
	Works    kprobe.Answer   `json:"works"`
	Reason   string          `json:"reason"`
	Layers   int64           `json:"layers"`
	Lost     []string        `json:"lost,omitempty"` // what it cannot store for this user
	Features []kprobe.Result `json:"features,omitempty"`
}

func (a *app) infoCommand() *cobra.Command {
	return inNamespaces(nsEnter, &cobra.Command{
		Use: "info", Short: "Show the drivers, which work here, and why not", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, err := a.info(cmd.Context())
			if err != nil {
				return verbError(err, "info")
			}
			if a.format == "table" {
				return a.printInfo(r)
			}
			return a.showOne(r)
		},
	})
}

func (a *app) info(ctx context.Context) (infoReport, error) {
	r := infoReport{Version: versionString(), Root: a.root, Exists: a.storeExists(), Kernel: kernelRelease(), User: "root"}
	if userns.Inside() {
		r.User = "ordinary, in a user namespace of " + userns.Mapping()
	} else if userns.Ordinary() {
		r.User = "ordinary, without a user namespace"
	}
	var err error
	if r.Exists {
		err = a.infoOfStore(ctx, &r)
	} else {
		err = a.infoOfPlace(ctx, &r)
	}
	return r, err
}

// infoOfStore asks the store, which knows how many layers each driver keeps.
func (a *app) infoOfStore(ctx context.Context, r *infoReport) error {
	s, err := a.openStore(ctx)
	if err != nil {
		return err
	}
	infos, err := s.Drivers(ctx)
	if err != nil {
		return err
	}
	for _, i := range infos {
		r.Drivers = append(r.Drivers, describeDriver(i))
		if i.Default || r.Default == "" && i.Probe.Works == kprobe.Yes {
			r.Default = i.Name
		}
	}
	r.Images = len(a.imageNames(ctx))
	return nil
}

func describeDriver(i snapshot.DriverInfo) driverInfo {
	d := driverInfo{Name: i.Name, Summary: i.Summary, Works: i.Probe.Works, Reason: i.Probe.Reason, Layers: i.Layers, Features: i.Probe.Features}
	if i.Capabilities != nil {
		d.Lost = i.Capabilities.Lost
	}
	return d
}

// infoOfPlace probes where the store would be, in a directory that it removes.
func (a *app) infoOfPlace(ctx context.Context, r *infoReport) error {
	dir, err := os.MkdirTemp(existing(a.root), ".layerctl-info-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	for _, f := range layerctl.Drivers().Factories() {
		p := f.Probe(ctx, dir)
		r.Drivers = append(r.Drivers, driverInfo{Name: f.Name, Summary: f.Summary, Works: p.Works, Reason: p.Reason, Features: p.Features})
		if r.Default == "" && p.Works == kprobe.Yes {
			r.Default = f.Name
		}
	}
	return ctx.Err()
}

// existing returns the nearest directory above path that is there.
func existing(path string) string {
	for {
		if st, err := os.Stat(path); err == nil && st.IsDir() {
			return path
		}
		if path == "/" {
			return path
		}
		path = filepath.Dir(path)
	}
}

func kernelRelease() string {
	b, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	return strings.TrimSpace(string(b))
}

func (a *app) printInfo(r infoReport) error {
	w := tabwriter.NewWriter(a.out, 0, 8, 2, ' ', 0)
	place := r.Root
	if !r.Exists {
		place += " (no store yet)"
	}
	fmt.Fprintf(w, "layerctl\t%s\nstore\t%s\nkernel\t%s\nuser\t%s\n", r.Version, place, r.Kernel, r.User)
	if r.Default == "" {
		fmt.Fprintf(w, "default driver\tnone works here\n")
	} else {
		fmt.Fprintf(w, "default driver\t%s\n", r.Default)
	}
	for _, d := range r.Drivers {
		fmt.Fprintf(w, "\ndriver %s\t%s\n  works\t%v: %s\n  layers\t%d\n", d.Name, d.Summary, d.Works, d.Reason, d.Layers)
		for _, l := range d.Lost {
			fmt.Fprintf(w, "  not kept\t%s\n", l)
		}
		for _, f := range d.Features {
			fmt.Fprintf(w, "  %s\t%v", f.Feature, f.Answer)
			if f.Detail != "" {
				fmt.Fprintf(w, ": %s", f.Detail)
			}
			fmt.Fprintln(w)
		}
	}
	return w.Flush()
}
