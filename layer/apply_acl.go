package layer

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// paxACLs are the PAX records in which star, GNU tar --acls and bsdtar keep
// POSIX ACLs as text. A layer has them as xattrs, which come first.
var paxACLs = map[string]string{
	"SCHILY.acl.access":  "system.posix_acl_access",
	"SCHILY.acl.default": "system.posix_acl_default",
}

// Tags of an ACL entry (include/uapi/linux/posix_acl.h).
const (
	aclUserObj  = 0x01
	aclUser     = 0x02
	aclGroupObj = 0x04
	aclGroup    = 0x08
	aclMask     = 0x10
	aclOther    = 0x20

	aclVersion = 2
	aclNoID    = ^uint32(0)
)

type aclEntry struct {
	tag, perm uint16
	id        uint32
}

var aclTags = map[string][2]uint16{ // without and with a qualifier
	"user": {aclUserObj, aclUser}, "u": {aclUserObj, aclUser},
	"group": {aclGroupObj, aclGroup}, "g": {aclGroupObj, aclGroup},
	"mask": {aclMask, 0}, "m": {aclMask, 0}, "other": {aclOther, 0}, "o": {aclOther, 0},
}

// parseACL turns an ACL's text (acl(5), with a numeric id as qualifier or as
// star's fourth field) into the xattr's value (struct posix_acl_xattr_header).
// A name without an id says nothing outside the system that wrote it.
func parseACL(text string) (string, error) {
	var all []aclEntry
	for line := range strings.FieldsFuncSeq(text, func(r rune) bool { return r == ',' || r == '\n' }) {
		line, _, _ = strings.Cut(line, "#")
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		e, err := parseACLEntry(line)
		if err != nil {
			return "", err
		}
		all = append(all, e)
	}
	slices.SortStableFunc(all, func(a, b aclEntry) int { // as the kernel wants them
		if a.tag != b.tag {
			return int(a.tag) - int(b.tag)
		}
		return int(int64(a.id) - int64(b.id))
	})
	b := binary.LittleEndian.AppendUint32(nil, aclVersion)
	for _, e := range all {
		b = binary.LittleEndian.AppendUint16(b, e.tag)
		b = binary.LittleEndian.AppendUint16(b, e.perm)
		b = binary.LittleEndian.AppendUint32(b, e.id)
	}
	return string(b), nil
}

func parseACLEntry(s string) (aclEntry, error) {
	bad := fmt.Errorf("ACL entry %q: %w", s, errdefs.ErrInvalidArgument)
	f := strings.Split(s, ":")
	tags, known := aclTags[f[0]]
	if len(f) == 2 && tags[1] == 0 { // "mask:rwx"
		f = slices.Insert(f, 1, "")
	}
	if !known || len(f) < 3 || len(f) > 4 {
		return aclEntry{}, bad
	}
	e := aclEntry{tag: tags[0], id: aclNoID}
	for _, c := range f[2] {
		bit, ok := map[rune]uint16{'r': 4, 'w': 2, 'x': 1, '-': 0}[c]
		if !ok {
			return e, bad
		}
		e.perm |= bit
	}
	if f[1] == "" {
		return e, nil
	}
	id, err := strconv.ParseUint(f[len(f)-1], 10, 32)
	if len(f) == 3 {
		id, err = strconv.ParseUint(f[1], 10, 32)
	}
	if err != nil || tags[1] == 0 {
		return e, bad
	}
	e.tag, e.id = tags[1], uint32(id)
	return e, nil
}

// minimalACL reports whether an ACL says no more than a mode does.
func minimalACL(value string) bool { return len(value) <= 4+3*8 }
