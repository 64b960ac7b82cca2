// Package thin keeps device-mapper thin pools: one in a directory, on sparse
// files there or on given devices. It makes the pool, opens it again after a crash
// or a reboot, sends it messages, reads its state, and makes it larger when it
// runs low. It knows no layer.
//
// # On disk
//
//	DIR/pool.json       what the pool is made of; written whole, synced, renamed
//	DIR/data, metadata  files, where no devices are given
//	DIR/lock            flock: who changes the pool
//	DIR/users           flock, shared by every process that has the pool open
//	DIR/grow            flock: who makes the pool larger; shared by who needs it running
//	DIR/snapshot        flock: who reads the pool's metadata snapshot
//	DIR/snapshot.json   of a pool on devices: that the metadata snapshot is ours
//
// # Life cycle
//
//	Open -> Pool --Exclusive--> CreateThin, CreateSnap, Delete, Activate ... -> Close
//
// Open makes what is missing and activates the pool. Close removes the pool's
// device, unless another process has the pool open or a thin device is open.
//
// # Locks
//
// Exclusive takes the Pool's mutex, then the flock on DIR/lock. What it is asked of
// says so. Nothing waits in there for somebody who has a device open. DIR/snapshot is taken
// before DIR/lock, DIR/grow after it or alone: growth does not wait for who has DIR/lock.
//
// # Trust in the pool
//
// The kernel commits the pool's metadata before a message returns. SetTransaction
// lets a caller note in the metadata how far its own records are.
//
// # Traps
//
//   - A pool that ran out of space for metadata, or whose metadata could not be
//     written, is read-only until thin_check and thin_repair have seen it; Explain
//     says so in words.
//   - Loop devices free themselves when the pool's device goes.
package thin
