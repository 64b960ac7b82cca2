// Package layer is the OCI changeset: what differs between two trees (Change,
// Diff), its form as a tar (WriteTar, Apply), its names (DiffID, ChainID,
// digest) and its listing, from which a layer's tree digest is taken.
//
// It knows no driver. It works on directories, confined by openat2.
package layer
