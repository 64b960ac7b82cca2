package union

import (
	"encoding/binary"
	"encoding/hex"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// fileID names an object of a file system for good, whatever its path is: struct
// ovl_fb of linux/fs/overlayfs/overlayfs.h, as xattrs origin and upper and the
// names in index have it.
type fileID struct {
	uuid    [16]byte // of the file system
	handle  sys.FileHandle
	inUpper bool // OVL_FH_FLAG_PATH_UPPER: an object of upper
}

// The header of struct ovl_fb, in bytes: version, magic, len, flags, type, uuid.
const (
	fbHeader    = 5 + 16
	fbMagic     = 0xfb
	fbBigEndian = 1 << 0
	fbAnyEndian = 1 << 1
	fbUpper     = 1 << 2
)

// thisEndian is fbBigEndian on a machine that stores numbers so.
var thisEndian = func() byte {
	if binary.NativeEndian.Uint16([]byte{0, 1}) == 1 {
		return fbBigEndian
	}
	return 0
}()

// parse reads one. known is false where the value is valid and of no use here:
// empty ("copied up, nobody knows from what"), of a later version or of a machine
// with another byte order. attr is for the error.
func (id *fileID) parse(attr string, b []byte) (known bool, err error) {
	if len(b) == 0 {
		return false, nil
	}
	bad := func(why string) (bool, error) { return false, &corruptError{attr, why, 0} }
	if len(b) < fbHeader || len(b) < int(b[2]) {
		return bad("too short")
	}
	if b[1] != fbMagic {
		return bad("not a file handle of overlayfs")
	}
	flags := b[3]
	if b[0] > 0 || flags&^(fbBigEndian|fbAnyEndian|fbUpper) != 0 {
		return false, nil
	}
	if flags&fbAnyEndian == 0 && flags&fbBigEndian != thisEndian {
		return false, nil
	}
	n := int(b[2]) - fbHeader
	if n < 0 || n%4 != 0 || n > sys.MaxHandle {
		return bad("has a file handle of a size that none has")
	}
	*id = fileID{inUpper: flags&fbUpper != 0}
	copy(id.uuid[:], b[5:])
	id.handle.Type, id.handle.Len = int32(b[4]), n
	copy(id.handle.Data[:n], b[fbHeader:])
	return true, nil
}

// appendTo writes the value on disk, byte for byte as the kernel does.
func (id *fileID) appendTo(b []byte) []byte {
	flags := thisEndian
	if id.inUpper {
		flags |= fbUpper
	}
	b = append(b, 0, fbMagic, uint8(fbHeader+id.handle.Len), flags, uint8(id.handle.Type))
	b = append(b, id.uuid[:]...)
	return append(b, id.handle.Data[:id.handle.Len]...)
}

// indexName is the name in index of the object: its encoding in hex.
func (id *fileID) indexName() string {
	var b [fbHeader + sys.MaxHandle]byte
	return hex.EncodeToString(id.appendTo(b[:0]))
}

// parseIndexName is the inverse of indexName.
func (id *fileID) parseIndexName(name string) (known bool, err error) {
	b, err := hex.DecodeString(name)
	if err != nil || len(b) == 0 {
		return false, &corruptError{"index entry " + name, "not the name of one", 0}
	}
	return id.parse("index entry "+name, b)
}

// identify gives the fileID of name below dir ("": of dir itself, O_PATH or not);
// uuid is that of its file system. EOPNOTSUPP where the file system has no handles,
// or ones that do not fit.
func identify(dir int, name string, uuid [16]byte, id *fileID) error {
	*id = fileID{uuid: uuid}
	if _, err := sys.HandleBare(dir, name, &id.handle); err != nil {
		return err
	}
	if id.handle.Type < 0 || id.handle.Type > 0xff || id.handle.Len%4 != 0 {
		return syscall.EOPNOTSUPP
	}
	return nil
}
