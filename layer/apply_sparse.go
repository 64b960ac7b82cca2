package layer

import (
	"bytes"
	"encoding/binary"
)

const (
	// holeBlock is the unit of holes: no common file system has larger blocks.
	holeBlock = 4096
	// leastHole is the shortest run of zeros that becomes a hole. A shorter one
	// costs more, as a system call now and as an extent for ever, than it saves.
	leastHole = 32 << 10
)

var zeroBlock [holeBlock]byte

// write appends data to the file, long runs of zeros as holes. A part begins at
// a multiple of holeBlock.
func (f *file) write(data []byte) error {
	for len(data) > 0 {
		n := dataBefore(data)
		if n > 0 {
			if _, err := f.fd.WriteAt(data[:n], f.off); err != nil {
				return err
			}
			f.off, data, f.tail = f.off+int64(n), data[n:], false
		}
		if n = zeroRun(data); n >= leastHole {
			f.off, data, f.tail = f.off+int64(n), data[n:], true
		}
	}
	return nil
}

// dataBefore is how many bytes come before the first run of zeros that is worth
// a hole.
func dataBefore(data []byte) int {
	for at := 0; at+leastHole <= len(data); {
		run := zeroRun(data[at:])
		if run >= leastHole {
			return at
		}
		at += run + holeBlock
	}
	return len(data)
}

// zeroRun is how many bytes at the start of data are zero, in whole blocks. A
// block that is not zero mostly shows it in its first or last word.
func zeroRun(data []byte) int {
	n := 0
	for ; n+holeBlock <= len(data); n += holeBlock {
		b := data[n : n+holeBlock]
		if binary.NativeEndian.Uint64(b)|binary.NativeEndian.Uint64(b[holeBlock-8:]) != 0 || !bytes.Equal(b, zeroBlock[:]) {
			break
		}
	}
	return n
}
