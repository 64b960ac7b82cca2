// Package drivertest is the conformance suite that every driver runs, those of
// other modules too. A driver's own test is three lines:
//
//	func TestMain(m *testing.M)          { drivertest.Main(m) }
//	func TestDriver(t *testing.T)        { drivertest.Run(t, drivertest.Config{Factory: overlay.Factory()}) }
//	func BenchmarkDriver(b *testing.B)   { drivertest.Bench(b, drivertest.Config{Factory: overlay.Factory()}) }
//
// # What it checks
//
// What drivers.Driver says, case by case, on a file system of each kind that is
// made for the test, as root and once more as an unprivileged user in a user
// namespace. Behaviour is compared with a plain directory that gets the same
// changes; a driver's changesets are compared as tar bytes with those of the
// exact double walk over the two mounted trees. Differences that a driver may
// have are the named ones of drivers.Capabilities, and each of them is shown to
// be so. What Config.Must lists may not be missing.
//
// Cases end with a check that the driver's storage is empty again and that no
// mount, descriptor, process or loop device is left.
//
// # Steps
//
// The cases about errors, cancelled contexts and crashes stop at every
// drivers.Step that the driver passes. A driver without steps skips them, which
// is counted.
//
// # Random operations
//
// The model test draws operations from a seed, LAYERCTL_SEED or a new one, and
// prints with a failure the seed and the shortest failing list that it found.
// LAYERCTL_REPLAY=FILE runs the list in FILE instead; lists that once failed stand
// in testdata and run always.
//
// # Environment
//
//	LAYERCTL_SEED=N       the model test's seed
//	LAYERCTL_REPLAY=FILE  a list of operations to run instead of random ones
//	LAYERCTL_FS=ext4,xfs  only these file systems
package drivertest
