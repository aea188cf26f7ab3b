// Package wal keeps a replica's raft log on a real disk: a segmented
// write-ahead log beside snapshot files, in one directory.
//
// # Files
//
//	LOCK                   held by flock while a process has the log open
//	<seq>-<next>.wal       one segment; next is the first index it may hold
//	<index>-<term>.snap    a snapshot
//	<index>-<term>.recv    a snapshot being installed, before its marker
//	*.tmp                  never finished; deleted at Open
//
// # Frames
//
// What one Save(sync) hands over becomes one frame: one write, one fdatasync.
// A frame is a whole number of 512-byte sectors, so a sector that holds
// acknowledged bytes is never written again:
//
//	first sector   magic[4] length u32 | crc u32 | header crc u32 | payload
//	every further  tag u8 | 511 bytes of payload
//
// The rest of the last sector is zero. crc is crc32c over the crc of the frame
// before, and all of this frame but its two checksums; the header crc covers
// the same chain and the first twelve bytes. The chain catches frames that are
// valid in themselves but stand in the wrong place. The payload is a list of
// items: hard state, entries, segment start, install marker, seal.
//
// A segment is preallocated and made of zeros (both, since writing into blocks
// that are merely reserved costs a journal commit per fdatasync). It starts
// with a frame that repeats the hard state and the position and checksum where
// its predecessor ended, so older segments can go. When the next segment is
// durable, and before anything is written to it, the old one gets a seal: a
// last segment that bears a seal has lost its successor.
//
// # Torn or corrupt
//
// A frame that does not check out is either the last write, cut short before
// it was acknowledged (torn: cut it off), or damage to something acknowledged
// (corrupt: refuse). They are told apart by this reasoning:
//
//   - Only one write is ever outstanding: unsynced Saves wait in memory, and a
//     frame is written only after the fdatasync of the one before has returned.
//     So at most one frame is torn and nothing at all was written after it.
//     Any byte behind it proves it was acknowledged.
//   - A write goes to sectors that held only zeros. Disks write a sector
//     wholly or not at all, in any order; so every sector of a torn frame holds
//     either its new bytes or 512 zeros, and at least one holds zeros.
//   - No sector of a frame is ever all zeros when written: each begins with a
//     magic or tag byte with several bits set, which one flipped bit does not
//     turn into zero. A frame that is complete but fails its checksum has been
//     changed since, and a flip in the zeros behind the log is no frame either.
//
// So: a frame is torn if it is in the last segment, at least one of its
// sectors is all zeros, each other is in place, and only zeros follow it.
// All else is ErrCorrupt. A sector of an acknowledged last frame that the disk
// itself turned into zeros (a lost write it had confirmed) cannot be told from
// a torn one by anyone on this machine; replication is what guards against it.
//
// Open writes the last frame once more and syncs before it returns: a frame
// may be in the page cache and not on disk, because the process before was
// killed between write and sync or because the sync failed.
//
// # Ordering
//
// A snapshot is written to a tmp file, synced, renamed, and the directory
// synced; entries it covers are durable before the rename. Install renames to
// .recv first, then writes the marker that drops the log, then renames to
// .snap; a .recv without its marker was never acknowledged and is deleted.
// Compact removes segments from the oldest on; what a crash leaves of them is
// recognised by the gap in their numbers and removed by the next Open.
//
// # Failure
//
// A failed write, sync, rename or removal is final: every later call returns
// the same error and the process must end. Refused arguments (a gap, an old
// snapshot) and an error of the caller's own snapshot writer are not.
package wal
