package union

import (
	"encoding/binary"
	"syscall"
)

// owners turns owners as the layers store them (host) into those that are shown,
// and back: Config.IDMap, then Config.Squash. Immutable.
type owners struct {
	ids    IDMap
	squash Squash
	plain  bool // nothing is turned
}

func newOwners(c *Config) owners {
	return owners{c.IDMap, c.Squash, len(c.IDMap.UIDs) == 0 && len(c.IDMap.GIDs) == 0 && c.Squash.UID == nil && c.Squash.GID == nil}
}

// overflowID is what an id without a place in the map is shown as: the kernel's
// overflowuid and overflowgid, as they come.
const overflowID = 65534

// shown returns the owner that is seen.
func (o *owners) shown(uid, gid uint32) (uint32, uint32) {
	if o.plain {
		return uid, gid
	}
	return shownID(o.ids.UIDs, o.squash.UID, uid), shownID(o.ids.GIDs, o.squash.GID, gid)
}

func shownID(ranges []IDRange, squash *uint32, id uint32) uint32 {
	if squash != nil {
		return *squash
	}
	if len(ranges) == 0 {
		return id
	}
	for _, r := range ranges {
		if id >= r.Host && id-r.Host < r.Size {
			return r.Shown + (id - r.Host)
		}
	}
	return overflowID
}

// host returns what a layer stores for an owner that is seen. EOVERFLOW for one
// without a place in the map, as on an id-mapped mount. All owners that are squashed
// look alike, and are stored as they look.
func (o *owners) host(c Caller) (Caller, error) {
	if o.plain {
		return c, nil
	}
	var err error
	if c.UID, err = hostID(o.ids.UIDs, o.squash.UID, c.UID); err != nil {
		return c, err
	}
	c.GID, err = hostID(o.ids.GIDs, o.squash.GID, c.GID)
	return c, err
}

func hostID(ranges []IDRange, squash *uint32, id uint32) (uint32, error) {
	if squash != nil {
		return *squash, nil
	}
	if len(ranges) == 0 {
		return id, nil
	}
	for _, r := range ranges {
		if id >= r.Shown && id-r.Shown < r.Size {
			return r.Host + (id - r.Shown), nil
		}
	}
	return 0, syscall.EOVERFLOW
}

// A POSIX ACL as an xattr (linux/include/uapi/linux/posix_acl_xattr.h): a version,
// then entries of tag, permissions and id, of which two kinds name somebody.
const (
	aclHeader = 4
	aclEntry  = 8
	aclUser   = 0x02
	aclGroup  = 0x08
)

// showACL turns the ids of an ACL in place.
func (o *owners) showACL(acl []byte) {
	if o.plain {
		return
	}
	for e := range aclEntries(acl) {
		id := binary.LittleEndian.Uint32(e[4:])
		switch binary.LittleEndian.Uint16(e) {
		case aclUser:
			id = shownID(o.ids.UIDs, nil, id)
		case aclGroup:
			id = shownID(o.ids.GIDs, nil, id)
		}
		binary.LittleEndian.PutUint32(e[4:], id)
	}
}

// hostACL returns an ACL with the ids that a layer stores.
func (o *owners) hostACL(acl []byte) ([]byte, error) {
	if o.plain {
		return acl, nil
	}
	acl = append([]byte(nil), acl...)
	for e := range aclEntries(acl) {
		id := binary.LittleEndian.Uint32(e[4:])
		var err error
		switch binary.LittleEndian.Uint16(e) {
		case aclUser:
			id, err = hostID(o.ids.UIDs, nil, id)
		case aclGroup:
			id, err = hostID(o.ids.GIDs, nil, id)
		}
		if err != nil {
			return nil, err
		}
		binary.LittleEndian.PutUint32(e[4:], id)
	}
	return acl, nil
}

func aclEntries(acl []byte) func(yield func([]byte) bool) {
	return func(yield func([]byte) bool) {
		for rest := acl; len(rest) >= aclHeader+aclEntry; rest = rest[aclEntry:] {
			if !yield(rest[aclHeader : aclHeader+aclEntry]) {
				return
			}
		}
	}
}
