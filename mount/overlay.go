package mount

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
)

// Layers are the directories of an overlay mount.
type Layers struct {
	Lowers []string // read-only, nearest first
	Data   []string // data-only lowers, reached by redirects alone
	Upper  string   // "" for a read-only overlay
	Work   string
}

var layerEscaper = strings.NewReplacer(`\`, `\\`, `:`, `\:`, `,`, `\,`)

// EscapeLayer writes a path as overlayfs reads it in the options lowerdir=,
// lowerdir+=, datadir+=, upperdir= and workdir= of a Mount: a backslash before
// each colon, comma and backslash (fs/overlayfs/params.c: ovl_next_opt,
// ovl_unescape).
func EscapeLayer(path string) string { return layerEscaper.Replace(path) }

// unescapeLayer is the inverse of EscapeLayer.
func unescapeLayer(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+1 < len(s) {
			i++
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// splitUnescaped splits s at each sep that no backslash precedes. Escapes stay.
func splitUnescaped(s string, sep byte) []string {
	var parts []string
	start := 0
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case '\\':
			i++
		case sep:
			parts = append(parts, s[start:i])
			start = i + 1
		}
	}
	return append(parts, s[start:])
}

// OverlayLayers reads the directories out of an overlay's options, in the form
// that Mounts of a driver or Info.Mount gives. ErrInvalidArgument names an
// option that does not parse.
func OverlayLayers(m Mount) (Layers, error) {
	p, err := parse(m)
	if err != nil {
		return Layers{}, err
	}
	if p.layers == nil {
		return Layers{}, fmt.Errorf("mount: %s is not an overlay: %w", m.Type, errdefs.ErrInvalidArgument)
	}
	return *p.layers, nil
}

// set takes one option if it names layers.
func (l *Layers) set(key, value string) (ours bool, err error) {
	switch key {
	case "lowerdir":
		return true, l.setLowers(value)
	case "lowerdir+":
		l.Lowers = append(l.Lowers, unescapeLayer(value))
	case "datadir+":
		l.Data = append(l.Data, unescapeLayer(value))
	case "upperdir":
		l.Upper = unescapeLayer(value)
	case "workdir":
		l.Work = unescapeLayer(value)
	default:
		return false, nil
	}
	if value == "" {
		return true, fmt.Errorf("%s is empty: %w", key, errdefs.ErrInvalidArgument)
	}
	return true, nil
}

// setLowers parses lowerdir=: paths with ":" between them, "::" before each
// data-only one.
func (l *Layers) setLowers(value string) error {
	l.Lowers, l.Data = nil, nil
	parts := splitUnescaped(value, ':')
	for i := 0; i < len(parts); i++ {
		data := i > 0 && parts[i] == ""
		if data {
			i++
		}
		switch {
		case i == len(parts) || parts[i] == "":
			return fmt.Errorf("lowerdir=%s has an empty path: %w", value, errdefs.ErrInvalidArgument)
		case data:
			l.Data = append(l.Data, unescapeLayer(parts[i]))
		case len(l.Data) > 0:
			return fmt.Errorf("lowerdir=%s has a plain lower after a data-only one: %w", value, errdefs.ErrInvalidArgument)
		default:
			l.Lowers = append(l.Lowers, unescapeLayer(parts[i]))
		}
	}
	return nil
}

// check finds what no kernel accepts, so that the error names it.
func (l *Layers) check() error {
	switch {
	case len(l.Lowers) == 0:
		return fmt.Errorf("overlay without lowerdir: %w", errdefs.ErrInvalidArgument)
	case (l.Upper == "") != (l.Work == ""):
		return fmt.Errorf("overlay needs both upperdir and workdir, or neither: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

// options writes the layers as one-page options of mount(2).
func (l *Layers) options() []string {
	var b strings.Builder
	b.WriteString("lowerdir=")
	for i, p := range l.Lowers {
		if i > 0 {
			b.WriteByte(':')
		}
		b.WriteString(EscapeLayer(p))
	}
	for _, p := range l.Data {
		b.WriteString("::" + EscapeLayer(p))
	}
	opts := []string{b.String()}
	if l.Upper != "" {
		opts = append(opts, "upperdir="+EscapeLayer(l.Upper), "workdir="+EscapeLayer(l.Work))
	}
	return opts
}
