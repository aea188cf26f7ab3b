package wal

import "io"

// FS is what the log needs of a file system. Names are full paths.
type FS interface {
	MkdirAll(dir string) error
	// Create makes or truncates a file for reading and writing.
	Create(name string) (File, error)
	// Open opens an existing file for reading and writing.
	Open(name string) (File, error)
	Rename(from, to string) error
	Remove(name string) error
	// ReadDir returns the names in dir, sorted.
	ReadDir(dir string) ([]string, error)
	// SyncDir makes creations, renames and removals in dir durable.
	SyncDir(dir string) error
	// Lock takes the exclusive lock of a file, which it creates if need be, or
	// fails at once with an error that wraps ErrLocked.
	Lock(name string) (io.Closer, error)
}

// File is one open file.
type File interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	// Sync is fdatasync: data, and the metadata needed to read it back.
	Sync() error
	// Preallocate grows the file to size, reading as zeros, with its blocks
	// reserved if the file system can.
	Preallocate(size int64) error
	Size() (int64, error)
}
