package uniontest

import (
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// nestedCases are about overlay xattrs that are content: a layer may hold the
// layers of another union.
var nestedCases = map[string]func(*Kit){
	"an escaped xattr of a lower is shown": func(k *Kit) {
		k.union(dir("d"), xattr("d", k.ov("overlay.opaque"), "y"), file("d/f", "x"), xattr("d/f", k.ov("overlay.redirect"), "/r"))
		equal(k, "opaque", k.xattr("d", k.ov("opaque")), "y")
		equal(k, "redirect", k.xattr("d/f", k.ov("redirect")), "/r")
		equal(k, "names", strings.Join(k.xattrNames("d"), " "), k.ov("opaque"))
	},
	"an xattr that is set is escaped": func(k *Kit) {
		k.union(dir("d"), file("d/f", "x"))
		k.setxattr("d", k.ov("opaque"), "y")
		equal(k, "in the upper", k.xattrAt(k.u("d"), k.ov("overlay.opaque")), "y")
		equal(k, "in the mount", k.xattr("d", k.ov("opaque")), "y")
		k.upperOpaque("d", false)
		k.holds("d", "f")
		k.remount()
		k.holds("d", "f")
		k.ok(unix.Removexattr(k.p("d"), k.ov("opaque")))
		k.noXattr(k.u("d"), k.ov("overlay.opaque"))
		k.noXattr(k.p("d"), k.ov("opaque"))
	},
	"escaped twice": func(k *Kit) {
		k.union(file("f", "x"), xattr("f", k.ov("overlay.overlay.x"), "deep"))
		equal(k, "value", k.xattr("f", k.ov("overlay.x")), "deep")
		k.setxattr("f", k.ov("overlay.y"), "1")
		equal(k, "in the upper", k.xattrAt(k.u("f"), k.ov("overlay.overlay.y")), "1")
	},
	"the union's own xattrs are not shown": func(k *Kit) {
		k.lower(dir("d"), opaque("d", "y"), file("d/f", "x"), xattr("d/f", "user.keep", "1"))
		k.union(file("d/g", "y"))
		k.chmod("d/f", 0o600)
		for _, p := range []string{".", "d", "d/f"} {
			for _, n := range k.xattrNames(p) {
				k.that(!strings.HasPrefix(n, k.ov("")), "%s shows %s", p, n)
			}
		}
		_, err := getxattr(k.p("d"), k.ov("opaque"))
		k.is(unix.ENODATA, err)
		_, err = getxattr(k.p("d/f"), k.ov("origin"))
		k.is(unix.ENODATA, err)
		k.that(slices.Contains(k.xattrNames("d/f"), "user.keep"), "user.keep is gone")
	},
	"the union's own xattrs cannot be removed": func(k *Kit) {
		k.lower(file("x", "1"))
		k.union(file("d/g", "y"))
		k.removeAll("d")
		k.makedir("d")
		k.is(unix.ENODATA, unix.Removexattr(k.p("d"), k.ov("opaque")))
		k.upperOpaque("d", true)
		k.holds("d")
	},
	"escaped xattrs are copied up": func(k *Kit) {
		k.union(file("f", "x"), xattr("f", k.ov("overlay.metacopy"), "m"), dir("d"), xattr("d", k.ov("overlay.opaque"), "y"), file("d/g", "g"))
		k.chmod("f", 0o600)
		k.chmod("d", 0o700)
		equal(k, "f", k.xattr("f", k.ov("metacopy")), "m")
		equal(k, "in the upper", k.xattrAt(k.u("f"), k.ov("overlay.metacopy")), "m")
		equal(k, "d", k.xattr("d", k.ov("opaque")), "y")
		k.upperOpaque("d", false)
		k.reads("f", "x")
		k.remount()
		k.holds("d", "g")
		k.reads("f", "x")
	},
	"a whiteout of an inner union is plain inside": func(k *Kit) {
		k.union(dir("d"), file("d/w", ""), xattr("d/w", k.ov("overlay.whiteout"), "y"), xattr("d", k.ov("overlay.opaque"), "x"))
		k.reads("d/w", "")
		equal(k, "xattr", k.xattr("d/w", k.ov("whiteout")), "y")
	},
	"an xattr whiteout made in the mount is one for an inner union": func(k *Kit) {
		k.union(file("x", "1"))
		k.makedir("d")
		k.setxattr("d", k.ov("opaque"), "x")
		k.write("d/w", "")
		k.setxattr("d/w", k.ov("whiteout"), "y")
		k.present("d/w")
		k.remount()
		k.present("d/w")
		equal(k, "in the upper", k.xattrAt(k.u("d/w"), k.ov("overlay.whiteout")), "y")
	},
	"the other namespace's xattrs are plain": func(k *Kit) {
		other := map[string]string{"trusted.overlay.": "user.overlay.x", "user.overlay.": "trusted.overlay.x"}[k.ov("")]
		if strings.HasPrefix(other, "trusted") {
			k.needRoot("trusted xattrs")
		}
		k.union(file("f", "x"), xattr("f", other, "1"))
		equal(k, "value", k.xattr("f", other), "1")
		k.setxattr("f", other, "2")
		equal(k, "in the upper", k.xattrAt(k.u("f"), other), "2")
	},
	"userxattr escapes user.overlay": func(k *Kit) {
		k.options("userxattr")
		k.union(dir("d"), xattr("d", "user.overlay.overlay.opaque", "y"), file("d/f", "x"))
		equal(k, "value", k.xattr("d", "user.overlay.opaque"), "y")
		k.setxattr("d/f", "user.overlay.redirect", "z")
		equal(k, "in the upper", k.xattrAt(k.u("d/f"), "user.overlay.overlay.redirect"), "z")
	},
}
