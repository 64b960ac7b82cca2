package main

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/layerctl/layerctl/internal/sys"
)

type usageOptions struct {
	sync  bool
	quota string
}

func (a *app) usageCommand() *cobra.Command {
	var o usageOptions
	c := inNamespaces(nsEnter, &cobra.Command{
		Use: "usage [NAME]...", Short: "Show what snapshots hold on disk", Aliases: []string{"df"},
		Long: `Show what snapshots hold themselves and with all below them, in allocated bytes.
Without a name, the parts of the whole store and what is free.

On btrfs the figures of a writable snapshot are those of the last transaction: up to
half a minute old. --sync flushes first. With --enable-quota the file system counts
for each subvolume, metadata, too, and snapshots can have a quota. That is a setting
of the whole file system, costs every writer something, and stays until "btrfs quota
disable": qgroups work everywhere; simple quotas cost less, and kernels before 6.7 do
not mount a file system that has them.`,
		ValidArgsFunction: a.completeNames(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			err := a.prepareUsage(cmd.Context(), o)
			if err == nil && len(args) == 0 {
				err = a.df(cmd.Context())
			} else if err == nil {
				err = a.usage(cmd.Context(), args)
			}
			return verbError(err, "usage")
		},
	})
	c.Flags().BoolVar(&o.sync, "sync", false, "flush first, where figures lag behind (btrfs)")
	c.Flags().StringVar(&o.quota, "enable-quota", "", "switch on the accounting that quotas need, for the whole file system (btrfs): qgroups or simple")
	c.Flags().Lookup("enable-quota").NoOptDefVal = "qgroups"
	return c
}

func (a *app) prepareUsage(ctx context.Context, o usageOptions) error {
	if !o.sync && o.quota == "" {
		return nil
	}
	v, err := a.openView(ctx)
	if err == nil && o.quota != "" {
		err = v.Store().EnableQuota(ctx, a.driver, o.quota)
	}
	if err == nil && o.sync {
		err = v.Store().SyncUsage(ctx)
	}
	return err
}

// usageRow is a line of usage NAME.
type usageRow struct {
	Name   string `json:"name"`
	Driver string `json:"driver"`
	Size   int64  `json:"size"` // bytes allocated by itself; -1: not known
	Inodes int64  `json:"inodes"`
	Total  int64  `json:"total"`  // with all below it; -1: not known of all
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
		u.Total = sumKnown(u.Total, r.Size)
		u.Layers++
	}
	return u
}

// sumKnown adds sizes; -1, not known, if one is not.
func sumKnown(a, b int64) int64 {
	if a < 0 || b < 0 {
		return -1
	}
	return a + b
}

// dfRow is a line of df: a part of the store.
type dfRow struct {
	Part  string `json:"part"`
	Items int64  `json:"items"`
	Size  int64  `json:"size"` // bytes allocated; -1: not known of all
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
		row.Size = sumKnown(row.Size, r.Size)
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
