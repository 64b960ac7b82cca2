package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/layerctl/layerctl/snapshot"
)

type migrateOptions struct {
	to                            string
	all, related, dryRun, callOff bool
}

func (a *app) migrateCommand() *cobra.Command {
	var o migrateOptions
	c := inNamespaces(nsDrop, &cobra.Command{
		Use: "migrate --to DRIVER {NAME... | --all}", Short: "Move snapshots to another driver",
		Long: `Move snapshots, committed or writable, to another driver, with all that they lie on.
Names, parents, labels, images and tree digests stay. Each copy is compared with its
original before any name changes, and all names change at once; then the old bytes are
removed. One driver keeps all that is built on one base, so what else is built on it is
named, and goes along with --related.

A migration that is interrupted has changed nothing. Run it again, and it goes on with
what it had copied; --call-off gives that up. A writable snapshot must not be
mounted; a read-only mount may stay, and the old bytes with it until it is gone. Sockets
are in no layer: they are left out, and named.`,
		ValidArgsFunction: a.completeNames(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := o.check(cmd, args); err != nil {
				return err
			}
			if o.callOff {
				return verbError(a.callOffMigration(cmd.Context()), "migrate")
			}
			return verbError(a.migrate(cmd.Context(), args, o), "migrate")
		},
	})
	c.Flags().StringVar(&o.to, "to", "", "the driver that is to keep them")
	c.Flags().BoolVar(&o.all, "all", false, "every snapshot")
	c.Flags().BoolVar(&o.related, "related", false, "also what else is built on what they lie on")
	c.Flags().BoolVarP(&o.dryRun, "dry-run", "n", false, "only say what would be moved, and what it takes")
	c.Flags().BoolVar(&o.callOff, "call-off", false, "remove what an interrupted migration has copied")
	_ = c.RegisterFlagCompletionFunc("to", a.completeDrivers)
	return c
}

func (o *migrateOptions) check(cmd *cobra.Command, args []string) error {
	switch {
	case o.callOff && (o.to != "" || o.all || o.related || o.dryRun || len(args) > 0):
		return usagef(cmd, "--call-off stands alone")
	case o.callOff:
		return nil
	case o.to == "":
		return usagef(cmd, "--to says which driver")
	case len(args) == 0 && !o.all:
		return usagef(cmd, "name snapshots, or give --all")
	case len(args) > 0 && o.all:
		return usagef(cmd, "--all needs no names")
	}
	return nil
}

// migrateRow is what migrate did with a snapshot.
type migrateRow struct {
	Name    string   `json:"name"`
	Kind    string   `json:"kind"`
	From    string   `json:"from"`
	To      string   `json:"to"`
	State   string   `json:"state"` // moved, copied before, there; with --dry-run what would be
	Size    int64    `json:"size"`  // by the new driver; with --dry-run by the old one
	Sockets []string `json:"sockets,omitempty"`
	DryRun  bool     `json:"dryRun"`
}

func (a *app) migrate(ctx context.Context, names []string, o migrateOptions) error {
	v, err := a.openSwept(ctx)
	if err != nil {
		return err
	}
	var keys []string
	for _, name := range names {
		info, err := a.resolve(ctx, v, name)
		if err != nil {
			return verbError(err, name)
		}
		keys = append(keys, info.Name)
	}
	a.sayVolatile()
	p := a.startSteps("migrate")
	defer p.Stop()
	r, err := v.Migrate(ctx, keys, snapshot.MigrateOptions{To: o.to, Related: o.related, DryRun: o.dryRun, Progress: func(g snapshot.MigrateProgress) {
		p.Step(g.Key, int64(g.Done), int64(g.Total))
	}})
	p.Stop()
	if err != nil {
		return migrateHint(err)
	}
	if err := a.showMigrated(r, o); err != nil || o.dryRun {
		return err
	}
	return v.Cleanup(ctx)
}

// migrateHint says what to do where that is not in the error.
func migrateHint(err error) error {
	switch {
	case errdefs.IsFailedPrecondition(err) && strings.Contains(err.Error(), "go along"):
		return hintf(err, "--related takes them along")
	case errdefs.IsFailedPrecondition(err) && strings.Contains(err.Error(), "mounted at"):
		return hintf(err, "`layerctl umount` it first")
	case errdefs.IsResourceExhausted(err):
		return hintf(err, "make room and run it again: it goes on with what it has copied; or give that up with --call-off")
	}
	return err
}

func (a *app) showMigrated(r snapshot.MigrateReport, o migrateOptions) error {
	rows := []migrateRow{}
	for _, s := range r.Snapshots {
		rows = append(rows, migrateRow{s.Key, strings.ToLower(s.Kind.String()), s.From, o.to, s.State, s.Bytes, s.Sockets, o.dryRun})
		if len(s.Sockets) > 0 && !a.quiet {
			a.note("migrate: %s: left out, being sockets: %s", s.Key, strings.Join(s.Sockets, ", "))
		}
	}
	if o.dryRun && !a.quiet {
		a.note("migrate: the copies take about %s, %s are free", humanBytes(r.Needed), humanBytes(r.Free))
	}
	return show(a, rows, table[migrateRow]{
		head: []string{"NAME", "KIND", "FROM", "TO", "STATE", "SIZE"},
		row: func(r migrateRow) []string {
			return []string{shortName(r.Name), r.Kind, r.From, r.To, r.State, humanBytes(r.Size)}
		},
		name: func(r migrateRow) string { return r.Name },
	})
}

func (a *app) callOffMigration(ctx context.Context) error {
	v, err := a.openSwept(ctx)
	if err != nil {
		return err
	}
	n, err := v.Store().CallOffMigration(ctx)
	if err != nil {
		return err
	}
	if err := v.Cleanup(ctx); err != nil {
		return err
	}
	if !a.quiet {
		_, err = fmt.Fprintf(a.out, "%s removed\n", counted(n, "copy", "copies"))
	}
	return err
}
