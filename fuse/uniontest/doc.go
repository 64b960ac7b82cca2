// Package uniontest is the test suite of union file systems: what a mounted
// union of layers must show, and what it must leave on disk. It runs on the
// kernel's overlayfs, which decides what is right, and on anything that takes
// the same layers and options, such as a FUSE server.
//
// # Cases
//
// Cases are functions in groups, by name. A case builds its layers by changes
// (file, dir, whiteout, ...), mounts them, works in the mount and says what must
// be seen there and in the upper. Afterwards the Kit checks by itself that
//
//   - every lower is what it was: names, types, modes, owners, sizes, times,
//     xattrs, content;
//   - nothing that should be gone is left in the workdir;
//   - the reader, another Subject, mounts the same layers and lists them exactly
//     as the actor did before it unmounted.
//
// On a Subject that is not the kernel every case runs twice: the Subject acts
// and the kernel reads, then the kernel acts and the Subject reads; and the two
// uppers must be equal on disk, overlay xattrs included, but for what cannot be
// (file handles, times that are "now").
//
// # The differential test
//
// Differential draws random operations and does them on a kernel overlay and on
// a Subject over equal layers, comparing each result, then the trees, then the
// uppers, each mounted by the other. A difference is printed as a seed and the
// shortest failing list found, to be kept in testdata, where it is replayed.
//
// # Differences
//
// What a Subject cannot do, by nature, is in Subject.Differences with the reason.
// A case that meets one checks that it is really so.
//
// # Environment
//
//	LAYERCTL_SEED=N            the seed of the random operations
//	LAYERCTL_REPLAY=FILE       a list of operations instead of random ones
//	LAYERCTL_DIFFERENTIAL=1h   how long random operations are drawn
//	LAYERCTL_FS=ext4,xfs       only these file systems
//
// # Traps
//
// Nothing here runs in parallel: umask and drop_caches belong to the whole
// process or machine. A case that works as another user does it in a thread of
// its own that ends with it (Kit.as).
package uniontest
