package union

import (
	"bytes"
	"strings"
	"sync"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// xattrNames are overlayfs's own xattrs in one namespace.
type xattrNames struct {
	prefix  string // "trusted.overlay." or "user.overlay."
	escaped string // prefix + "overlay.": how one of an overlay inside is stored

	opaque, whiteout, redirect, metacopy, origin, impure, nlink, upper, uuid, protattr string
}

var (
	trustedNames = newXattrNames("trusted.overlay.")
	userNames    = newXattrNames("user.overlay.")
)

func newXattrNames(p string) *xattrNames {
	return &xattrNames{prefix: p, escaped: p + "overlay.",
		opaque: p + "opaque", whiteout: p + "whiteout", redirect: p + "redirect", metacopy: p + "metacopy", origin: p + "origin",
		impure: p + "impure", nlink: p + "nlink", upper: p + "upper", uuid: p + "uuid", protattr: p + "protattr"}
}

// Other xattrs by name.
const (
	xattrACLAccess  = "system.posix_acl_access"
	xattrACLDefault = "system.posix_acl_default"
	xattrCapability = "security.capability"
	xattrEVM        = "security.evm"
	xattrSELinux    = "security.selinux"
	xattrNameMax    = 255
	xattrSizeMax    = 64 << 10 // XATTR_SIZE_MAX, and XATTR_LIST_MAX
)

// private tells whether an xattr on disk is one of this overlay's own: neither
// shown nor copied up. Those that an overlay inside this one made are escaped and
// not private; nor is the other namespace.
func (x *xattrNames) private(disk string) bool {
	return strings.HasPrefix(disk, x.prefix) && !strings.HasPrefix(disk, x.escaped)
}

// toDisk is where an xattr that is set or read in the mount stands on disk: one
// of the overlay's namespace is escaped. EOPNOTSUPP where that makes it too long.
func (x *xattrNames) toDisk(shown string) (string, error) {
	rest, own := strings.CutPrefix(shown, x.prefix)
	if !own {
		return shown, nil
	}
	if len(x.escaped)+len(rest) > xattrNameMax {
		return "", syscall.EOPNOTSUPP
	}
	return x.escaped + rest, nil
}

// toShown is the inverse: ok is false for what is hidden.
func (x *xattrNames) toShown(disk string) (shown string, ok bool) {
	if rest, escaped := strings.CutPrefix(disk, x.escaped); escaped {
		return x.prefix + rest, true
	}
	return disk, !strings.HasPrefix(disk, x.prefix)
}

// showList turns a list of xattrs on disk, each ended by NUL, into what the mount
// lists, in place; the result is part of b.
func (x *xattrNames) showList(b []byte) []byte {
	out := b[:0]
	for len(b) > 0 {
		n := bytes.IndexByte(b, 0) + 1
		if n == 0 {
			break
		}
		name := b[:n]
		b = b[n:]
		if hasPrefix(name, x.escaped) {
			out = append(out, name[:len(x.prefix)]...)
			name = name[len(x.escaped):]
		} else if hasPrefix(name, x.prefix) {
			continue
		}
		out = append(out, name...) // never beyond what was read
	}
	return out
}

func hasPrefix(b []byte, p string) bool { return len(b) >= len(p) && string(b[:len(p)]) == p }

// facts are what the overlay xattrs on one object say.
type facts struct {
	opaque     bool   // opaque is "y"
	xwhiteouts bool   // opaque is "x": empty files with xattr whiteout are whiteouts here
	whiteout   bool   // has xattr whiteout
	impure     bool   // impure is "y"
	redirect   string // "": none, or not valid
	metacopy   bool   // has xattr metacopy, valid or not
	meta       metacopy
	hasOrigin  bool   // has xattr origin: was copied up
	origin     fileID // known only if originKnown
	hasNlink   bool
	nlink      linkCount
	append     bool // xattr protattr: what the inode flags would say if an upper could have them
	immutable  bool

	originKnown bool
	others      bool // has xattrs that are not overlayfs's own
	acl         bool // has a POSIX ACL, access or default
	capability  bool // has security.capability
}

var xattrBuffers = sync.Pool{New: func() any { b := make([]byte, xattrSizeMax); return &b }}

// readFacts reads all of them with one listxattr of name below dir ("": dir
// itself, which may be O_PATH). Of a value that is not as it must be it returns a
// *corruptError, one that the kernel does not pass over if there is such a one,
// and fills in what the rest says.
func (x *xattrNames) readFacts(dir int, name string, f *facts) error {
	*f = facts{}
	var small [512]byte
	list := small[:]
	n, err := sys.ListxattrBare(dir, name, list)
	if err == syscall.ERANGE {
		p := xattrBuffers.Get().(*[]byte)
		defer xattrBuffers.Put(p)
		list = *p
		n, err = sys.ListxattrBare(dir, name, list)
	}
	if err == syscall.EOPNOTSUPP {
		return nil
	}
	if err != nil {
		return err
	}
	return x.sortOut(list[:n], dir, name, f)
}

// sortOut goes through a list and reads the values that count.
func (x *xattrNames) sortOut(list []byte, dir int, name string, f *facts) error {
	var corrupt error
	for len(list) > 0 {
		n := bytes.IndexByte(list, 0)
		if n < 0 {
			break
		}
		attr := list[:n]
		list = list[n+1:]
		if !hasPrefix(attr, x.prefix) || hasPrefix(attr, x.escaped) {
			f.others = true
			f.acl = f.acl || string(attr) == xattrACLAccess || string(attr) == xattrACLDefault
			f.capability = f.capability || string(attr) == xattrCapability
			continue
		}
		err := x.readFact(string(attr[len(x.prefix):]), dir, name, f)
		bad, is := err.(*corruptError)
		if err != nil && !is {
			return err
		}
		if is && (corrupt == nil || bad.errno != 0) {
			corrupt = bad
		}
	}
	return corrupt
}

// readFact reads one value into f.
func (x *xattrNames) readFact(what string, dir int, name string, f *facts) error {
	var small [256]byte
	get := func(attr string, keep func([]byte) error) error {
		b, put, err := getValue(dir, name, attr, small[:])
		if err == syscall.ENODATA || err == syscall.EACCES { // user.* of a file that may not be read: as if it were not there
			return nil
		}
		if err != nil {
			return err
		}
		defer put()
		return keep(b)
	}
	switch what {
	case "opaque":
		return get(x.opaque, func(b []byte) error {
			f.opaque, f.xwhiteouts = string(b) == "y", string(b) == "x"
			return nil
		})
	case "impure":
		return get(x.impure, func(b []byte) error { f.impure = string(b) == "y"; return nil })
	case "whiteout":
		f.whiteout = true
	case "redirect":
		return get(x.redirect, func(b []byte) (err error) { f.redirect, err = x.parseRedirect(b); return err })
	case "metacopy":
		return get(x.metacopy, func(b []byte) (err error) { f.metacopy = true; f.meta, err = x.parseMetacopy(b); return err })
	case "origin":
		return get(x.origin, func(b []byte) (err error) {
			f.hasOrigin = true
			f.originKnown, err = f.origin.parse(x.origin, b)
			return err
		})
	case "nlink":
		return get(x.nlink, func(b []byte) (err error) {
			f.nlink, err = x.parseNlink(b)
			f.hasNlink = err == nil
			return err
		})
	case "protattr":
		return get(x.protattr, func(b []byte) (err error) { f.append, f.immutable, err = x.parseProtattr(b); return err })
	}
	return nil
}

// getValue reads an xattr of whatever size; put gives the buffer back.
func getValue(dir int, name, attr string, small []byte) (b []byte, put func(), err error) {
	n, err := sys.GetxattrBare(dir, name, attr, small)
	if err != syscall.ERANGE {
		return small[:n], func() {}, err
	}
	p := xattrBuffers.Get().(*[]byte)
	n, err = sys.GetxattrBare(dir, name, attr, *p)
	if err != nil {
		xattrBuffers.Put(p)
		return nil, nil, err
	}
	return (*p)[:n], func() { xattrBuffers.Put(p) }, nil
}

// corruptError is an overlay xattr whose value is not valid. It says so once in
// the log; what a lookup answers then is errno.
type corruptError struct {
	attr, why string
	errno     syscall.Errno // what the kernel's overlayfs answers; 0: it goes on as if the xattr were not there
}

func (e *corruptError) Error() string { return e.attr + ": " + e.why }

// Unwrap returns what the caller of the system call gets if it gets an error.
func (e *corruptError) Unwrap() error {
	if e.errno == 0 {
		return syscall.EIO
	}
	return e.errno
}

// maxRedirect bounds a redirect that is read: PATH_MAX.
const maxRedirect = 4096

// parseRedirect checks a redirect: one name, or an absolute path of names. A name
// is neither empty nor "." nor "..", and has neither '/' nor NUL.
func (x *xattrNames) parseRedirect(b []byte) (string, error) {
	bad := func(why string) (string, error) {
		return "", &corruptError{x.redirect, why, syscall.EINVAL}
	}
	if len(b) == 0 || len(b) > maxRedirect {
		return bad("empty, or too long")
	}
	if bytes.IndexByte(b, 0) >= 0 {
		return bad("has a NUL")
	}
	s := string(b)
	names := s
	if s[0] == '/' {
		names = s[1:]
	} else if strings.Contains(s, "/") {
		return bad("a relative path of several names")
	}
	for n := range strings.SplitSeq(names, "/") {
		if n == "" || n == "." || n == ".." || len(n) > xattrNameMax {
			return bad("has a name that cannot be one")
		}
	}
	return s, nil
}

// metacopy is struct ovl_metacopy: the xattr of a file whose data are in a lower.
// digest is the fs-verity digest that these data must have, if one is known.
type metacopy struct {
	flags  uint8
	algo   uint8 // FS_VERITY_HASH_ALG_*; 0: no digest
	digest []byte
}

const (
	metacopyHeader = 4  // version, len, flags, digest_algo
	verityMax      = 64 // FS_VERITY_MAX_DIGEST_SIZE
)

// parseMetacopy reads one; an empty xattr is one without flags and digest.
func (x *xattrNames) parseMetacopy(b []byte) (metacopy, error) {
	bad := func(why string) (metacopy, error) {
		return metacopy{}, &corruptError{x.metacopy, why, syscall.EIO}
	}
	switch {
	case len(b) == 0:
		return metacopy{}, nil
	case len(b) < metacopyHeader || len(b) > metacopyHeader+verityMax:
		return bad("of a size that none has")
	case b[0] != 0:
		return bad("of a later version")
	case int(b[1]) != len(b):
		return bad("has another size than it says")
	}
	m := metacopy{flags: b[2], algo: b[3]}
	if len(b) > metacopyHeader {
		m.digest = bytes.Clone(b[metacopyHeader:])
	}
	return m, nil
}

// encode is the value on disk: nothing, where there is nothing to say.
func (m *metacopy) encode() []byte {
	if m.flags == 0 && m.algo == 0 {
		return nil
	}
	return append([]byte{0, uint8(metacopyHeader + len(m.digest)), m.flags, m.algo}, m.digest...)
}

// linkCount is xattr nlink of an indexed file: how many names it shows, relative
// to the links of its inode in upper or of the one in the lower, whichever the
// next step will not change.
type linkCount struct {
	base byte // 'U' upper, 'L' lower
	diff int32
}

// shown is the link count that is seen; ok is false where it cannot be: the xattr
// belongs to other inodes.
func (c linkCount) shown(upper, lower uint32) (n uint32, ok bool) {
	base := int64(upper)
	if c.base == 'L' {
		base = int64(lower)
	}
	base += int64(c.diff)
	return uint32(base), base > 0 && base <= 1<<31-1
}

func (x *xattrNames) parseNlink(b []byte) (linkCount, error) {
	bad := &corruptError{x.nlink, "not as \"U+1\" or \"L-1\"", 0}
	if len(b) < 3 || len(b) > 12 || b[0] != 'U' && b[0] != 'L' || b[1] != '+' && b[1] != '-' {
		return linkCount{}, bad
	}
	var n int64
	for _, d := range b[2:] {
		if d < '0' || d > '9' {
			return linkCount{}, bad
		}
		n = n*10 + int64(d-'0')
	}
	if b[1] == '-' {
		n = -n
	}
	if n != int64(int32(n)) {
		return linkCount{}, bad
	}
	return linkCount{b[0], int32(n)}, nil
}

// appendTo writes the value on disk.
func (c linkCount) appendTo(b []byte) []byte {
	n := int64(c.diff)
	sign := byte('+')
	if n < 0 {
		sign, n = '-', -n
	}
	b = append(b, c.base, sign)
	var digits [10]byte
	i := len(digits)
	for i == len(digits) || n > 0 {
		i--
		digits[i] = byte('0' + n%10)
		n /= 10
	}
	return append(b, digits[i:]...)
}

// protattrMax is OVL_PROTATTR_MAX.
const protattrMax = 32

// parseProtattr reads the inode flags that an upper must not have itself.
func (x *xattrNames) parseProtattr(b []byte) (appendOnly, immutable bool, err error) {
	for _, c := range b {
		switch c {
		case 'a':
			appendOnly = true
		case 'i':
			immutable = true
		default:
			return false, false, &corruptError{x.protattr, "has flags that are not known", 0}
		}
	}
	if len(b) == 0 || len(b) > protattrMax {
		return false, false, &corruptError{x.protattr, "of a size that none has", 0}
	}
	return appendOnly, immutable, nil
}
