package main

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/layerctl/layerctl/internal/sys"
)

func (a *app) usageCommand() *cobra.Command {
	return inNamespaces(nsEnter, &cobra.Command{
		Use: "usage [NAME]...", Short: "Show what snapshots hold on disk", Aliases: []string{"df"},
		Long: `Show what snapshots hold themselves and with all below them, in allocated bytes.
Without a name, the parts of the whole store and what is free.`,
		ValidArgsFunction: a.completeNames(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return verbError(a.df(cmd.Context()), "usage")
			}
			return verbError(a.usage(cmd.Context(), args), "usage")
		},
	})
}

// usageRow is a line of usage NAME.
type usageRow struct {
	Name   string `json:"name"`
	Driver string `json:"driver"`
	Size   int64  `json:"size"` // bytes allocated by itself; -1: not known
	Inodes int64  `json:"inodes"`
	Total  int64  `json:"total"`  // with all below it
	Layers int    `json:"layers"` // itself and all below it
}

func (a *app) usage(ctx context.Context, names []string) error {
	v, err := a.openView(ctx)
	if err != nil {
		return err
	}
	records, err := v.Records(ctx)
	if err != nil {
		return err
	}
	rows := map[string]lsRow{}
	for _, r := range records {
		if rows[r.Key], err = rowOfRecord(ctx, v, r); err != nil {
			return err
		}
	}
	var list []usageRow
	for _, name := range names {
		info, err := a.resolve(ctx, v, name)
		if err != nil {
			return verbError(err, name)
		}
		list = append(list, usageOf(rows, info.Name))
	}
	return show(a, list, table[usageRow]{
		head: []string{"NAME", "DRIVER", "SIZE", "INODES", "TOTAL", "LAYERS"},
		row: func(r usageRow) []string {
			return []string{shortName(r.Name), r.Driver, humanBytes(r.Size), humanCount(r.Inodes), humanBytes(r.Total), humanCount(int64(r.Layers))}
		},
	})
}

func usageOf(rows map[string]lsRow, key string) usageRow {
	r := rows[key]
	u := usageRow{Name: key, Driver: r.Driver, Size: r.Size, Inodes: r.Inodes}
	for ok := true; ok; r, ok = rows[r.Parent] {
		u.Total += max(r.Size, 0)
		u.Layers++
	}
	return u
}

// dfRow is a line of df: a part of the store.
type dfRow struct {
	Part  string `json:"part"`
	Items int64  `json:"items"`
	Size  int64  `json:"size"` // bytes allocated
}

func (a *app) df(ctx context.Context) error {
	rows := []dfRow{}
	if a.storeThere() {
		parts, err := a.parts(ctx)
		if err != nil {
			return err
		}
		rows = parts
	}
	st, err := sys.StatfsPath(existing(a.root))
	if err != nil {
		return err
	}
	rows = append(rows, dfRow{Part: "free", Size: int64(st.BlocksUser) * st.BlockSize})
	return show(a, rows, table[dfRow]{
		head: []string{"PART", "ITEMS", "SIZE"},
		row: func(r dfRow) []string {
			items := ""
			if r.Part != "free" {
				items = humanCount(r.Items)
			}
			return []string{r.Part, items, humanBytes(r.Size)}
		},
	})
}

// parts sums snapshots by driver, and the files beside them.
func (a *app) parts(ctx context.Context) ([]dfRow, error) {
	rows, err := a.snapshotRows(ctx)
	if err != nil {
		return nil, err
	}
	var list []dfRow
	at := map[string]int{}
	for _, r := range rows {
		if _, ok := at[r.Driver]; !ok {
			at[r.Driver] = len(list)
			list = append(list, dfRow{Part: "snapshots (" + r.Driver + ")"})
		}
		row := &list[at[r.Driver]]
		row.Items++
		row.Size += max(r.Size, 0)
	}
	for _, p := range []struct{ part, dir string }{{"image blobs", "images/blobs"}, {"listings", "listings"}, {"records", "db.bolt"}} {
		row := dfRow{Part: p.part}
		if row.Items, row.Size, err = diskUsage(filepath.Join(a.root, p.dir)); err != nil {
			return nil, err
		}
		list = append(list, row)
	}
	return list, nil
}

// diskUsage counts the regular files below a path and their allocated bytes.
func diskUsage(path string) (files, bytes int64, err error) {
	err = filepath.WalkDir(path, func(p string, d fs.DirEntry, err error) error {
		if os.IsNotExist(err) {
			return nil
		}
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		st, err := sys.LstatPath(p)
		if os.IsNotExist(err) {
			return nil
		}
		files++
		bytes += st.Blocks * 512
		return err
	})
	return files, bytes, err
}
