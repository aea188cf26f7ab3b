package sim

import (
	"fmt"
	"strings"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// describeFunction is describe for functions, their events and access keys.
func describeFunction(c state.Command) string {
	switch c := c.(type) {
	case *state.CreateFunction:
		return fmt.Sprintf("create the function %s, code %.12s%s", c.Name, c.CodeDigest, unless(!c.Publish, ", and publish it"))
	case *state.UpdateFunction:
		return fmt.Sprintf("update the function %s%s", c.Name, unless(c.CodeDigest == "", ", code "+fmt.Sprintf("%.12s", c.CodeDigest)))
	case *state.PublishVersion:
		return fmt.Sprintf("publish the function %s", c.Name)
	case *state.SetAlias:
		return fmt.Sprintf("%s:%s is version %s%s", c.Function, c.Alias.Name, blixard.VersionName(c.Alias.Number), unless(c.Alias.SecondShare == 0, fmt.Sprintf(", and %d for %d of a million", c.Alias.Second, c.Alias.SecondShare)))
	case *state.DeleteAlias:
		return fmt.Sprintf("delete %s:%s", c.Function, c.Name)
	case *state.DeleteFunction:
		return fmt.Sprintf("delete the function %s%s", c.Name, unless(c.Number == 0, fmt.Sprintf(", version %d", c.Number)))
	case *state.SetFunction:
		return fmt.Sprintf("set the function %s", c.Name)
	case *state.ReportFunction:
		return fmt.Sprintf("%s:%s built by %s is %s%s", c.Function, blixard.VersionName(c.Number), c.Node, c.State, unless(c.Reason == "", ": "+c.Reason))
	case *state.AssignBuild:
		return fmt.Sprintf("%s:%s is built by %s", c.Function, blixard.VersionName(c.Number), c.Node)
	case *state.LeaseSlots:
		return fmt.Sprintf("%s wants %d more slots of %s", c.Node, c.Want, c.Function)
	case *state.ReturnSlots:
		return fmt.Sprintf("%s returns %d slots of %s", c.Node, c.Count, c.Function)
	case *state.EnqueueEvent:
		return fmt.Sprintf("accept the event %s for %s, %d bytes, on %s", c.ID, c.Function, len(c.Payload), c.Owner)
	case *state.TakeEvents:
		return fmt.Sprintf("%s takes up to %d events of %s", c.Node, c.Most, c.From)
	case *state.SettleEvent:
		return fmt.Sprintf("the event %s: %s%s", c.ID, c.Result, unless(c.Error == "", ": "+c.Error))
	case *state.ReplayEvent:
		return "replay the event " + c.ID
	case *state.PurgeEvent:
		return "purge events " + c.ID + string(c.Function)
	case *state.CreateAccessKey:
		return "make the access key " + c.Key.ID
	case *state.RevokeAccessKey:
		return "revoke the access key " + c.ID
	case *state.RaiseLevel:
		return fmt.Sprintf("the feature level is %d", c.Level)
	}
	return strings.TrimPrefix(fmt.Sprintf("%T", c), "*state.")
}
