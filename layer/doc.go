// Package layer is the OCI changeset: what differs between two trees (Change,
// DiffTrees), its form as a tar (WriteTar, Apply), its names (DiffID, ChainID,
// digest), and its listing, from which a layer's tree digest is taken.
//
// It knows no driver, no mount and no store. It works on directories that the
// caller vouches for, and resolves nothing below them but one component at a time.
//
// # The round trip
//
//	DiffTrees(a, b) -> Changes -> WriteTar -> tar, DiffID
//	tar -> Apply on a copy of a -> a tree equal to b
//
// Both ends are exact: Changes has what differs and nothing else, in the order of
// ComparePaths, and equal trees give equal tars, whatever file system or driver
// they lie on. ARCHITECTURE.md specifies the tar and the listing byte for byte.
//
// # Two kinds of target
//
// Apply unpacks onto a complete tree, where a whiteout removes what it names, or
// onto the upper of an overlay (Whiteouts, Lower), where it becomes what the
// kernel's overlayfs takes for one. A test holds what the kernel shows of such
// an upper against what a complete tree becomes.
//
// # Traps
//
//   - A Change is valid until the next one is asked for; its content is read
//     through directories that the iterator holds open.
//   - A tree that is written to while it is compared gives a diff of no moment in
//     particular; WriteTar at least refuses a file whose size changes under it.
//   - mtime and size prove nothing about content. DiffTrees reads both files
//     unless they are one inode, or DiffOptions.SameFile vouches for them.
//   - A hard-link group is judged by its visible names, not by st_nlink, which
//     counts names elsewhere, too.
//   - After an error Apply leaves a half-made tree; its owner removes it.
package layer
