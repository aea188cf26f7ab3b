package state

// CodeEvent is the encoding of events.
var CodeEvent = codeEvent
