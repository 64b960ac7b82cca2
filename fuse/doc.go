// Package fuse is the driver on our own union in user space, for machines and
// users that have FUSE and no overlayfs of the kernel: the same layers on disk, in
// package drivers/upper, shown by a program of its own, fuse-layerfs.
//
// It is not the union (package fuse/union), nor the wire (fuse/server), and imports
// neither: a mount is data here as with every driver, of type fuse3.fuse-layerfs,
// and whoever performs it starts one server for it. The server outlives who
// mounted, and ends with the mount.
//
// # Differences from overlay
//
//   - Owners of id-mapped layers are mapped both ways, so uppers have them as they
//     are stored (upper.Config.StoredIDs).
//   - A directory of a parent can be renamed where redirect_dir=on was asked for,
//     in a user namespace, too.
//   - A server that is killed leaves a mount whose every call is ENOTCONN, and the
//     layer as it was: each change is old or new. Unmount, and mount again.
//
// # Crash
//
// What Create, Commit, Remove and Apply leave is told in package drivers/upper.
// This driver holds no process, descriptor or lock between calls; the trees that
// Diff, Apply and Commit read are mounts attached nowhere, whose servers end with
// this process.
package fuse
