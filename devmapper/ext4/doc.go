// Package ext4 finds out which paths of two ext4 file systems may differ, from the
// blocks of their devices that do. The two share their history: one is a snapshot of the
// other that was written to, or both are snapshots of a third. The cost is that of the
// changes. It reads from two io.ReaderAt, needs no mount, and changes nothing.
//
// # The call
//
// A driver of thin devices has the ranges from metadata.Pool.Delta:
//
//	var ranges []ext4.Range
//	for r, err := range pool.Delta(fromID, toID) {
//		if err != nil {
//			return err
//		}
//		ranges = append(ranges, ext4.Range{Offset: int64(r.Begin) * blockBytes, Length: int64(r.Length) * blockBytes})
//	}
//	o := layer.DiffOptions{}
//	c, err := ext4.Changed(ctx, fromDevice, toDevice, ranges)
//	switch {
//	case err == nil:
//		o.Candidates = c.Names
//	case !errors.Is(err, ext4.ErrCannotTell):
//		return err
//	}
//	return layer.DiffTrees(ctx, fromMountpoint, toMountpoint, o)
//
// Both devices must hold still. A device that is in use is read by a snapshot of it,
// which dm makes of a file system that it froze: its journal is empty then. What the device nodes
// show must be what is on them: a node of a device that was written to through another one has
// old pages in its cache.
//
// # What is a candidate
//
// The state of an inode is its record in the inode table and the blocks that it leads to: extent
// nodes, data or names, xattrs. The state of a tree is that of the inodes, and the names in its
// directories. So two trees can differ only
//
//   - at an inode whose record differs (or that one of the two does not have in use): found by comparing the
//     blocks of inode tables that lie in the ranges;
//   - at an inode whose record is the same, and a block that it leads to is not;
//   - at a name.
//
// Of the second kind there should be none: every call that changes content, xattrs or names changes times in the
// record of the inode, and so does the first write through a mapping of a page that was
// clean. But times are not relied upon: they are as coarse as a tick of the clock, can be set back, and are put off by
// lazytime. Instead every changed block that the second file system has in use must be accounted for: it is a superblock,
// descriptor, bitmap, inode table, or of the journal, quota or orphan file; or it is one that an inode whose record differs
// leads to. A block that is not makes the answer ErrCannotTell. Since a block has
// one owner in a file system, an inode of the second kind cannot hide: in the second file system its block is in use, and no
// other inode leads to it. If it gained the block, so did its record, or an extent node of its own, which is such a block itself;
// if it lost one, likewise.
//
// Blocks of xattrs are the exception, as inodes with the same xattrs share one and a count is in it. A change of
// that count alone is none. A change of anything else needs every owner, by that count, to be an inode whose record
// differs; the kernel changes xattrs in place only in a block that one inode has for itself.
//
// Names are read where the blocks of a directory whose record differs are not the same in both: other blocks have
// the same names. A name that leads to another inode, or is only in one, is a candidate with all below it. An inode
// that keeps its names and has another record is a candidate at each of them. For a directory .. says
// where it is. For a file nothing does: directories are read for its names until there are as many as
// links, first those just before it in its inode table, those of its group, of its flex group, and then all: ext4 puts a
// file near its directory if it can. The last step is the only one that is not O(changes); it reads directories, not
// inodes of files.
//
// That an inode number may have been given to another file since changes nothing: what is compared is what is there,
// not what it once was.
//
// One of the two may have been made larger, or both. Growth leaves all that is there in its place; the groups that only
// one has are compared as if the other had none of their inodes and blocks in use.
//
// # What cannot be told
//
// Changed answers with ErrCannotTell, and the reason, when something is not understood or not as it should be: inline_data,
// ea_inode, casefold, encrypt, verity, bigalloc, and any feature unknown here; block maps of ext3; a journal that needs
// recovery; a file system that was not unmounted and has no journal, or is marked as having errors; two that are not of one
// identity; checksums that are wrong (superblock, descriptors, bitmaps, inodes, extents, directories); damage of any
// kind that it meets. The caller walks both trees then, which is always right. Damage can neither loop nor
// make it hold more than the blocks that it was led to: nodes of extents ascend, and reads are counted.
package ext4
