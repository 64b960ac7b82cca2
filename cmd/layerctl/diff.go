package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/layer"
	"github.com/layerctl/layerctl/snapshot"
)

type tarOptions struct {
	output        string
	compress      string
	skipWhiteouts bool
}

func (o *tarOptions) flags(c *cobra.Command) {
	c.Flags().StringVarP(&o.output, "output", "o", "", "write a tar to a file, or to standard output (-)")
	c.Flags().StringVar(&o.compress, "compress", "", "none, gzip or zstd (default: by the file's suffix)")
	c.Flags().BoolVar(&o.skipWhiteouts, "skip-whiteout-names", false, "leave out names beginning with .wh. instead of refusing them")
	_ = c.RegisterFlagCompletionFunc("compress", cobra.FixedCompletions([]string{"none", "gzip", "zstd"}, cobra.ShellCompDirectiveNoFileComp))
}

func (a *app) diffCommand() *cobra.Command {
	var o tarOptions
	c := inNamespaces(nsEnter, &cobra.Command{
		Use: "diff NAME [OTHER]", Short: "Show what a snapshot changes, or what differs between two",
		Long: `Show what a snapshot changes in its parent, or what turns NAME into OTHER: A for
what is added, C for what is changed, D for what is deleted, in path order. With
--format json each change says in what: type, content, mode, owner, time, xattr,
rdev, hardlink. With -o the changes are written as an OCI layer tar, compressed by
the file's suffix (.gz, .zst) or --compress; its DiffID is printed.`,
		Args:              cobra.RangeArgs(1, 2),
		ValidArgsFunction: a.completeNames(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return verbError(a.diff(cmd.Context(), args, o), append([]string{"diff"}, args...)...)
		},
	})
	o.flags(c)
	return c
}

func (a *app) diff(ctx context.Context, args []string, o tarOptions) error {
	v, err := a.openView(ctx)
	if err != nil {
		return err
	}
	var keys []string
	for _, arg := range args {
		i, err := a.resolve(ctx, v, arg)
		if err != nil {
			return err
		}
		keys = append(keys, i.Name)
	}
	changes := a.changes(ctx, v, keys)
	if o.output != "" {
		return a.writeLayer(ctx, "diff", changes, o)
	}
	return a.showChanges(changes)
}

// changes is what the first key changes in its parent, or what turns it into
// the second.
func (a *app) changes(ctx context.Context, v *snapshot.View, keys []string) iter.Seq2[layer.Change, error] {
	if len(keys) == 2 {
		return v.Diff(ctx, keys[0], keys[1])
	}
	return v.Diff(ctx, "", keys[0])
}

// changeRow is a change as JSON shows it.
type changeRow struct {
	Kind    string            `json:"kind"`           // "A", "C" or "D"
	Path    string            `json:"path"`           // with a leading slash
	What    []string          `json:"what,omitempty"` // of a C: in what it differs
	Type    string            `json:"type,omitempty"` // of the new state, as all that follows
	Mode    string            `json:"mode,omitempty"` // octal
	UID     *uint32           `json:"uid,omitempty"`
	GID     *uint32           `json:"gid,omitempty"`
	Size    *int64            `json:"size,omitempty"`  // of a regular file
	MTime   string            `json:"mtime,omitempty"` // seconds since 1970 with nanoseconds
	Link    string            `json:"link,omitempty"`  // of a symlink
	Hard    string            `json:"hardlink,omitempty"`
	Device  string            `json:"device,omitempty"` // MAJOR:MINOR
	Xattrs  map[string]string `json:"xattrs,omitempty"`
	RawPath []byte            `json:"rawPath,omitempty"` // base64, where path is not UTF-8
}

func (a *app) showChanges(changes iter.Seq2[layer.Change, error]) error {
	p, err := newPrinter(a, a.changeTable())
	if err != nil {
		return err
	}
	for c, err := range changes {
		if err != nil {
			return err
		}
		if err := p.add(rowOf(&c)); err != nil {
			return err
		}
	}
	return p.close()
}

func (a *app) changeTable() table[changeRow] {
	on := colour(a.out)
	codes := map[string]string{"A": green, "C": yellow, "D": red}
	return table[changeRow]{
		plain: true,
		row: func(r changeRow) []string {
			return []string{paint(on, codes[r.Kind], r.Kind) + " " + printable(r.Path)}
		},
		name: func(r changeRow) string { return printable(r.Path) },
	}
}

// printable writes a path with control characters, which would end its line or
// do things to a terminal, in Go's escapes.
func printable(path string) string {
	if !strings.ContainsFunc(path, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return path
	}
	q := strconv.Quote(path)
	return q[1 : len(q)-1]
}

var typeNames = map[layer.FileType]string{
	layer.TypeFifo: "fifo", layer.TypeChar: "char", layer.TypeDir: "dir", layer.TypeBlock: "block",
	layer.TypeReg: "file", layer.TypeSymlink: "symlink", layer.TypeSocket: "socket",
}

func rowOf(c *layer.Change) changeRow {
	r := changeRow{Kind: c.Kind.String(), Path: absolute(c.Entry.Path), What: c.Aspects.Names()}
	if strings.ToValidUTF8(r.Path, "") != r.Path {
		r.RawPath = []byte(r.Path)
	}
	if c.Kind == layer.Deleted {
		return r
	}
	e := &c.Entry
	r.Type, r.Hard = typeNames[e.Type], ""
	if e.Hardlink != "" {
		r.Hard = absolute(e.Hardlink)
	}
	r.Mode, r.Link, r.Xattrs = fmt.Sprintf("%04o", e.Mode), e.Linkname, e.Xattrs
	uid, gid, size := e.UID, e.GID, e.Size
	r.UID, r.GID = &uid, &gid
	r.MTime = fmt.Sprintf("%d.%09d", e.ModTime.Sec, e.ModTime.Nsec)
	switch e.Type {
	case layer.TypeReg:
		r.Size = &size
	case layer.TypeChar, layer.TypeBlock:
		r.Device = fmt.Sprintf("%d:%d", e.Major, e.Minor)
	}
	return r
}

// absolute writes a path of a tree with a leading slash.
func absolute(path string) string {
	if path == "." {
		return "/"
	}
	return "/" + path
}

// writeLayer writes changes as a tar where o says, and prints its DiffID.
func (a *app) writeLayer(ctx context.Context, verb string, changes iter.Seq2[layer.Change, error], o tarOptions) (err error) {
	comp, err := o.compression()
	if err != nil {
		return err
	}
	out, err := a.openOutput(o.output)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.finish(err == nil, a.volatile)) }()
	cw, err := layer.NewCompressor(out, comp)
	if err != nil {
		return err
	}
	left := &leftOut{}
	p := a.startProgress(verb, 0)
	defer p.Stop()
	r, err := layer.WriteTar(ctx, cw, changes, layer.TarOptions{
		Epoch: sourceDateEpoch(), SkipWhiteoutNames: o.skipWhiteouts, Skipped: left.add, Progress: p.Set,
	})
	if cerr := cw.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	p.Stop()
	left.say(a)
	return a.sayWritten(o.output, r)
}

// tarRow is what is printed of a tar that was written.
type tarRow struct {
	Path    string `json:"path"`
	DiffID  string `json:"diffID"`
	Size    int64  `json:"size"` // uncompressed bytes
	Entries int64  `json:"entries"`
	Skipped int64  `json:"skipped"`
}

// sayWritten prints the DiffID, unless the tar itself is on standard output.
func (a *app) sayWritten(path string, r layer.TarResult) error {
	row := tarRow{path, r.DiffID.String(), r.Size, r.Entries, r.Skipped}
	if path == "-" {
		if !a.quiet {
			a.note("%s, %s, %s", row.DiffID, counted(row.Entries, "entry", "entries"), humanBytes(row.Size))
		}
		return nil
	}
	if a.format != "table" {
		return a.showOne(row)
	}
	if !a.quiet {
		a.note("%s: %s, %s uncompressed", path, counted(row.Entries, "entry", "entries"), humanBytes(row.Size))
	}
	_, err := fmt.Fprintln(a.out, row.DiffID)
	return err
}

// sourceDateEpoch dates what has no time of its own (reproducible-builds.org);
// 0 where it is not set.
func sourceDateEpoch() int64 {
	n, err := strconv.ParseInt(os.Getenv("SOURCE_DATE_EPOCH"), 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// epochTime is sourceDateEpoch as a time; zero where it is not set.
func epochTime() time.Time {
	if n := sourceDateEpoch(); n != 0 {
		return time.Unix(n, 0).UTC()
	}
	return time.Time{}
}

// compression is --compress, or what the suffix of the file says.
func (o *tarOptions) compression() (layer.Compression, error) {
	switch o.compress {
	case "none", "gzip", "zstd":
		return layer.Compression(o.compress), nil
	case "":
		switch filepath.Ext(o.output) {
		case ".gz", ".tgz":
			return "gzip", nil
		case ".zst", ".zstd", ".tzst":
			return "zstd", nil
		}
		return "none", nil
	}
	return "", fmt.Errorf("--compress %q: not one of none, gzip, zstd: %w", o.compress, errdefs.ErrInvalidArgument)
}

// output is a file being written, or standard output. A file appears under its
// name when it is whole.
type output struct {
	io.Writer
	f    *os.File // nil for standard output
	path string
}

func (a *app) openOutput(path string) (*output, error) {
	if path == "-" {
		if isTerminal(a.out) {
			return nil, hintf(fmt.Errorf("standard output is a terminal: %w", errdefs.ErrInvalidArgument), "redirect it, or use -o FILE")
		}
		return &output{Writer: a.out}, nil
	}
	if st, err := os.Stat(path); err == nil && !st.Mode().IsRegular() {
		if st.IsDir() {
			return nil, fmt.Errorf("%s is a directory: %w", path, errdefs.ErrInvalidArgument)
		}
		f, err := os.OpenFile(path, os.O_WRONLY, 0) // a device or a pipe
		return &output{Writer: f, f: f}, err
	}
	tmp := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+"."+rand.Text()[:8])
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
	if err != nil {
		return nil, err
	}
	return &output{Writer: f, f: f, path: path}, nil
}

// finish publishes the file if all went well, and removes it else: data, then
// the name, then the directory.
func (o *output) finish(ok, volatile bool) error {
	if o.f == nil {
		return nil
	}
	if o.path == "" {
		return o.f.Close()
	}
	var err error
	if ok && !volatile {
		err = o.f.Sync()
	}
	if cerr := o.f.Close(); err == nil {
		err = cerr
	}
	if !ok || err != nil {
		return errors.Join(err, os.Remove(o.f.Name()))
	}
	if err := os.Rename(o.f.Name(), o.path); err != nil || volatile {
		return err
	}
	dir, err := sys.OpenDir(filepath.Dir(o.path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}
