package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"text/template"

	"os"

	"golang.org/x/term"
)

// table says how rows of one kind are printed.
type table[T any] struct {
	head  []string
	row   func(T) []string
	name  func(T) string // what -q prints; nil: the first column
	plain bool           // one column, printed as it comes
}

// printer writes rows as --format says, one after the other, so that a list of
// any length can be printed as it comes.
type printer[T any] struct {
	out   io.Writer
	add   func(T) error
	close func() error
}

// newPrinter returns a printer on the program's standard output. Close it.
func newPrinter[T any](a *app, t table[T]) (*printer[T], error) {
	switch {
	case a.format == "table" && t.plain && !a.quiet:
		return namesPrinter(a.out, table[T]{row: t.row}), nil
	case a.quiet && a.format == "table":
		return namesPrinter(a.out, t), nil
	case a.format == "table":
		return tablePrinter(a.out, t), nil
	case a.format == "json":
		return jsonPrinter[T](a.out), nil
	}
	return templatePrinter[T](a.out, a.format)
}

// show prints rows.
func show[T any](a *app, rows []T, t table[T]) error {
	p, err := newPrinter(a, t)
	if err != nil {
		return err
	}
	for _, r := range rows {
		if err := p.add(r); err != nil {
			return err
		}
	}
	return p.close()
}

func namesPrinter[T any](w io.Writer, t table[T]) *printer[T] {
	out := bufio.NewWriter(w)
	name := t.name
	if name == nil {
		name = func(r T) string { return t.row(r)[0] }
	}
	return &printer[T]{out: out,
		add:   func(r T) error { _, err := fmt.Fprintln(out, name(r)); return err },
		close: out.Flush}
}

func tablePrinter[T any](out io.Writer, t table[T]) *printer[T] {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	started := false
	return &printer[T]{out: out,
		add: func(r T) error {
			if !started && t.head != nil {
				fmt.Fprintln(w, strings.Join(t.head, "\t"))
			}
			started = true
			_, err := fmt.Fprintln(w, strings.TrimRight(strings.Join(t.row(r), "\t"), "\t "))
			return err
		},
		close: w.Flush}
}

// jsonPrinter writes one array.
func jsonPrinter[T any](out io.Writer) *printer[T] {
	sep := "[\n  "
	return &printer[T]{out: out,
		add: func(r T) error {
			b, err := marshal(r)
			if err == nil {
				_, err = fmt.Fprintf(out, "%s%s", sep, b)
			}
			sep = ",\n  "
			return err
		},
		close: func() error {
			if sep[0] == '[' {
				_, err := fmt.Fprintln(out, "[]")
				return err
			}
			_, err := fmt.Fprintln(out, "\n]")
			return err
		}}
}

// marshal is json.Marshal without the escapes for HTML.
func marshal(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	err := e.Encode(v)
	return bytes.TrimRight(b.Bytes(), "\n"), err
}

// templatePrinter runs a template for each row; its fields are those of the
// JSON form, by their Go names.
func templatePrinter[T any](out io.Writer, text string) (*printer[T], error) {
	tmpl, err := parseTemplate(text)
	if err != nil {
		return nil, err
	}
	return &printer[T]{out: out,
		add: func(r T) error {
			if err := tmpl.Execute(out, r); err != nil {
				return fmt.Errorf("--format: %w", err)
			}
			_, err := fmt.Fprintln(out)
			return err
		},
		close: func() error { return nil }}, nil
}

func parseTemplate(text string) (*template.Template, error) {
	t, err := template.New("--format").Funcs(template.FuncMap{
		"json": func(v any) (string, error) { b, err := marshal(v); return string(b), err },
		"join": strings.Join,
		"size": humanBytes,
	}).Parse(text)
	if err != nil {
		return nil, fmt.Errorf("--format: %w", err)
	}
	return t, nil
}

// checkFormat refuses what is neither a known word nor a template.
func checkFormat(format string) error {
	if format == "table" || format == "json" {
		return nil
	}
	if !strings.Contains(format, "{{") {
		return fmt.Errorf("--format %q: neither table, json nor a template like '{{.Name}}'", format)
	}
	_, err := parseTemplate(format)
	return err
}

// humanBytes writes a size with three digits and a binary unit; -1 is unknown.
func humanBytes(n int64) string {
	if n < 0 {
		return "?"
	}
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	v, unit := float64(n), -1
	for v >= 1024 && unit < 5 {
		v /= 1024
		unit++
	}
	prec := 0
	if v < 9.995 {
		prec = 2
	} else if v < 99.95 {
		prec = 1
	}
	return fmt.Sprintf("%.*f %ciB", prec, v, "KMGTPE"[unit])
}

func humanCount(n int64) string {
	if n < 0 {
		return "?"
	}
	return fmt.Sprint(n)
}

// isTerminal reports whether a reader or writer is a terminal.
func isTerminal(w any) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// colour reports whether w takes colour: a terminal that can, and NO_COLOR
// (no-color.org) does not forbid it.
func colour(w io.Writer) bool {
	return isTerminal(w) && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
}

// The colours.
const (
	red    = "31"
	green  = "32"
	yellow = "33"
	bold   = "1"
)

// paint puts s in a colour if on.
func paint(on bool, code, s string) string {
	if !on {
		return s
	}
	return "\x1b[" + code + "m" + s + "\x1b[0m"
}

// counted is a number of things in words.
func counted[N int | int64](n N, one, more string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, more)
}

// showOne prints one object as JSON or by the template.
func (a *app) showOne(v any) error {
	if a.format == "json" {
		b, err := json.MarshalIndent(v, "", "  ")
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(a.out, "%s\n", b)
		return err
	}
	t, err := parseTemplate(a.format)
	if err != nil {
		return err
	}
	if err := t.Execute(a.out, v); err != nil {
		return fmt.Errorf("--format: %w", err)
	}
	_, err = fmt.Fprintln(a.out)
	return err
}
