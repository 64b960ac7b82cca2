package uniontest

import "encoding/binary"

// parseDirents reads struct linux_dirent64 (getdents64(2)) after struct.
func parseDirents(b []byte) []namedDirent {
	var all []namedDirent
	for len(b) >= 19 {
		size := int(binary.NativeEndian.Uint16(b[16:]))
		name := b[19:size]
		for i, c := range name {
			if c == 0 {
				name = name[:i]
				break
			}
		}
		all = append(all, namedDirent{string(name), dirent{
			ino: binary.NativeEndian.Uint64(b), off: int64(binary.NativeEndian.Uint64(b[8:])), typ: b[18],
		}})
		b = b[size:]
	}
	return all
}
