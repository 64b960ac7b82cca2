package uniontest

// groups are all cases, each in the file of its concept.
func groups() []group {
	return []group{
		{name: "whiteouts", cases: whiteoutCases, union: true, user: true},
		{name: "copy-up", cases: copyUpCases, union: true, user: true},
		{name: "inodes", cases: inodeCases, union: true, user: true},
		{name: "metacopy", cases: metacopyCases, union: true},
		{name: "redirect", cases: redirectCases, union: true},
		{name: "links", cases: linkCases, union: true, user: true},
		{name: "mounts", cases: mountCases, user: true},
		{name: "renames", cases: renameCases()},
		{name: "readdir", cases: readdirCases},
		{name: "attributes", cases: attrCases},
		{name: "io", cases: ioCases},
		{name: "locks", cases: lockCases},
		{name: "permissions", cases: permissionCases},
		{name: "faults", cases: faultCases},
		{name: "guards", cases: guardCases, union: true},
		{name: "nested", cases: nestedCases, union: true, user: true},
	}
}
