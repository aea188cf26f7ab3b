package server

import (
	"fmt"
	"log/slog"
)

// raftLogger lets raft write to our log. What raft calls info is detail to us.
type raftLogger struct{ log *slog.Logger }

func (l raftLogger) Debug(v ...any)            {}
func (l raftLogger) Debugf(f string, v ...any) {}
func (l raftLogger) Info(v ...any)             { l.log.Debug("raft", "message", fmt.Sprint(v...)) }
func (l raftLogger) Infof(f string, v ...any)  { l.log.Debug("raft", "message", fmt.Sprintf(f, v...)) }
func (l raftLogger) Warning(v ...any)          { l.log.Debug("raft", "message", fmt.Sprint(v...)) }
func (l raftLogger) Warningf(f string, v ...any) {
	l.log.Debug("raft", "message", fmt.Sprintf(f, v...))
}
func (l raftLogger) Error(v ...any)            { l.log.Error("raft", "message", fmt.Sprint(v...)) }
func (l raftLogger) Errorf(f string, v ...any) { l.log.Error("raft", "message", fmt.Sprintf(f, v...)) }
func (l raftLogger) Fatal(v ...any)            { panic(fmt.Sprint(v...)) }
func (l raftLogger) Fatalf(f string, v ...any) { panic(fmt.Sprintf(f, v...)) }
func (l raftLogger) Panic(v ...any)            { panic(fmt.Sprint(v...)) }
func (l raftLogger) Panicf(f string, v ...any) { panic(fmt.Sprintf(f, v...)) }
