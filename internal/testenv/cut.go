package testenv

import (
	"bytes"
	"errors"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// CopyImage copies the file of a file system on a loop device (Image), which may be in
// use: the copy is what a power cut at this moment would leave. File systems write to
// their device at any time, and a copy of two moments would be what no cut leaves; so it
// copies again until nothing has changed meanwhile.
func CopyImage(dir, to string) error {
	from := Image(dir)
	for range 10 {
		if err := CopySparse(from, to); err != nil {
			return err
		}
		same, err := sameContent(from, to)
		if err != nil || same {
			return err
		}
	}
	return errors.New(from + " is written to all the time")
}

// CopySparse copies a file but for its holes.
func CopySparse(from, to string) error {
	in, err := sys.Open(from, sys.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := sys.Open(to, sys.O_RDWR|sys.O_CREAT|sys.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	st, err := in.Stat("")
	if err != nil {
		return err
	}
	if err := out.Truncate(st.Size); err != nil {
		return err
	}
	return eachExtent(in, func(off int64, b []byte) error {
		_, err := out.WriteAt(b, off)
		return err
	})
}

// sameContent compares the data of a with b, which was copied from it.
func sameContent(a, b string) (bool, error) {
	one, err := sys.Open(a, sys.O_RDONLY, 0)
	if err != nil {
		return false, err
	}
	defer one.Close()
	two, err := sys.Open(b, sys.O_RDONLY, 0)
	if err != nil {
		return false, err
	}
	defer two.Close()
	same := true
	buf := make([]byte, extentBytes)
	err = eachExtent(one, func(off int64, data []byte) error {
		if _, err := two.ReadAt(buf[:len(data)], off); err != nil {
			return err
		}
		same = same && bytes.Equal(data, buf[:len(data)])
		return nil
	})
	return same, err
}

const extentBytes = 1 << 20

// eachExtent calls f with the data of a sparse file, piece by piece.
func eachExtent(in *sys.Fd, f func(off int64, b []byte) error) error {
	buf := make([]byte, extentBytes)
	for off := int64(0); ; {
		data, err := in.SeekData(off)
		if errors.Is(err, syscall.ENXIO) {
			return nil
		}
		if err != nil {
			return err
		}
		end, err := in.SeekHole(data)
		if err != nil {
			return err
		}
		off = min(end, data+extentBytes)
		if _, err := in.ReadAt(buf[:off-data], data); err != nil {
			return err
		}
		if err := f(data, buf[:off-data]); err != nil {
			return err
		}
	}
}
