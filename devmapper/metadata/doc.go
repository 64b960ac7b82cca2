// Package metadata reads dm-thin's metadata: which data block each virtual block
// of each thin device is mapped to. It is pure decoding over an io.ReaderAt,
// which OpenFile gives; it needs no device, no right and no kernel.
//
// # The format
//
// Blocks of 4096 bytes, little-endian, each with a CRC-32C over all but its first
// four bytes, xored with a number of its kind. Block 0 is the superblock. It names
// two B+trees: one of details (device ID to mapped blocks, transaction, times) and
// one in two levels of mappings (device ID to the root of the device's tree; virtual
// block to data block and time), and two space maps, which count the users of blocks and only
// Check reads. Nodes are never changed while more than one tree has them: a snapshot begins
// as a second name of its origin's root, and a write copies the nodes from the root to
// its leaf. So two devices' trees have a block in common exactly where nobody wrote
// since, which makes Delta and Exclusive O(changes): they go through both trees together
// and pass over what has the same block number in both.
//
// # What may be read when
//
// The kernel changes the metadata of a running pool at any time, but what a superblock leads
// to stays until there is another one. Two states hold still for as long as one likes:
//
//   - the metadata snapshot (the message reserve_metadata_snap): it is a superblock of its own,
//     whose block number is Superblock.HeldRoot, and Pool.Snapshot opens it. Its trees stay until
//     release_metadata_snap.
//   - the metadata of a pool that is not active, or is suspended: Open alone.
//
// Without them a running pool can be read, too, if that does not take long: what was read, and each
// error on the way, holds if a second Open finds the same superblock afterwards, and is to be forgotten
// else. The superblock is written whole, but a read may meet the write: one that fails with a checksum
// is worth another try.
//
// The kernel writes past the page cache of the metadata device. What is in that cache may be from
// before, with checksums that are right, so a reader of a device that is in use must read past it, too: OpenFile does.
// Every read here is of 4096 bytes at a multiple of 4096.
//
// # Errors
//
// What is read is trusted with nothing: checksums, block numbers, node sizes, order and range of
// keys, depths and data blocks are checked as they are met, so a tree cannot loop, and no walk holds more
// than a path of nodes. Such a finding names the block and wraps ErrDataLoss of containerd/errdefs. What is
// no thin metadata at all wraps ErrInvalidArgument, features unknown here ErrNotImplemented, a device that
// does not exist, and a snapshot that nobody took, ErrNotFound.
//
// A Pool has no state of its own but its superblock: many goroutines may use one if its reader allows it.
package metadata
