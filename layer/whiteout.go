package layer

import (
	"errors"
	"fmt"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/sys"
)

// Names that an OCI layer gives a meaning (image-spec, layer.md, "Whiteouts").
const (
	// WhiteoutPrefix begins the name of an entry that deletes the rest of it.
	WhiteoutPrefix = ".wh."
	// OpaqueMarker is the entry that hides all that is below its directory.
	OpaqueMarker = ".wh..wh..opq"
	// aufsPrefix begins what aufs kept in its branches; OCI took one name of it.
	aufsPrefix = ".wh..wh."
)

// TarName is what the last component of an archive entry's path means.
type TarName int

// The meanings.
const (
	NamePlain    TarName = iota // a file of the layer
	NameWhiteout                // deletes its victim below
	NameOpaque                  // hides its directory's content below
	NameAUFS                    // metadata of aufs, which means nothing to a layer
)

// ParseTarName tells what base, the last component of an entry's path, means,
// and for NameWhiteout the name that it deletes. It wraps ErrInvalidArgument for
// a whiteout of "", "." or "..".
func ParseTarName(base string) (kind TarName, victim string, err error) {
	rest, ok := strings.CutPrefix(base, WhiteoutPrefix)
	switch {
	case !ok:
		return NamePlain, "", nil
	case base == OpaqueMarker:
		return NameOpaque, "", nil
	case strings.HasPrefix(base, aufsPrefix):
		return NameAUFS, "", nil
	case rest == "" || rest == "." || rest == ".." || strings.ContainsAny(rest, "/\x00"):
		return NamePlain, "", fmt.Errorf("a whiteout of %q: %w", rest, errdefs.ErrInvalidArgument)
	}
	return NameWhiteout, rest, nil
}

// Values of the overlayfs xattr "opaque" (fs/overlayfs/overlayfs.h, 6.18).
const (
	opaqueYes       = "y" // nothing below this directory is seen
	opaqueWhiteouts = "x" // files in it with the xattr "whiteout" are whiteouts
)

// overlayXattr is the full name of an overlayfs xattr in the encoding w.
func (w Whiteouts) overlayXattr(name string) string {
	if w == WhiteoutsUser {
		return "user.overlay." + name
	}
	return "trusted.overlay." + name
}

// IsWhiteout reports whether name in dir, which st describes, is a whiteout in
// the encoding w. A tree with WhiteoutsNone has none.
func (w Whiteouts) IsWhiteout(dir *sys.Fd, name string, st *sys.Stat) (bool, error) {
	if w == WhiteoutsNone {
		return false, nil
	}
	if st.IsWhiteout() {
		return true, nil
	}
	if !st.IsReg() || st.Size != 0 {
		return false, nil
	}
	_, err := dir.Getxattr(name, w.overlayXattr("whiteout"))
	return err == nil, noXattr(err)
}

// IsOpaque reports whether the open directory hides what is below it.
func (w Whiteouts) IsOpaque(dir *sys.Fd) (bool, error) {
	if w == WhiteoutsNone {
		return false, nil
	}
	v, err := dir.Getxattr("", w.overlayXattr("opaque"))
	return err == nil && v == opaqueYes, noXattr(err)
}

// SetOpaque makes the open directory hide what is below it.
func (w Whiteouts) SetOpaque(dir *sys.Fd) error {
	return dir.Setxattr("", w.overlayXattr("opaque"), opaqueYes)
}

// MakeWhiteout hides name, which must not be in dir: a 0/0 character device, or
// with WhiteoutsUser where mknod is denied (it needs no privilege since Linux
// 5.8) an empty file with an xattr, which Linux 6.7 understands.
func (w Whiteouts) MakeWhiteout(dir *sys.Fd, name string) error {
	err := dir.Mknod(name, sys.S_IFCHR, 0, 0)
	if w != WhiteoutsUser || !errors.Is(err, syscall.EPERM) {
		return err
	}
	return w.makeXattrWhiteout(dir, name)
}

func (w Whiteouts) makeXattrWhiteout(dir *sys.Fd, name string) error {
	fd, err := dir.Openat(name, sys.O_WRONLY|sys.O_CREAT|sys.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer fd.Close()
	if err := fd.Setxattr("", w.overlayXattr("whiteout"), opaqueYes); err != nil {
		return err
	}
	return dir.Setxattr("", w.overlayXattr("opaque"), opaqueWhiteouts)
}

// noXattr is err, but nil where it says only that the xattr is not there.
func noXattr(err error) error {
	if errors.Is(err, syscall.ENODATA) || errors.Is(err, syscall.EOPNOTSUPP) {
		return nil
	}
	return err
}
