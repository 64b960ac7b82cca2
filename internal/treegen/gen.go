package treegen

import (
	"slices"
	"strings"
)

// Source is where a Gen gets its choices: a *math/rand/v2.Rand is one. A
// property-test library's is three lines:
//
//	type draws struct{ t *rapid.T }
//	func (d draws) IntN(n int) int { return rapid.IntRange(0, n-1).Draw(d.t, "n") }
type Source interface {
	// IntN returns a number in [0, n).
	IntN(n int) int
}

// Config says what a Gen may draw. The zero value draws what an unprivileged
// user can do on any file system.
type Config struct {
	// Root adds what needs root: owners, devices, trusted.* xattrs, file
	// capabilities.
	Root bool
	// NoXattrs leaves xattrs and ACLs out.
	NoXattrs bool
	// Sockets adds sockets, which no layer can carry.
	Sockets bool
	// Names are the components of paths; nil means DefaultNames. Few names make
	// many collisions.
	Names []string
	// Depth is the most components of a path; 0 means 4.
	Depth int
	// FileSize bounds what one Op writes in bytes; 0 means 10,000.
	FileSize int
	// Without lists verbs not to draw.
	Without []Verb
}

// DefaultNames are short ones that collide, and those that break programs: one
// that sorts between a directory and its content, one with a newline, one not
// UTF-8, one of 255 bytes.
var DefaultNames = []string{
	"a", "b", "c", "d", "a.b", "a-", "A", "new\nline", "sp ace=", "caf\xe9", "\xff\xfe", "日本",
	strings.Repeat("l", 255), strings.Repeat("\xc3\xa4", 127) + "x",
}

type kind byte

const (
	none kind = iota
	dir
	file
	link
	special
)

// Gen draws operations. It is not safe for concurrent use.
type Gen struct {
	src   Source
	cfg   Config
	verbs []Verb
	order []string // existing names, oldest first: choices must repeat
	kinds map[string]kind
	sec   int64
}

// weights are how often a verb is drawn.
var weights = []struct {
	verb Verb
	n    int
}{
	{Create, 14}, {Write, 6}, {Append, 3}, {Truncate, 4}, {Rewrite, 5}, {Retouch, 3}, {Replace, 4},
	{Chmod, 6}, {Chown, 5}, {Utimes, 5}, {Setxattr, 8}, {Rmxattr, 3},
	{Mkdir, 12}, {Rmdir, 3}, {Symlink, 5}, {Mknod, 4}, {Link, 9}, {Rename, 8}, {Exchange, 2},
	{Unlink, 6}, {RmTree, 3}, {Recreate, 2},
}

// New returns a generator over an empty tree.
func New(src Source, cfg Config) *Gen {
	if cfg.Names == nil {
		cfg.Names = DefaultNames
	}
	if cfg.Depth == 0 {
		cfg.Depth = 4
	}
	if cfg.FileSize == 0 {
		cfg.FileSize = 10_000
	}
	g := &Gen{src: src, cfg: cfg, kinds: map[string]kind{}, sec: 1_600_000_000}
	for _, w := range weights {
		if !g.allowed(w.verb) {
			continue
		}
		for range w.n {
			g.verbs = append(g.verbs, w.verb)
		}
	}
	return g
}

func (g *Gen) allowed(v Verb) bool {
	switch {
	case slices.Contains(g.cfg.Without, v):
		return false
	case v == Chown:
		return g.cfg.Root
	case v == Setxattr || v == Rmxattr:
		return !g.cfg.NoXattrs
	}
	return true
}

// Ops draws n operations.
func (g *Gen) Ops(n int) []Op {
	ops := make([]Op, 0, n)
	for range n {
		ops = append(ops, g.Next())
	}
	return ops
}

// Next draws one operation and takes it into the model.
func (g *Gen) Next() Op {
	o := Op{Verb: g.verbs[g.src.IntN(len(g.verbs))], Sec: g.tick(), Nsec: g.nsec()}
	g.fill(&o)
	g.track(o)
	return o
}

// tick gives times that mostly grow, with repeats, and some before 1970.
func (g *Gen) tick() int64 {
	g.sec += int64(g.src.IntN(3))
	if g.src.IntN(20) == 0 {
		return -int64(g.src.IntN(100_000))
	}
	return g.sec
}

func (g *Gen) nsec() uint32 {
	switch g.src.IntN(3) {
	case 0:
		return 0
	case 1:
		return uint32(g.src.IntN(10)) * 100_000_000
	}
	return uint32(g.src.IntN(1_000_000_000))
}

func (g *Gen) fill(o *Op) {
	switch o.Verb {
	case Create:
		o.Path, o.Mode = g.fresh(), g.mode()
		o.Size, o.Seed = g.size(), g.seed()
	case Mkdir:
		o.Path, o.Mode = g.fresh(), g.mode()|0o700
	case Symlink:
		o.Path, o.To = g.fresh(), g.target()
	case Mknod:
		g.fillNode(o)
	case Write, Append, Truncate, Rewrite, Replace, Retouch:
		o.Path = g.pick(file)
		o.Off, o.Size, o.Seed = int64(g.src.IntN(g.cfg.FileSize)), g.size(), g.seed()
		o.Mode = g.mode()
		g.trim(o)
	case Link:
		o.Path, o.To = g.pick(file, file, link, special), g.fresh()
	case Rename, Exchange:
		o.Path, o.To = g.any(), g.fresh()
		if o.Verb == Exchange || g.src.IntN(3) == 0 {
			o.To = g.any()
		}
	default:
		o.Path = g.any()
		g.fillMeta(o)
	}
}

// trim clears what a verb does not use, so that lists print short.
func (g *Gen) trim(o *Op) {
	if o.Verb != Replace {
		o.Mode = 0
	}
	switch o.Verb {
	case Append, Replace:
		o.Off = 0
	case Truncate:
		o.Off, o.Seed = 0, 0
	case Retouch:
		o.Off, o.Size, o.Seed = 0, 0, 0
	}
}

func (g *Gen) fillMeta(o *Op) {
	switch o.Verb {
	case Chmod:
		o.Mode = g.mode()
		if g.kinds[o.Path] == dir {
			o.Mode |= 0o700
		}
	case Recreate:
		o.Path, o.Mode = g.pick(dir), g.mode()|0o700
	case Rmdir, RmTree:
		o.Path = g.pick(dir)
	case Unlink:
		o.Path = g.pick(file, link, special)
	case Chown:
		o.UID, o.GID = g.id(), g.id()
	case Setxattr:
		g.fillXattr(o, true)
	case Rmxattr:
		g.fillXattr(o, false)
	}
}

func (g *Gen) fillNode(o *Op) {
	o.Path, o.Mode = g.fresh(), 0o010000|g.mode()
	if g.cfg.Sockets && g.src.IntN(4) == 0 {
		o.Mode = 0o140000 | g.mode()
	} else if g.cfg.Root && g.src.IntN(2) == 0 {
		o.Mode = []uint32{0o020000, 0o060000}[g.src.IntN(2)] | g.mode()
		o.Major, o.Minor = uint32(1+g.src.IntN(300)), uint32(g.src.IntN(70_000))
	}
}

// The values of xattrs that the kernel checks: struct vfs_cap_data revision 2
// (include/uapi/linux/capability.h) and struct posix_acl_xattr
// (include/uapi/linux/posix_acl_xattr.h): user::rwx user:1000:r-- group::r-x
// mask::r-x other::r--.
const (
	capability  = "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	capability2 = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	acl         = "\x02\x00\x00\x00" +
		"\x01\x00\x07\x00\xff\xff\xff\xff" + "\x02\x00\x04\x00\xe8\x03\x00\x00" + "\x04\x00\x05\x00\xff\xff\xff\xff" +
		"\x10\x00\x05\x00\xff\xff\xff\xff" + "\x20\x00\x04\x00\xff\xff\xff\xff"
)

func (g *Gen) fillXattr(o *Op, value bool) {
	attrs := []string{"user.a", "user.b", "user.k=v x\n", "system.posix_acl_access"}
	if g.kinds[o.Path] == dir {
		attrs = append(attrs, "system.posix_acl_default")
	}
	if g.cfg.Root {
		attrs = append(attrs, "trusted.t", "security.capability")
	}
	o.Attr = attrs[g.src.IntN(len(attrs))]
	if value {
		o.Value = g.value(o.Attr)
	}
}

func (g *Gen) value(attr string) string {
	switch {
	case strings.HasPrefix(attr, "system.posix_acl"):
		return acl
	case attr == "security.capability":
		return []string{capability, capability2}[g.src.IntN(2)]
	}
	return []string{"1", "2", "", "bin\x00\xff\n=", strings.Repeat("v", 300)}[g.src.IntN(5)]
}

func (g *Gen) mode() uint32 {
	return []uint32{0o644, 0o755, 0o600, 0o444, 0o4755, 0o2755, 0o1777, 0o700}[g.src.IntN(8)]
}

func (g *Gen) id() uint32 {
	return []uint32{0, 1, 1000, 65_534, 2_097_151, 2_097_152, 4_000_000_000}[g.src.IntN(7)]
}

func (g *Gen) size() int64 {
	switch g.src.IntN(6) {
	case 0:
		return 0
	case 1:
		return 4096
	case 2:
		return 512
	}
	return int64(1 + g.src.IntN(g.cfg.FileSize))
}

func (g *Gen) seed() uint64 { return uint64(g.src.IntN(5)) }

func (g *Gen) target() string {
	return []string{"a", "../b", "/etc/passwd", ".", "caf\xe9", strings.Repeat("t/", 150) + "t"}[g.src.IntN(6)]
}

// fresh is a path that may or may not be there, mostly in a directory that is.
func (g *Gen) fresh() string {
	name := g.cfg.Names[g.src.IntN(len(g.cfg.Names))]
	parent := "."
	if g.src.IntN(4) != 0 {
		parent = g.pick(dir)
	}
	if parent == "." || strings.Count(parent, "/")+2 > g.cfg.Depth {
		return name
	}
	return parent + "/" + name
}

// Path draws a path that most likely exists: of a file with files, of anything
// else too without. It is for verbs of others, beside those that Next draws.
func (g *Gen) Path(files bool) string {
	if files {
		return g.pick(file)
	}
	return g.any()
}

// Dir draws the path of a directory that most likely exists.
func (g *Gen) Dir() string { return g.pick(dir) }

// Fresh draws a path that may or may not be there.
func (g *Gen) Fresh() string { return g.fresh() }

// Note takes the effect of an Op that was drawn otherwise into the model.
func (g *Gen) Note(o Op) { g.track(o) }

// any is an existing path, seldom the root or one that is not there.
func (g *Gen) any() string { return g.pick(dir, file, link, special) }

// pick is an existing path of one of the kinds; where there is none, any name.
func (g *Gen) pick(kinds ...kind) string {
	var of []string
	for _, p := range g.order {
		if slices.Contains(kinds, g.kinds[p]) {
			of = append(of, p)
		}
	}
	if len(of) == 0 || g.src.IntN(30) == 0 {
		return g.cfg.Names[g.src.IntN(len(g.cfg.Names))]
	}
	return of[g.src.IntN(len(of))]
}

// track takes an Op into the model as if it succeeded wherever it roughly can.
// The model may be wrong: then an Op fails, on both sides alike.
func (g *Gen) track(o Op) {
	switch o.Verb {
	case Create:
		g.add(o.Path, file)
	case Mkdir:
		g.add(o.Path, dir)
	case Symlink:
		g.add(o.Path, link)
	case Mknod:
		g.add(o.Path, special)
	case Link:
		g.add(o.To, g.kinds[o.Path])
	case Rmdir:
		if g.kinds[o.Path] == dir && !g.holds(o.Path) {
			g.remove(o.Path)
		}
	case RmTree:
		g.remove(o.Path)
	case Unlink:
		if g.kinds[o.Path] != dir {
			g.remove(o.Path)
		}
	case Recreate:
		if g.kinds[o.Path] == dir {
			g.remove(o.Path)
			g.add(o.Path, dir)
		}
	case Rename:
		g.move(o.Path, o.To)
	}
}

// hasParent reports whether path lies in a directory of the model.
func (g *Gen) hasParent(path string) bool {
	i := strings.LastIndexByte(path, '/')
	return i < 0 || g.kinds[path[:i]] == dir
}

// holds reports whether the directory path has a name in it.
func (g *Gen) holds(path string) bool {
	return slices.ContainsFunc(g.order, func(p string) bool { return strings.HasPrefix(p, path+"/") })
}

func (g *Gen) add(path string, k kind) {
	if k == none || g.kinds[path] != none || !g.hasParent(path) {
		return
	}
	g.kinds[path] = k
	g.order = append(g.order, path)
}

func (g *Gen) remove(path string) {
	g.order = slices.DeleteFunc(g.order, func(p string) bool {
		gone := p == path || strings.HasPrefix(p, path+"/")
		if gone {
			delete(g.kinds, p)
		}
		return gone
	})
}

func (g *Gen) move(path, to string) {
	from, over := g.kinds[path], g.kinds[to]
	switch {
	case from == none || path == to || !g.hasParent(to) || strings.HasPrefix(to, path+"/"):
		return
	case over != none && (from == dir) != (over == dir), over == dir && g.holds(to):
		return
	}
	moved := map[string]kind{}
	var order []string
	for _, p := range g.order {
		if p == path || strings.HasPrefix(p, path+"/") {
			n := to + p[len(path):]
			moved[n] = g.kinds[p]
			order = append(order, n)
		}
	}
	g.remove(path)
	g.remove(to)
	for _, p := range order {
		g.add(p, moved[p])
	}
}
