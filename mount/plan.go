package mount

import (
	"fmt"
	"strconv"
	"strings"

	cmount "github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/sys"
)

// Mount is containerd's mount: Type, Source, Target (a directory below the
// target of All; "" is that itself) and Options as in fstab(5).
type Mount = cmount.Mount

// plan is a Mount understood: what to ask the kernel for. It is pure data.
type plan struct {
	kind      kind
	fstype    string // of a filesystem: the kernel's name; of a helper: what it is given by -t
	source    string
	target    string // below the caller's target
	recursive bool   // of a bind

	flags  uintptr  // MS_ flags, for mount(2)
	super  []string // the words among them that are about the superblock, for fsconfig
	attrs  uint64   // MOUNT_ATTR_ to set on the mount
	clear  uint64   // MOUNT_ATTR_ to clear first, on a bind
	params []param  // the file system's own options

	layers *Layers // of an overlay, else nil

	propagation uint64 // MS_SHARED, ...; 0: as it comes
	propagateTo bool   // to the mounts below, too

	loop, directIO bool
	ids            idmap
	helper         string // mount.fuse3
}

type kind int

const (
	filesystem kind = iota
	bind
	remount
	helper
)

func (k kind) String() string { return [...]string{"filesystem", "bind", "remount", "helper"}[k] }

// param is one option of a file system: a flag if hasValue is false.
type param struct {
	key, value string
	hasValue   bool
}

func (p param) String() string {
	if !p.hasValue {
		return p.key
	}
	return p.key + "=" + p.value
}

// word is an fstab option that is a flag of mount(2).
type word struct {
	flag  uintptr
	clear bool
}

// words are the flags of mount(2) by their fstab(5) names.
var words = map[string]word{
	"async": {sys.MS_SYNCHRONOUS, true}, "sync": {sys.MS_SYNCHRONOUS, false},
	"dirsync": {sys.MS_DIRSYNC, false},
	"mand":    {sys.MS_MANDLOCK, false}, "nomand": {sys.MS_MANDLOCK, true},
	"lazytime": {sys.MS_LAZYTIME, false}, "nolazytime": {sys.MS_LAZYTIME, true},
	"ro": {sys.MS_RDONLY, false}, "rw": {sys.MS_RDONLY, true},
	"nosuid": {sys.MS_NOSUID, false}, "suid": {sys.MS_NOSUID, true},
	"nodev": {sys.MS_NODEV, false}, "dev": {sys.MS_NODEV, true},
	"noexec": {sys.MS_NOEXEC, false}, "exec": {sys.MS_NOEXEC, true},
	"nosymfollow": {sys.MS_NOSYMFOLLOW, false}, "symfollow": {sys.MS_NOSYMFOLLOW, true},
	"noatime": {sys.MS_NOATIME, false}, "atime": {sys.MS_NOATIME, true},
	"nodiratime": {sys.MS_NODIRATIME, false}, "diratime": {sys.MS_NODIRATIME, true},
	"relatime": {sys.MS_RELATIME, false}, "norelatime": {sys.MS_RELATIME, true},
	"strictatime": {sys.MS_STRICTATIME, false}, "nostrictatime": {sys.MS_STRICTATIME, true},
	"bind": {sys.MS_BIND, false}, "rbind": {sys.MS_BIND | sys.MS_REC, false},
	"remount": {sys.MS_REMOUNT, false}, "defaults": {},
}

// propagations are the words that change how mounts propagate, an r before
// them means recursively.
var propagations = map[string]uint64{
	"private": sys.MS_PRIVATE, "slave": sys.MS_SLAVE, "shared": sys.MS_SHARED, "unbindable": sys.MS_UNBINDABLE,
}

// superWords are the flags that fsconfig takes as flags of the superblock.
var superWords = []struct {
	flag uintptr
	word string
}{
	{sys.MS_RDONLY, "ro"}, {sys.MS_SYNCHRONOUS, "sync"}, {sys.MS_DIRSYNC, "dirsync"},
	{sys.MS_MANDLOCK, "mand"}, {sys.MS_LAZYTIME, "lazytime"},
}

// attrFlags are the flags that belong to one mount.
var attrFlags = []struct {
	flag uintptr
	attr uint64
}{
	{sys.MS_RDONLY, sys.MOUNT_ATTR_RDONLY}, {sys.MS_NOSUID, sys.MOUNT_ATTR_NOSUID},
	{sys.MS_NODEV, sys.MOUNT_ATTR_NODEV}, {sys.MS_NOEXEC, sys.MOUNT_ATTR_NOEXEC},
	{sys.MS_NOSYMFOLLOW, sys.MOUNT_ATTR_NOSYMFOLLOW}, {sys.MS_NODIRATIME, sys.MOUNT_ATTR_NODIRATIME},
	{sys.MS_NOATIME, sys.MOUNT_ATTR_NOATIME}, {sys.MS_STRICTATIME, sys.MOUNT_ATTR_STRICTATIME},
}

// parse understands one Mount. Errors wrap ErrInvalidArgument and name the
// option.
func parse(m Mount) (*plan, error) {
	p := &plan{fstype: m.Type, source: m.Source, target: m.Target}
	if name, sub, ok := strings.Cut(m.Type, "."); ok && (name == "fuse" || name == "fuse3") {
		p.kind, p.helper, p.fstype = helper, "mount."+name, sub
	}
	if m.Type == "overlay" {
		p.layers = &Layers{}
	}
	for _, element := range m.Options {
		if p.kind == helper {
			p.params = append(p.params, param{key: element})
			continue
		}
		if err := p.element(element); err != nil {
			return nil, fmt.Errorf("mount: %s option %q: %w", m.Type, element, err)
		}
	}
	if err := p.finish(); err != nil {
		return nil, fmt.Errorf("mount: %s: %w", m.Type, err)
	}
	return p, nil
}

// element takes one element of Options: an option, or several with commas.
func (p *plan) element(s string) error {
	if strings.HasPrefix(s, "X-containerd.") {
		return fmt.Errorf("is for containerd's mount manager: %w", errdefs.ErrInvalidArgument)
	}
	if v, ok := strings.CutPrefix(s, "uidmap="); ok { // commas separate its ranges
		return parseRanges(v, &p.ids.uids)
	}
	if v, ok := strings.CutPrefix(s, "gidmap="); ok {
		return parseRanges(v, &p.ids.gids)
	}
	for _, o := range p.split(s) {
		if err := p.option(o); err != nil {
			return err
		}
	}
	return nil
}

// split cuts an element at its commas: not at those that overlay's backslash or
// the quotes of a security context protect.
func (p *plan) split(s string) []string {
	if p.layers != nil {
		return splitUnescaped(s, ',')
	}
	var parts []string
	quoted, start := false, 0
	for i := range len(s) {
		switch {
		case s[i] == '"':
			quoted = !quoted
		case s[i] == ',' && !quoted:
			parts = append(parts, s[start:i])
			start = i + 1
		}
	}
	return append(parts, s[start:])
}

// option takes one option.
func (p *plan) option(o string) error {
	if w, ok := words[o]; ok {
		if w.clear {
			p.flags &^= w.flag
		} else {
			p.flags |= w.flag
		}
		return nil
	}
	switch o {
	case "":
		return nil
	case "loop":
		p.loop = true
		return nil
	case "direct-io":
		p.directIO = true
		return nil
	}
	if p.propagate(o) {
		return nil
	}
	key, value, hasValue := strings.Cut(o, "=")
	if p.layers != nil && hasValue {
		if ours, err := p.layers.set(key, value); ours {
			return err
		}
	}
	if strings.HasSuffix(key, "context") { // SELinux: the quotes are mount(8)'s
		value = strings.Trim(value, `"`)
	}
	p.params = append(p.params, param{key, value, hasValue})
	return nil
}

func (p *plan) propagate(o string) bool {
	flag, ok := propagations[o]
	if !ok && strings.HasPrefix(o, "r") {
		flag, ok = propagations[o[1:]]
		p.propagateTo = p.propagateTo || ok
	}
	if ok {
		p.propagation = flag
	}
	return ok
}

// finish decides the kind and derives what the flags mean for the new calls.
func (p *plan) finish() error {
	switch {
	case p.kind == helper:
		return nil
	case p.flags&sys.MS_REMOUNT != 0:
		p.kind = remount
	case p.flags&sys.MS_BIND != 0 || p.fstype == "bind" || p.fstype == "rbind":
		p.kind = bind
		p.recursive = p.flags&sys.MS_REC != 0 || p.fstype == "rbind"
		p.layers = nil
	}
	if p.directIO && !p.loop { // then it is an option of the file system
		p.params = append(p.params, param{key: "direct-io"})
	}
	p.derive()
	return p.check()
}

func (p *plan) derive() {
	for _, s := range superWords {
		if p.kind == filesystem && p.flags&s.flag != 0 {
			p.super = append(p.super, s.word)
		}
	}
	for _, a := range attrFlags {
		if p.flags&a.flag != 0 {
			p.attrs |= a.attr
		}
	}
	const atime = sys.MS_NOATIME | sys.MS_STRICTATIME | sys.MS_RELATIME
	if p.flags&sys.MS_NOATIME != 0 { // as do_mount: noatime wins over strictatime
		p.attrs &^= sys.MOUNT_ATTR_STRICTATIME
	}
	if p.kind == bind && p.flags&atime != 0 {
		p.clear = sys.MOUNT_ATTR__ATIME
	}
}

func (p *plan) check() error {
	if (len(p.ids.uids) == 0) != (len(p.ids.gids) == 0) {
		return fmt.Errorf("uidmap= and gidmap= go together: %w", errdefs.ErrInvalidArgument)
	}
	if p.kind == bind && len(p.params) > 0 {
		return fmt.Errorf("a bind mount takes no option %q: %w", p.params[0], errdefs.ErrInvalidArgument)
	}
	if p.kind == filesystem && p.layers != nil {
		return p.layers.check()
	}
	return nil
}

// data is the option string of mount(2).
func (p *plan) data() string {
	var all []string
	if p.layers != nil {
		all = p.layers.options()
	}
	for _, o := range p.params {
		all = append(all, o.String())
	}
	return strings.Join(all, ",")
}

// idRange maps size ids from container (on disk) to host (shown).
type idRange struct{ container, host, size int }

// idmap is what uidmap= and gidmap= say; empty: nothing is mapped.
type idmap struct{ uids, gids []idRange }

func (m idmap) empty() bool { return len(m.uids) == 0 }

// parseRanges reads CONTAINER:HOST:SIZE, several with commas between them.
func parseRanges(s string, to *[]idRange) error {
	*to = nil
	for part := range strings.SplitSeq(s, ",") {
		f := strings.Split(part, ":")
		if len(f) != 3 {
			return fmt.Errorf("%q is not CONTAINER:HOST:SIZE: %w", part, errdefs.ErrInvalidArgument)
		}
		var n [3]int
		for i := range n {
			v, err := strconv.ParseUint(f[i], 10, 32)
			if err != nil {
				return fmt.Errorf("%q is not a 32-bit number: %w", f[i], errdefs.ErrInvalidArgument)
			}
			n[i] = int(v)
		}
		if n[2] == 0 {
			return fmt.Errorf("%q maps nothing: %w", part, errdefs.ErrInvalidArgument)
		}
		*to = append(*to, idRange{n[0], n[1], n[2]})
	}
	return nil
}
