package layer

import (
	"encoding/base64"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/containerd/errdefs"
)

// The fields of a ustar header (POSIX.1-2017, pax, "ustar Interchange Format").
// Headers are written here and not by archive/tar because a layer's digest is
// over them: they must not change with the Go release, and must carry names that
// are not UTF-8 and xattr names with "=".
const (
	maxOctal7    = 1<<21 - 1 // mode, uid, gid, device numbers: 7 digits
	maxOctal11   = 1<<33 - 1 // size, mtime: 11 digits
	maxTarName   = 100
	maxTarPrefix = 155
)

// The type flags.
const (
	tarReg     = '0'
	tarLink    = '1'
	tarSymlink = '2'
	tarChar    = '3'
	tarBlk     = '4'
	tarDir     = '5'
	tarFifo    = '6'
	tarPAX     = 'x'
)

var tarFlags = map[FileType]byte{
	TypeReg: tarReg, TypeSymlink: tarSymlink, TypeChar: tarChar, TypeBlock: tarBlk, TypeDir: tarDir, TypeFifo: tarFifo,
}

// tarHeader is what one entry's header says.
type tarHeader struct {
	name     string
	link     string
	flag     byte
	mode     uint32
	uid, gid uint32
	size     int64
	mtime    Timespec
	major    uint32
	minor    uint32
	xattrs   map[string]string
}

// headerOf is the header of an entry. A further name of a link group repeats the
// file's metadata, xattrs too: other unpackers apply what a link's header says,
// and a chown that they do drops the capabilities that the first name brought.
func headerOf(e *Entry) (tarHeader, error) {
	h := tarHeader{name: e.Path, mode: e.Mode, uid: e.UID, gid: e.GID, mtime: e.ModTime}
	if strings.IndexByte(e.Path, 0) >= 0 || e.Path == "" {
		return h, fmt.Errorf("a path that no file system has: %w", errdefs.ErrInvalidArgument)
	}
	h.xattrs = e.Xattrs
	if e.Hardlink != "" {
		h.flag, h.link = tarLink, e.Hardlink
		return h, nil
	}
	flag, ok := tarFlags[e.Type]
	if !ok {
		return h, fmt.Errorf("type %#o is not in a layer: %w", uint32(e.Type), errdefs.ErrInvalidArgument)
	}
	h.flag = flag
	switch e.Type {
	case TypeDir:
		h.name += "/"
	case TypeReg:
		h.size = e.Size
	case TypeSymlink:
		h.link = e.Linkname
	case TypeChar, TypeBlock:
		h.major, h.minor = e.Major, e.Minor
		if e.Major > maxOctal7 || e.Minor > maxOctal7 {
			return h, fmt.Errorf("device %d:%d: %w", e.Major, e.Minor, errdefs.ErrOutOfRange)
		}
	}
	return h, nil
}

// append appends the header's blocks to b: if ustar cannot say everything,
// a PAX header first, with the records in the order of their names.
func (h *tarHeader) append(b []byte) []byte {
	prefix, name, fits := splitName(h.name)
	if pax := h.pax(fits); len(pax) > 0 {
		x := tarHeader{name: "PaxHeaders.0/" + paxLabel(h.name), flag: tarPAX, mode: 0o644, size: int64(len(pax))}
		b = x.ustar(b, "", x.name)
		b = append(b, pax...)
		b = append(b, make([]byte, padding(int64(len(pax))))...)
	}
	return h.ustar(b, prefix, name)
}

// paxLabel is what a reader without PAX would call the records.
func paxLabel(name string) string {
	name = strings.TrimSuffix(name, "/")
	name = name[strings.LastIndexByte(name, '/')+1:]
	return cut(name, maxTarName-len("PaxHeaders.0/"))
}

func cut(s string, n int) string { return s[:min(len(s), n)] }

// padding is how many zero bytes follow n bytes of content.
func padding(n int64) int64 { return -n & (blockSize - 1) }

// splitName puts a name into the two fields of ustar; if it does not fit, what
// does, for the eyes of readers without PAX.
func splitName(name string) (prefix, rest string, fits bool) {
	if len(name) <= maxTarName {
		return "", name, true
	}
	// The longest prefix leaves the shortest rest; a trailing slash stays with it.
	end := min(len(name)-2, maxTarPrefix)
	if i := strings.LastIndexByte(name[:end+1], '/'); i > 0 && len(name)-i-1 <= maxTarName {
		return name[:i], name[i+1:], true
	}
	return "", cut(name, maxTarName), false
}

// ustar appends the 512 bytes. Values that do not fit are 0 here and in PAX.
func (h *tarHeader) ustar(b []byte, prefix, name string) []byte {
	n := len(b)
	b = append(b, make([]byte, blockSize)...)
	f := b[n:]
	copy(f[0:100], name)
	octal(f[100:108], int64(h.mode))
	octal(f[108:116], orZero(int64(h.uid), maxOctal7))
	octal(f[116:124], orZero(int64(h.gid), maxOctal7))
	octal(f[124:136], orZero(h.size, maxOctal11))
	octal(f[136:148], orZero(h.mtime.Sec, maxOctal11))
	copy(f[148:156], "        ")
	f[156] = h.flag
	copy(f[157:257], cut(h.link, maxTarName))
	copy(f[257:265], "ustar\x0000")
	octal(f[329:337], int64(h.major))
	octal(f[337:345], int64(h.minor))
	copy(f[345:500], prefix)
	sum := 0
	for _, c := range f {
		sum += int(c)
	}
	octal(f[148:155], int64(sum))
	return b
}

func orZero(v, limit int64) int64 {
	if v < 0 || v > limit {
		return 0
	}
	return v
}

// octal fills all but the last byte of a field, which stays NUL.
func octal(f []byte, v int64) {
	for i := len(f) - 2; i >= 0; i-- {
		f[i] = '0' + byte(v&7)
		v >>= 3
	}
	f[len(f)-1] = 0
}

// pax is the text of the PAX records that the header needs, in order.
func (h *tarHeader) pax(nameFits bool) []byte {
	r := map[string]string{}
	if !nameFits {
		r["path"] = h.name
	}
	if len(h.link) > maxTarName {
		r["linkpath"] = h.link
	}
	if !utf8.ValidString(r["path"]) || !utf8.ValidString(r["linkpath"]) {
		r["hdrcharset"] = "BINARY"
	}
	if h.uid > maxOctal7 {
		r["uid"] = strconv.FormatUint(uint64(h.uid), 10)
	}
	if h.gid > maxOctal7 {
		r["gid"] = strconv.FormatUint(uint64(h.gid), 10)
	}
	if h.size > maxOctal11 {
		r["size"] = strconv.FormatInt(h.size, 10)
	}
	if h.mtime.Nsec != 0 || h.mtime.Sec < 0 || h.mtime.Sec > maxOctal11 {
		r["mtime"] = paxTime(h.mtime)
	}
	for name, value := range h.xattrs {
		k, v := paxXattrRecord(name, value)
		r[k] = v
	}
	var b []byte
	for _, k := range slices.Sorted(maps.Keys(r)) {
		b = append(b, paxRecord(k, r[k])...)
	}
	return b
}

// paxXattrRecord spells an xattr as star does, which every reader knows. A name
// with "=" would end too early there, and one with "%" GNU tar would decode:
// these are spelt as libarchive does.
func paxXattrRecord(name, value string) (key, text string) {
	if !strings.ContainsAny(name, "=%") {
		return paxSchily + name, value
	}
	var k strings.Builder
	k.WriteString(paxLibarchive)
	for i := range len(name) {
		if c := name[i]; c <= ' ' || c > '~' || c == '=' || c == '%' {
			fmt.Fprintf(&k, "%%%02X", c)
		} else {
			k.WriteByte(c)
		}
	}
	return k.String(), base64.RawStdEncoding.EncodeToString([]byte(value))
}

// paxRecord is "LENGTH KEY=VALUE\n", the length counting itself.
func paxRecord(k, v string) string {
	n := len(k) + len(v) + 3
	size := n + len(strconv.Itoa(n))
	if n+len(strconv.Itoa(size)) != size {
		size++
	}
	return strconv.Itoa(size) + " " + k + "=" + v + "\n"
}

// paxTime is a decimal of seconds without needless zeros. The fraction of a time
// before 1970 counts down from the second above.
func paxTime(t Timespec) string {
	sec, nsec, sign := t.Sec, t.Nsec, ""
	if sec < 0 {
		sign = "-"
		sec = -sec
		if nsec > 0 {
			sec, nsec = sec-1, 1_000_000_000-nsec
		}
	}
	s := sign + strconv.FormatInt(sec, 10)
	if nsec == 0 {
		return s
	}
	return s + "." + strings.TrimRight(fmt.Sprintf("%09d", nsec), "0")
}
