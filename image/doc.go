// Package image keeps OCI images and moves them: it reads OCI image layouts
// (directory and tar) and docker-archives, keeps their blobs, unpacks their
// layers into snapshots by ChainID, and writes layouts and archives back.
//
// It knows no driver and performs no mount: layers go in and out through
// Snapshots, which a view of package snapshot is.
//
// # The store's folder
//
// A Store is itself an OCI image layout, so that other tools read it in place:
//
//	oci-layout       the layout's version
//	index.json       the images: names are org.opencontainers.image.ref.name annotations
//	blobs/ALG/HEX    the blobs, read-only files, written by containerd's content store
//	ingest/          what is being written; nothing there is ever read back
//
// # Life cycle of an image
//
//	Load -> listed, blobs kept --Unpack--> snapshots named by ChainID
//	                           --DropLayers--> listed, layers only in the snapshots
//	Remove -> not listed --GC--> blobs gone
//
// # Locks, in order
//
//  1. flock on blobs/: shared by whoever adds or relies on blobs (Load, Unpack,
//     Save), exclusive for whoever deletes (GC, DropLayers, Check with Repair).
//  2. flock on the folder itself: exclusive for the moment in which index.json
//     is read, changed and replaced.
//
// Both belong to an open file, so they hold between goroutines as well as
// between processes, and the kernel releases them when a process dies. Waiting
// for them ends with the context.
//
// # Traps
//
// A blob that is in the store is taken to be what its name says, if its size is
// right; Check reads them all. Ingest names are random: two processes never
// resume each other's.
package image
