package qemu

// readTSC is the CPU's time stamp counter.
func readTSC() uint64
