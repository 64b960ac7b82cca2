// Package snapshot is the store: it keeps names, parents, labels and the state
// of layers over any drivers, several of them side by side. It is the metadata
// half of snapshots; the bytes are the drivers' (package drivers). It knows no
// image and no container.
//
// A Store is one directory (ARCHITECTURE.md, "On disk: the store"). A View is a
// name with its own key space in it and is a containerd snapshots.Snapshotter
// with its Cleaner: the same words, the same errors of containerd/errdefs. Walk,
// Stat and Remove of a view never meet another view's keys.
//
// # Life cycle
//
//	Prepare -> active --Commit--> committed --Remove--> debt --Cleanup--> gone
//	View    -> view   ------------------------Remove--> debt --Cleanup--> gone
//
// A layer is what has an ID; a key names it. Remove drops the name durably and
// returns; the bytes become a debt that Cleanup and GC work off: a mounted layer
// is never the client's error, it stays a debt until it is free.
//
// Every committed layer gets a listing and from it a tree digest (package
// layer). View.Apply takes it in the same pass; for changes made by hand the
// store computes it after Commit, in the background; Close waits for it, and
// what was interrupted goes on at the next Open.
//
// # Several processes
//
// Any number of processes, and several Stores in one process, share a store.
// The database file is open in one of them at a time: it is opened when it is
// needed, kept while hot, and closed when idle for some milliseconds or when
// another process waits. A wait of more than two seconds is told to
// Options.Log, with the process that is waited for.
//
// No transaction is open while a driver works. Instead a call holds locks, each
// a byte range of the file "locks" that the kernel frees with the process:
//
//	key locks    exclusive: Prepare, View, Commit (key and name), Remove
//	layer locks  shared: Mounts, Usage, Diff, and the parent in Prepare;
//	             exclusive: a layer being made, Apply, Commit, bytes being removed
//	leases       exclusive, for as long as a process may use the block of IDs
//	             that it took from the counter in the database
//
// So a layer on disk without a record, of a lease that nobody holds, is what a
// dead process left; a layer without record or lease is nothing that the store
// knows, and only Check speaks of it. IDs are never used twice, crash or not.
//
// # Lock order
//
//	that of recovery, or of migrations
//	  key locks, by number
//	    layer locks: the layer's own, then its parent's
//	      driver set (driversMu), ID block (idsMu)
//	        database: batch queue (queueMu), then gate (gateMu), then reserve (reserveMu)
//
// Whoever holds a lock may take those below it. GC and recovery never wait
// for a layer lock: they try, and leave what is in use. Check waits for shared
// ones, and for a listing that another makes. A shared layer lock is given
// even when somebody waits for the exclusive one, so that a caller who ranges
// over Diff may call Mounts of the same key.
//
// # Crash states
//
//	in Prepare, before its record   bytes without a record: removed by the next Open
//	in Commit, after its intent     frozen by the driver: Open finishes the Commit;
//	                                not yet frozen: the key stays active
//	in Remove                       the key is there, or its bytes are a debt
//	in Cleanup                      the debt is still there, and Remove is repeatable; records go
//	                                after a flush, so a power cut brings nothing back
//	in Apply                        the key is active with part of the layer in it
//	in a background listing         listed as pending, done by the next Open
//	in Migrate, before all copies   every name as it was; copies without a name, which the
//	                                next one takes, or CallOffMigration gives up
//
// # Traps
//
//   - Commit of a key inside a range over its own Diff waits for itself.
//   - Prepare and View hand out mounts, so the store cannot know what is written
//     through them: Apply onto such a key leaves the listing to the background.
//     Create makes a key without handing out mounts.
//   - Mounts of a View are such as others can perform (drivers.MountOptions
//     External), and are refused beyond what others can mount; MountsWith, or a
//     handle from View.With, is for package mount.
//   - Close does not wait for calls that are at work: they end in ErrUnavailable and
//     leave what a crash would; each keeps its locks until it has returned.
//   - View.Close does nothing: a view is a handle, the Store is what is closed.
package snapshot
