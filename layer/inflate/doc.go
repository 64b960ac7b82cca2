// Package inflate reads gzip (RFC 1952) and the DEFLATE streams in it (RFC 1951), as
// layers of images are compressed: what compress/gzip of the standard library gives,
// byte for byte and error for error, in about half the time.
//
// # How
//
// Bits are read by the word. The table of literals and lengths is indexed by eleven bits and
// gives up to two literals at once; codes that are longer have tables behind it. What
// is decoded lies in one buffer, of which the last 32 KiB are what a match may refer to;
// a match is copied by words and may write past its end, where the next symbol goes.
//
// Where the words would reach past the end of the input or of the buffer the same
// symbols are decoded one by one, with each bit counted (decoder.go: slow).
package inflate
