package state

import (
	"fmt"
	"hash/fnv"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/wire"
)

// Command is one change of the state. It is validated where it is applied,
// against the state it is applied to; what it needs of time and chance it
// carries.
type Command interface {
	// kind is the command's number in encodings; never reused.
	kind() uint8
	// code describes the command's fields to the encoding.
	code(c *wire.Coder)
	// apply changes tx or refuses without a trace.
	apply(tx *txn) (Outcome, *blixard.Error)
}

// commands makes an empty command of each kind.
var commands = []func() Command{
	1:  func() Command { return new(CreateVM) },
	2:  func() Command { return new(UpdateVM) },
	3:  func() Command { return new(ScaleVM) },
	4:  func() Command { return new(SetVM) },
	5:  func() Command { return new(RestartVM) },
	6:  func() Command { return new(DeleteVM) },
	7:  func() Command { return new(Batch) },
	8:  func() Command { return new(PlaceInstance) },
	9:  func() Command { return new(EndInstance) },
	10: func() Command { return new(RefuseVM) },
	11: func() Command { return new(Observe) },
	12: func() Command { return new(DropInstance) },
	13: func() Command { return new(ApplyVM) },
	14: func() Command { return new(PreemptInstances) },
	20: func() Command { return new(Bootstrap) },
	21: func() Command { return new(JoinNode) },
	22: func() Command { return new(ReportNode) },
	23: func() Command { return new(SetNode) },
	24: func() Command { return new(LoseNode) },
	25: func() Command { return new(ReviveNode) },
	26: func() Command { return new(RemoveNode) },
	27: func() Command { return new(CreateToken) },
	28: func() Command { return new(SetMaintenance) },
	29: func() Command { return new(RevokeToken) },
	30: func() Command { return new(RemoveImage) },
	31: func() Command { return new(RaiseLevel) },
	40: func() Command { return new(CreateFunction) },
	41: func() Command { return new(UpdateFunction) },
	42: func() Command { return new(PublishVersion) },
	43: func() Command { return new(SetAlias) },
	44: func() Command { return new(DeleteAlias) },
	45: func() Command { return new(DeleteFunction) },
	46: func() Command { return new(SetFunction) },
	47: func() Command { return new(ReportFunction) },
	48: func() Command { return new(AssignBuild) },
	50: func() Command { return new(LeaseSlots) },
	51: func() Command { return new(ReturnSlots) },
	52: func() Command { return new(EnqueueEvent) },
	53: func() Command { return new(TakeEvents) },
	54: func() Command { return new(SettleEvent) },
	56: func() Command { return new(CreateAccessKey) },
	57: func() Command { return new(RevokeAccessKey) },
	58: func() Command { return new(ReplayEvent) },
	59: func() Command { return new(PurgeEvent) },
}

// Outcome is what a command that succeeded tells its proposer.
type Outcome struct {
	Version uint64 // of the changed thing: grows with each change of it
	Index   uint64 // of the entry
	Value   uint64 // command-specific number, such as a raft ID
	Text    string // command-specific text
	Noop    bool   // all was as wanted already
}

// Envelope is a command on its way: who wants it, when, and under which key.
type Envelope struct {
	// Request is the proposer's own number for the reply; 0 for none.
	Request uint64
	// Key makes the command idempotent: a second command with the same key
	// changes nothing and gets the first one's outcome. Empty: none.
	Key     string
	NowMS   int64
	Actor   string
	Command Command
}

// Result is what became of one Envelope of an entry.
type Result struct {
	Request uint64
	Outcome Outcome
	Err     *blixard.Error
}

// entryVersion is the first byte of every entry.
const entryVersion = 1

// EncodeEntry packs envelopes into one raft entry.
func EncodeEntry(envelopes []Envelope) []byte {
	c := wire.Writer(make([]byte, 0, 256*len(envelopes)))
	version := uint8(entryVersion)
	wire.Uint(c, &version)
	n := len(envelopes)
	wire.Int(c, &n)
	for i := range envelopes {
		c.Record(func(c *wire.Coder) { codeEnvelope(c, &envelopes[i]) })
	}
	return c.Bytes()
}

// AppendEnvelope adds one encoded envelope to buf, for an entry that is packed
// as requests arrive; PackEntry makes the entry.
func AppendEnvelope(buf []byte, e *Envelope) []byte {
	c := wire.Writer(buf)
	c.Record(func(c *wire.Coder) { codeEnvelope(c, e) })
	return c.Bytes()
}

// PackEntry makes one entry of encoded envelopes.
func PackEntry(envelopes [][]byte) []byte {
	size := 0
	for _, e := range envelopes {
		size += len(e)
	}
	c := wire.Writer(make([]byte, 0, size+12))
	version, n := uint8(entryVersion), len(envelopes)
	wire.Uint(c, &version)
	wire.Int(c, &n)
	buf := c.Bytes()
	for _, e := range envelopes {
		buf = append(buf, e...)
	}
	return buf
}

// DecodeEntry unpacks an entry. An error means damage or a release that is too
// old to be in this cluster.
func DecodeEntry(data []byte) ([]Envelope, error) {
	c := wire.Reader(data)
	var version uint8
	wire.Uint(c, &version)
	if c.Err() == nil && version != entryVersion {
		return nil, fmt.Errorf("%w: entry version %d, this release knows %d", wire.ErrMalformed, version, entryVersion)
	}
	var n int
	wire.Int(c, &n)
	if n < 0 || n > c.Left() {
		return nil, fmt.Errorf("%w: %d envelopes in %d bytes", wire.ErrMalformed, n, c.Left())
	}
	out := make([]Envelope, n)
	for i := range out {
		c.Record(func(c *wire.Coder) { codeEnvelope(c, &out[i]) })
	}
	if err := c.Done(); err != nil {
		return nil, fmt.Errorf("decoding an entry: %w", err)
	}
	for i := range out {
		if out[i].Command == nil {
			return nil, fmt.Errorf("%w: envelope %d has no command", wire.ErrMalformed, i)
		}
	}
	return out, nil
}

func codeEnvelope(c *wire.Coder, e *Envelope) {
	wire.Uint(c, &e.Request)
	wire.String(c, &e.Key)
	wire.Int(c, &e.NowMS)
	wire.String(c, &e.Actor)
	codeCommand(c, &e.Command)
}

func codeCommand(c *wire.Coder, cmd *Command) {
	var kind uint8
	if !c.Reading() {
		kind = (*cmd).kind()
	}
	wire.Uint(c, &kind)
	if c.Reading() {
		*cmd = nil
		if c.Err() != nil {
			return
		}
		*cmd = emptyCommand(kind)
	}
	c.Record((*cmd).code)
}

func emptyCommand(kind uint8) Command {
	if int(kind) >= len(commands) || commands[kind] == nil {
		return &unknown{kind}
	}
	return commands[kind]()
}

// unknown is a command of a newer release. The feature level keeps such
// commands out of a mixed cluster; meeting one is a refusal, not a crash, on
// every node of this release alike.
type unknown struct{ k uint8 }

func (u *unknown) kind() uint8      { return u.k }
func (u *unknown) code(*wire.Coder) {}
func (u *unknown) apply(*txn) (Outcome, *blixard.Error) {
	return Outcome{}, blixard.Errorf(blixard.CodeInvalid, "command %d is not known to this release", u.k)
}

// fingerprint tells commands apart that come under one idempotency key.
func fingerprint(cmd Command) uint64 {
	c := wire.Writer(nil)
	codeCommand(c, &cmd)
	h := fnv.New64a()
	h.Write(c.Bytes()) // a hash never fails to write
	return h.Sum64()
}

// Batch applies its commands in order, all or none.
type Batch struct {
	Commands []Command
}

func (b *Batch) kind() uint8 { return batchKind }

func (b *Batch) code(c *wire.Coder) { wire.List(c, &b.Commands, codeItem) }

// codeItem codes a batch's command. A batch in a batch is read as an unknown
// command: foreign bytes must not nest without end.
func codeItem(c *wire.Coder, cmd *Command) {
	var kind uint8
	if !c.Reading() {
		kind = (*cmd).kind()
	}
	wire.Uint(c, &kind)
	switch {
	case !c.Reading():
	case c.Err() != nil:
		return
	case kind == batchKind:
		*cmd = &unknown{kind}
	default:
		*cmd = emptyCommand(kind)
	}
	c.Record((*cmd).code)
}

const batchKind = 7

func (b *Batch) apply(tx *txn) (Outcome, *blixard.Error) {
	if len(b.Commands) > maxBatchSize {
		return Outcome{}, blixard.Errorf(blixard.CodeInvalid, "the batch holds %d commands; at most %d are allowed", len(b.Commands), maxBatchSize)
	}
	saved, changes := tx.t.copy(), len(tx.changes)
	noop := true
	for i, cmd := range b.Commands {
		if cmd.kind() == batchKind {
			return tx.undo(saved, changes, blixard.Errorf(blixard.CodeInvalid, "item %d: a batch cannot hold a batch", i+1))
		}
		out, err := cmd.apply(tx)
		if err != nil {
			wrapped := *err
			wrapped.Message = fmt.Sprintf("item %d: %s", i+1, err.Message)
			return tx.undo(saved, changes, &wrapped)
		}
		noop = noop && out.Noop
	}
	return Outcome{Version: tx.index, Value: uint64(len(b.Commands)), Noop: noop}, nil
}
