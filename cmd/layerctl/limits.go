package main

import (
	"errors"
	"fmt"
	"math"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/layerctl/layerctl/layer"
)

// limitFlag is --limit: NAME=N sets one field of layer.Limits.
type limitFlag struct{ lim *layer.Limits }

// limitFields are the names of --limit, in the order of the help. The field that
// a layer.LimitError names is the name without "-", whatever its case.
var limitFields = []struct {
	name string
	set  func(l *layer.Limits, n int64)
}{
	{"entries", func(l *layer.Limits, n int64) { l.Entries = n }},
	{"depth", func(l *layer.Limits, n int64) { l.Depth = int(n) }},
	{"path-bytes", func(l *layer.Limits, n int64) { l.PathBytes = int(n) }},
	{"file-size", func(l *layer.Limits, n int64) { l.FileSize = n }},
	{"size", func(l *layer.Limits, n int64) { l.Size = n }},
	{"xattr-size", func(l *layer.Limits, n int64) { l.XattrSize = int(n) }},
	{"xattrs", func(l *layer.Limits, n int64) { l.Xattrs = int(n) }},
	{"sparse", func(l *layer.Limits, n int64) { l.Sparse = n }},
	{"window", func(l *layer.Limits, n int64) { l.Window = n }},
}

func (f limitFlag) String() string { return "" }
func (f limitFlag) Type() string   { return "NAME=N" }

func (f limitFlag) Set(s string) error {
	name, value, _ := strings.Cut(s, "=")
	n, err := parseCount(value)
	if err != nil {
		return err
	}
	for _, field := range limitFields {
		if field.name == name {
			field.set(f.lim, n)
			return nil
		}
	}
	return fmt.Errorf("no limit %q; there are: %s", name, strings.Join(limitNames(), ", "))
}

func limitNames() []string {
	var names []string
	for _, f := range limitFields {
		names = append(names, f.name)
	}
	return names
}

// parseCount reads a number above zero with K, M, G or T (powers of 1024) after
// it, or -1 for no limit.
func parseCount(s string) (int64, error) {
	if s == "-1" {
		return -1, nil
	}
	number, unit := s, int64(1)
	if i := strings.IndexAny(s, "KMGT"); i >= 0 && i == len(s)-1 {
		number, unit = s[:i], 1<<(10*(1+strings.IndexByte("KMGT", s[i])))
	}
	n, err := strconv.ParseInt(number, 10, 64)
	if err != nil || n <= 0 || n > math.MaxInt64/unit {
		return 0, fmt.Errorf("%q is no number above 0, with K, M, G or T after it or not, and not -1 (no limit)", s)
	}
	return n * unit, nil
}

// heap is what verbs that unpack layers keep the runtime to, in bytes: with the
// program's own pages the process stays below 64 MiB.
const heap = 48 << 20

// limited gives a verb that reads layers --limit, and bounds its memory unless
// GOMEMLIMIT does.
func (a *app) limited(c *cobra.Command) *cobra.Command {
	c.Flags().Var(limitFlag{&a.limits}, "limit", "raise a limit of what a layer may ask for, -1 is none: "+strings.Join(limitNames(), ", "))
	names := make([]string, 0, len(limitFields))
	for _, n := range limitNames() {
		names = append(names, n+"=")
	}
	_ = c.RegisterFlagCompletionFunc("limit", cobra.FixedCompletions(names, cobra.ShellCompDirectiveNoSpace|cobra.ShellCompDirectiveNoFileComp))
	c.PreRun = func(*cobra.Command, []string) {
		if debug.SetMemoryLimit(-1) == math.MaxInt64 {
			debug.SetMemoryLimit(heap + max(a.limits.Window, 0))
		}
	}
	return c
}

// limitHint says which --limit lifts a refusal; "" where none does.
func limitHint(err error) string {
	var le *layer.LimitError
	if !errors.As(err, &le) {
		return ""
	}
	i := slices.IndexFunc(limitNames(), func(n string) bool {
		return strings.EqualFold(strings.ReplaceAll(n, "-", ""), le.Limit)
	})
	if i < 0 {
		return ""
	}
	n := "N"
	if le.N > 0 {
		n = strconv.FormatInt(le.N, 10)
	}
	return fmt.Sprintf("--limit %s=%s lets it through, if you trust where it comes from", limitFields[i].name, n)
}
