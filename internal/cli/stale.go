package cli

import (
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
)

// mayBeStale gives a command that only reads the flag --stale.
func (a *app) mayBeStale(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&a.stale, "stale", false, "what the asked node knows, which may be old; works without a leader too")
}

// withFreshness asks for what --stale says, where a request can.
func (a *app) withFreshness(req any) {
	m, ok := req.(proto.Message)
	if !ok || !a.stale {
		return
	}
	r := m.ProtoReflect()
	field := r.Descriptor().Fields().ByName("consistency")
	if field == nil || field.Enum() == nil {
		return
	}
	r.Set(field, protoreflect.ValueOfEnum(blixardv1.Consistency_CONSISTENCY_STALE.Number()))
}
