#!/bin/sh
# The main job of layerctl, on a tree that is on every machine that builds it: the
# Go toolchain's own. Usage: demo.sh LAYERCTL
#
# Everything is made in one temporary directory, which goes at the end.
set -eu

layerctl=$(realpath "${1:?usage: demo.sh LAYERCTL}")
goroot=$(go env GOROOT)
work=
uid=$(id -u)

fail() { echo "demo: $*" >&2; exit 1; }

# An ordinary user's mounts are seen where "layerctl unshare" runs a command;
# root sees them as they are.
inside() {
	if [ "$uid" = 0 ]; then show "$@"; else show "$layerctl" --root "$root" unshare "$@"; fi
}

cleanup() {
	code=$?
	trap '' INT TERM HUP
	trap - EXIT
	if [ -n "$work" ] && [ -d "$work" ]; then
		"$layerctl" --root "$work/store" --quiet umount --all --lazy || true
		# the store of an ordinary user may hold files of other ids of its range
		if [ "$uid" = 0 ]; then rm -rf --one-file-system "$work"
		else "$layerctl" --root "$work/store" unshare rm -rf "$work/store" && rm -rf "$work"; fi
	fi
	exit $code
}
trap cleanup EXIT
trap 'exit 130' INT TERM HUP

# --- where: a directory whose file system can carry the best driver -----------
default_driver() { "$layerctl" --root "$1/store" info --format '{{.Default}}'; }

for dir in "${TMPDIR:-}" /var/tmp /tmp /dev/shm "$HOME"; do
	[ -n "$dir" ] && [ -d "$dir" ] && [ -w "$dir" ] || continue
	try=$(mktemp -d "$dir/layerctl-demo.XXXXXX") || continue
	chosen=$(default_driver "$try") || chosen=
	if [ -z "$work" ] || [ "$chosen" = overlay ]; then
		[ -z "$work" ] || rmdir "$work"
		work=$try driver=$chosen
	else
		rmdir "$try"
	fi
	[ "$driver" != overlay ] || break
done
[ -n "$work" ] || fail "no directory to work in: set TMPDIR"
[ -n "$driver" ] || fail "no driver works in $work: layerctl info says why"
root=$work/store
cd "$work"

# --- showing: the command as it would be typed, its output, its time -----------
now() { date +%s%N; }
took() { awk -v a="$1" -v b="$(now)" 'BEGIN { printf "%.2f s", (b - a) / 1e9 }'; }
say() { printf '\n# %s\n' "$*"; }

show() {
	printf '$ %s\n' "$(printf '%s ' "$@" | sed -e "s|$layerctl|layerctl|g" -e "s|$root|\$R|g" -e "s|$work/||g" -e "s|$goroot|\$GOROOT|g" -e 's/ $//')"
	start=$(now)
	"$@"
	printf '  (%s)\n' "$(took "$start")"
}
run() { show "$layerctl" --root "$root" "$@"; }
size() { du -sh "$1" | cut -f1; }

begin=$(now)
files=$(find "$goroot" | wc -l)
echo "The tree: $goroot, $files files, $(size "$goroot"). The store: \$R = $root"

say "Which driver works here, and why"
"$layerctl" --root "$root" info --format '{{range .Drivers}}{{.Name}}: {{.Works}}: {{.Reason}}
{{end}}chosen: {{.Default}}, the best that works here for {{.User}}'
if [ "$uid" = 0 ] && [ "$driver" != overlay ]; then
	"$layerctl" --root "$root" info
	fail "root on this machine should get overlay and got $driver"
fi

say "Import the tree as a base layer"
run import "$goroot" base
before=$("$layerctl" --root "$root" --quiet ls --format '{{.Name}} {{.Digest}}')

say "Mount a writable layer on it"
run mount --rw --name work base
m=$root/mnt/work

say "Run programs out of the mount"
inside "$m/bin/go" version
inside "$m/bin/gofmt" -l "$m/src/fmt"

say "Change things: a file's content, a mode, a new directory, a deleted one"
cat >"$work/change.sh" <<'EOF'
set -e
cd "$1"
echo "// changed" >>src/fmt/print.go
chmod 600 README.md
mkdir -p site/hello
printf 'package main\n\nfunc main() { println("hello from a layer") }\n' >site/hello/main.go
ln -s ../bin site/bin
rm -rf test/fixedbugs
EOF
inside sh "$work/change.sh" "$m"

say "What the writable layer holds, and what it changes"
run usage work
run diff work
run diff work -o "$work/work.tar.zst"

say "Unmount it and freeze it as a new layer"
run umount work
run commit work base2
run ls

say "Mount the result read-only, and see the change"
run mount base2
inside tail -n 1 "$root/mnt/base2/src/fmt/print.go"
run umount base2

say "Export it as an OCI image layout, one layer for each snapshot"
run save base2 -o "$work/oci" --compress zstd
echo "  $(size "$work/oci") in $(find "$work/oci" -type f | wc -l) files"

say "Every byte of every layer is what its tree digest says, base's as it was imported"
run check
after=$("$layerctl" --root "$root" --quiet ls --format '{{.Name}} {{.Digest}}' | grep '^base ')
[ -n "${before#base }" ] && [ "$before" = "$after" ] || fail "the base changed: $before, $after"
"$layerctl" --root "$root" --quiet diff base2 --format '{{.Kind}} {{.Path}}' >"$work/lines"
for line in 'C /src/fmt/print.go' 'C /README.md' 'A /site/hello/main.go' 'D /test/fixedbugs'; do
	grep -qxF "$line" "$work/lines" || fail "the committed layer lacks: $line"
done
echo "base2 differs from it in $(wc -l <"$work/lines") paths; store: $(size "$root")"
printf '\nDone with driver %s in %s.\n' "$driver" "$(took "$begin")"
