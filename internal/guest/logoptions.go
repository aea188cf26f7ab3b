package guest

// LogOptions choose lines of an instance's console log, which the host keeps.
type LogOptions struct {
	Follow    bool
	TailLines int // -1: all that is kept
}
