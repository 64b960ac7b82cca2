package send

import (
	"errors"
	"strings"
)

// attribute numbers the attributes of commands, as fs/btrfs/send.h does.
type attribute uint16

const (
	attrUUID attribute = iota + 1
	attrCtransid
	attrIno
	attrSize
	attrMode
	attrUID
	attrGID
	attrRdev
	attrCtime
	attrMtime
	attrAtime
	attrOtime
	attrXattrName
	attrXattrData
	attrPath
	attrPathTo
	attrPathLink
	attrFileOffset
	attrData
	attrCloneUUID
	attrCloneCtransid
	attrClonePath
	attrCloneOffset
	attrCloneLen
	attrFallocateMode
	attrFileAttr
	attrUnencodedFileLen
	attrUnencodedLen
	attrUnencodedOffset
	attrCompression
	attrEncryption
)

func mask(as ...attribute) (m uint64) {
	for _, a := range as {
		m |= 1 << a
	}
	return m
}

// needs says what a command may not lack.
var needs = map[Verb]uint64{
	SUBVOL: mask(attrPath, attrUUID, attrCtransid), SNAPSHOT: mask(attrPath, attrUUID, attrCtransid, attrCloneUUID, attrCloneCtransid),
	MKFILE: mask(attrPath), MKDIR: mask(attrPath), MKNOD: mask(attrPath, attrMode, attrRdev), MKFIFO: mask(attrPath), MKSOCK: mask(attrPath),
	SYMLINK: mask(attrPath, attrPathLink), RENAME: mask(attrPath, attrPathTo), LINK: mask(attrPath, attrPathLink),
	UNLINK: mask(attrPath), RMDIR: mask(attrPath),
	SET_XATTR: mask(attrPath, attrXattrName, attrXattrData), REMOVE_XATTR: mask(attrPath, attrXattrName),
	WRITE: mask(attrPath, attrFileOffset, attrData), CLONE: mask(attrPath, attrFileOffset, attrCloneLen, attrClonePath, attrCloneOffset),
	TRUNCATE: mask(attrPath, attrSize), CHMOD: mask(attrPath, attrMode), CHOWN: mask(attrPath, attrUID, attrGID),
	UTIMES: mask(attrPath, attrMtime), UPDATE_EXTENT: mask(attrPath, attrFileOffset, attrSize),
	FALLOCATE: mask(attrPath, attrFallocateMode, attrFileOffset, attrSize), FILEATTR: mask(attrPath, attrFileAttr),
	ENCODED_WRITE: mask(attrPath, attrFileOffset, attrData, attrUnencodedFileLen, attrUnencodedLen, attrUnencodedOffset),
}

// set puts one attribute into the command. Attributes that no command of these
// versions has are refused.
func (c *Command) set(a attribute, v []byte) error {
	if p := c.number(a); p != nil {
		return number(p, v)
	}
	if p := c.number32(a); p != nil {
		return number32(p, v)
	}
	if p := c.text(a); p != nil {
		return text(p, v)
	}
	switch a {
	case attrUUID:
		return uuid(&c.UUID, v)
	case attrCloneUUID:
		return uuid(&c.CloneUUID, v)
	case attrCtime:
		return timespec(&c.Ctime, v)
	case attrMtime:
		return timespec(&c.Mtime, v)
	case attrAtime:
		return timespec(&c.Atime, v)
	case attrOtime:
		return timespec(new(Timespec), v)
	case attrData:
		c.Data = v
	case attrXattrData:
		c.XattrValue = v
	default:
		return errors.New("unknown")
	}
	return nil
}

func (c *Command) number(a attribute) *uint64 {
	switch a {
	case attrCtransid:
		return &c.Ctransid
	case attrIno:
		return &c.Ino
	case attrSize:
		return &c.Size
	case attrMode:
		return &c.Mode
	case attrUID:
		return &c.UID
	case attrGID:
		return &c.GID
	case attrRdev:
		return &c.Rdev
	case attrFileOffset:
		return &c.Offset
	case attrCloneCtransid:
		return &c.CloneCtransid
	case attrCloneOffset:
		return &c.CloneOffset
	case attrCloneLen:
		return &c.CloneLen
	case attrFileAttr:
		return &c.FileAttr
	case attrUnencodedFileLen:
		return &c.UnencodedFileLen
	case attrUnencodedLen:
		return &c.UnencodedLen
	case attrUnencodedOffset:
		return &c.UnencodedOffset
	}
	return nil
}

func (c *Command) number32(a attribute) *uint32 {
	switch a {
	case attrFallocateMode:
		return &c.FallocateMode
	case attrCompression:
		return &c.Compression
	case attrEncryption:
		return &c.Encryption
	}
	return nil
}

func (c *Command) text(a attribute) *string {
	switch a {
	case attrPath:
		return &c.Path
	case attrPathTo:
		return &c.To
	case attrPathLink:
		return &c.Link
	case attrClonePath:
		return &c.ClonePath
	case attrXattrName:
		return &c.XattrName
	}
	return nil
}

func number(p *uint64, v []byte) error {
	if len(v) != 8 {
		return errSize
	}
	*p = le.Uint64(v)
	return nil
}

func number32(p *uint32, v []byte) error {
	if len(v) != 4 {
		return errSize
	}
	*p = le.Uint32(v)
	return nil
}

// text takes a string; no path and no name holds a NUL.
func text(p *string, v []byte) error {
	*p = string(v)
	if strings.ContainsRune(*p, 0) {
		return errors.New("a NUL in it")
	}
	return nil
}

func uuid(p *[16]byte, v []byte) error {
	if len(v) != 16 {
		return errSize
	}
	copy(p[:], v)
	return nil
}

func timespec(p *Timespec, v []byte) error {
	if len(v) != 12 {
		return errSize
	}
	p.Sec, p.Nsec = int64(le.Uint64(v)), le.Uint32(v[8:])
	return nil
}
