package userns

import (
	"bufio"
	"cmp"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"strings"
)

// idRange maps size ids, inside.. to outside.. .
type idRange struct{ inside, outside, size int64 }

// idMaps are the two maps of a namespace.
type idMaps struct {
	uid, gid []idRange
	// single is why only the user's own ids are mapped; "" where ranges are.
	single string
}

// maps decides how the ids of the calling user are mapped.
func maps() idMaps { return mapsOf(os.Getuid(), os.Getgid()) }

func mapsOf(u, g int) idMaps {
	uid := int64(u)
	own := idMaps{uid: []idRange{{0, uid, 1}}, gid: []idRange{{0, int64(g), 1}}}
	for _, tool := range []string{"newuidmap", "newgidmap"} {
		if _, err := exec.LookPath(tool); err != nil {
			own.single = tool + " is not installed (package uidmap)"
			return own
		}
	}
	name := ""
	if u, err := user.LookupId(strconv.Itoa(u)); err == nil {
		name = u.Username
	}
	uids, err1 := subIDs("/etc/subuid", name, uid)
	gids, err2 := subIDs("/etc/subgid", name, uid)
	if err := cmp.Or(err1, err2); err != nil {
		own.single = err.Error()
		return own
	}
	return idMaps{uid: stack(own.uid, uids), gid: stack(own.gid, gids)}
}

// stack appends ranges at the next free inside ids.
func stack(rs []idRange, more []idRange) []idRange {
	next := rs[len(rs)-1].inside + rs[len(rs)-1].size
	for _, r := range more {
		r.inside = next
		next += r.size
		rs = append(rs, r)
	}
	return rs
}

// subIDs reads the ranges of a user, named or by number, from a subuid(5) file.
func subIDs(file, name string, uid int64) ([]idRange, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, fmt.Errorf("%s has no range for user %d: %w", file, uid, err)
	}
	defer f.Close()
	var rs []idRange
	for s := bufio.NewScanner(f); s.Scan(); {
		if r, ok := parseSubID(s.Text(), name, uid); ok {
			rs = append(rs, r)
		}
	}
	if len(rs) == 0 {
		return nil, fmt.Errorf("%s has no range for user %d", file, uid)
	}
	return rs, nil
}

// parseSubID reads one line, "USER:FIRST:COUNT".
func parseSubID(line, name string, uid int64) (idRange, bool) {
	f := strings.Split(strings.TrimSpace(line), ":")
	if len(f) != 3 || (f[0] != name || name == "") && f[0] != strconv.FormatInt(uid, 10) {
		return idRange{}, false
	}
	first, err1 := strconv.ParseInt(f[1], 10, 64)
	count, err2 := strconv.ParseInt(f[2], 10, 64)
	return idRange{0, first, count}, err1 == nil && err2 == nil && first >= 0 && count > 0
}

// writeMaps maps the ids of a new user namespace, whose first process is pid.
func writeMaps(pid int, m idMaps) error {
	if m.single != "" {
		return writeOwn(pid, m)
	}
	if err := runMapper("newuidmap", pid, m.uid); err != nil {
		return err
	}
	return runMapper("newgidmap", pid, m.gid)
}

func runMapper(tool string, pid int, rs []idRange) error {
	args := []string{strconv.Itoa(pid)}
	for _, r := range rs {
		args = append(args, fmt.Sprint(r.inside), fmt.Sprint(r.outside), fmt.Sprint(r.size))
	}
	out, err := exec.Command(tool, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", tool, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// writeOwn maps the user's own ids, which needs no privilege once setgroups(2)
// is denied (user_namespaces(7)).
func writeOwn(pid int, m idMaps) error {
	dir := fmt.Sprintf("/proc/%d/", pid)
	for _, w := range []struct{ file, text string }{
		{"setgroups", "deny"}, {"uid_map", m.uid[0].String()}, {"gid_map", m.gid[0].String()},
	} {
		if err := os.WriteFile(dir+w.file, []byte(w.text), 0); err != nil {
			return err
		}
	}
	return nil
}

func (r idRange) String() string { return fmt.Sprintf("%d %d %d", r.inside, r.outside, r.size) }
