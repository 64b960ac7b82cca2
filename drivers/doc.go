// Package drivers is the contract between the snapshot store and the code that
// keeps the bytes of layers: Driver, its options and capabilities, and the
// Factory and Registry through which drivers are found and probed.
//
// # Life cycle of an ID
//
//	Create(ReadOnly: false) -> writable --Commit--> committed --Remove--> absent
//	Create(ReadOnly: true)  -> view     ------------------------Remove--> absent
//	any failure or crash    -> absent, or listed by IDs and acceptable to Remove
//
// # Busy
//
// Remove of a layer that is mounted wraps ErrFailedPrecondition; the store
// keeps the ID on its debt list and tries again. Commit of an ID whose mount
// still exists (a lazy unmount, another namespace) works: what is there is
// flushed and frozen. A writer still alive afterwards is a documented hazard
// where Capabilities.SharedWriter says so.
//
// # Registry
//
// A Registry is a value that somebody fills in one place; there is no
// registration by init. A driver is a package, a Factory, a line in the root
// package's list, and a test of three lines (package drivertest).
package drivers
