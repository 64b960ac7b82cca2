package main

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/spf13/cobra"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/snapshot"
)

func (a *app) lsCommand() *cobra.Command {
	return inNamespaces(nsEnter, &cobra.Command{
		Use: "ls", Short: "List the snapshots as a tree", Aliases: []string{"list"}, Args: cobra.NoArgs,
		Long: `List the snapshots, each below its parent, with kind, driver, the size of what it
holds itself, images that are made of it, and where it is mounted.`,
		RunE: func(cmd *cobra.Command, _ []string) error { return verbError(a.ls(cmd.Context()), "ls") },
	})
}

// lsRow is a line of ls.
type lsRow struct {
	Name    string            `json:"name"`
	Kind    string            `json:"kind"` // "active", "view" or "committed"
	Parent  string            `json:"parent,omitempty"`
	Driver  string            `json:"driver"`
	Size    int64             `json:"size"` // bytes allocated, parents excluded; -1: not known
	Inodes  int64             `json:"inodes"`
	Created time.Time         `json:"created"`
	Digest  string            `json:"treeDigest,omitempty"`
	Images  []string          `json:"images,omitempty"`
	Mounted []string          `json:"mounted,omitempty"`
	Labels  map[string]string `json:"labels,omitempty"`

	branch   string // the picture before the name
	halfMade bool   // nobody is to see it
}

func (a *app) ls(ctx context.Context) error {
	rows := []lsRow{}
	if a.storeThere() {
		var err error
		if rows, err = a.snapshotRows(ctx); err != nil {
			return err
		}
		rows = slices.DeleteFunc(rows, func(r lsRow) bool { return r.halfMade })
	}
	on := colour(a.out)
	return show(a, rows, table[lsRow]{
		head: []string{"NAME", "KIND", "DRIVER", "SIZE", "IMAGE", "MOUNTED ON"},
		row: func(r lsRow) []string {
			name := r.branch + shortName(r.Name)
			if r.Kind == "active" {
				name = r.branch + paint(on, bold, shortName(r.Name))
			}
			return []string{name, r.Kind, r.Driver, humanBytes(r.Size), orDash(r.Images), strings.Join(r.Mounted, " ")}
		},
		name: func(r lsRow) string { return r.Name },
	})
}

func orDash(words []string) string {
	if len(words) == 0 {
		return "-"
	}
	return strings.Join(words, " ")
}

// snapshotRows reads everything and orders it as a tree.
func (a *app) snapshotRows(ctx context.Context) ([]lsRow, error) {
	v, err := a.openSwept(ctx)
	if err != nil {
		return nil, err
	}
	records, err := v.Records(ctx)
	if err != nil {
		return nil, err
	}
	mounted, err := v.Store().Mounted(ctx)
	if err != nil {
		return nil, err
	}
	images := a.imagesByKey(ctx)
	var rows []lsRow
	for _, r := range records {
		row, err := rowOfRecord(ctx, v, r)
		if err != nil {
			return nil, err
		}
		row.Images, row.halfMade = images[r.Key], halfMade(r.Kind, r.Labels)
		for _, m := range mounted {
			if m.View == v.Name() && m.Key == r.Key {
				row.Mounted = append(row.Mounted, m.Target)
			}
		}
		rows = append(rows, row)
	}
	return treeOrder(rows), nil
}

func rowOfRecord(ctx context.Context, v *snapshot.View, r snapshot.Record) (lsRow, error) {
	row := lsRow{
		Name: r.Key, Kind: strings.ToLower(r.Kind.String()), Parent: r.Parent, Driver: r.Driver,
		Size: r.Usage.Bytes, Inodes: r.Usage.Inodes, Created: r.Created, Digest: r.TreeDigest.String(), Labels: r.Labels,
	}
	if r.Kind == snapshots.KindCommitted {
		return row, nil
	}
	// Who unpacks to it or freezes it has it for itself, maybe for long: a list
	// does not wait.
	short, cancel := context.WithTimeout(ctx, usagePatience)
	defer cancel()
	u, err := v.UsageKnown(short, r.Key)
	if err != nil && short.Err() != nil && ctx.Err() == nil {
		u, err = drivers.Usage{Bytes: -1, Inodes: -1}, nil
	}
	row.Size, row.Inodes = u.Bytes, u.Inodes
	return row, err
}

// usagePatience is how long a list waits for the usage of a writable snapshot.
const usagePatience = 500 * time.Millisecond

// treeOrder puts each row below its parent and draws the branches. Rows come
// sorted by name, and stay so among siblings.
func treeOrder(rows []lsRow) []lsRow {
	below := map[string][]lsRow{}
	known := map[string]bool{}
	for _, r := range rows {
		known[r.Name] = true
	}
	for _, r := range rows {
		parent := r.Parent
		if !known[parent] {
			parent = "" // a parent that another view holds
		}
		below[parent] = append(below[parent], r)
	}
	ordered := make([]lsRow, 0, len(rows))
	var add func(parent, indent string)
	add = func(parent, indent string) {
		children := below[parent]
		for i, r := range children {
			tee, below := "├─ ", "│  "
			switch {
			case parent == "":
				tee, below = "", ""
			case i == len(children)-1:
				tee, below = "└─ ", "   "
			}
			r.branch = indent + tee
			ordered = append(ordered, r)
			add(r.Name, indent+below)
		}
	}
	add("", "")
	return ordered
}

// imagesByKey names the images that are made of a snapshot, by its key.
func (a *app) imagesByKey(ctx context.Context) map[string][]string {
	keys := map[string][]string{}
	for _, name := range a.imageNames(ctx) {
		if key, err := a.imageKey(ctx, name); err == nil {
			keys[key] = append(keys[key], name)
		}
	}
	for k := range keys {
		slices.Sort(keys[k])
	}
	return keys
}
