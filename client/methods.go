package client

import (
	"context"

	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
)

// CreateVM registers a VM, and wants it running unless start is false.
func (c *Client) CreateVM(ctx context.Context, req *blixardv1.CreateVMRequest) (*blixardv1.Change, error) {
	return change(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.CreateVMRequest) (*blixardv1.Change, error) {
		return e.vms.CreateVM
	})
}

// GetVM returns a VM with its instances. CodeNotFound when there is none.
func (c *Client) GetVM(ctx context.Context, req *blixardv1.GetVMRequest) (*blixardv1.GetVMResponse, error) {
	return read(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.GetVMRequest) (*blixardv1.GetVMResponse, error) {
		return e.vms.GetVM
	})
}

// ListVMs returns VMs by name.
func (c *Client) ListVMs(ctx context.Context, req *blixardv1.ListVMsRequest) (*blixardv1.ListVMsResponse, error) {
	return read(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.ListVMsRequest) (*blixardv1.ListVMsResponse, error) {
		return e.vms.ListVMs
	})
}

// UpdateVM replaces a VM's spec. CodeConflict when it is no longer at
// expect_version.
func (c *Client) UpdateVM(ctx context.Context, req *blixardv1.UpdateVMRequest) (*blixardv1.Change, error) {
	return change(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.UpdateVMRequest) (*blixardv1.Change, error) {
		return e.vms.UpdateVM
	})
}

// ScaleVM changes the number of replicas.
func (c *Client) ScaleVM(ctx context.Context, req *blixardv1.ScaleVMRequest) (*blixardv1.Change, error) {
	return change(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.ScaleVMRequest) (*blixardv1.Change, error) {
		return e.vms.ScaleVM
	})
}

// StartVM wants a VM running; Noop when it is already.
func (c *Client) StartVM(ctx context.Context, req *blixardv1.VMVerbRequest) (*blixardv1.Change, error) {
	return change(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.VMVerbRequest) (*blixardv1.Change, error) {
		return e.vms.StartVM
	})
}

// StopVM wants a VM stopped; Noop when it is already.
func (c *Client) StopVM(ctx context.Context, req *blixardv1.VMVerbRequest) (*blixardv1.Change, error) {
	return change(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.VMVerbRequest) (*blixardv1.Change, error) {
		return e.vms.StopVM
	})
}

// RestartVM has every instance replaced, one after another.
func (c *Client) RestartVM(ctx context.Context, req *blixardv1.VMVerbRequest) (*blixardv1.Change, error) {
	return change(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.VMVerbRequest) (*blixardv1.Change, error) {
		return e.vms.RestartVM
	})
}

// PauseVM wants the vCPUs of a VM's instances stopped.
func (c *Client) PauseVM(ctx context.Context, req *blixardv1.VMVerbRequest) (*blixardv1.Change, error) {
	return change(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.VMVerbRequest) (*blixardv1.Change, error) {
		return e.vms.PauseVM
	})
}

// ResumeVM ends PauseVM.
func (c *Client) ResumeVM(ctx context.Context, req *blixardv1.VMVerbRequest) (*blixardv1.Change, error) {
	return change(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.VMVerbRequest) (*blixardv1.Change, error) {
		return e.vms.ResumeVM
	})
}

// DeleteVM marks a VM for deletion; WaitGone waits until the last of it is gone.
func (c *Client) DeleteVM(ctx context.Context, req *blixardv1.DeleteVMRequest) (*blixardv1.Change, error) {
	return change(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.DeleteVMRequest) (*blixardv1.Change, error) {
		return e.vms.DeleteVM
	})
}

// DeleteVMs deletes several VMs, all or none.
func (c *Client) DeleteVMs(ctx context.Context, req *blixardv1.DeleteVMsRequest) (*blixardv1.Change, error) {
	return change(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.DeleteVMsRequest) (*blixardv1.Change, error) {
		return e.vms.DeleteVMs
	})
}

// ApplyVMs creates or updates VMs so that they are as the documents say, all or
// none. The error's field names the document: "vms[3].spec.memoryMib".
func (c *Client) ApplyVMs(ctx context.Context, req *blixardv1.ApplyVMsRequest) (*blixardv1.ApplyVMsResponse, error) {
	return change(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.ApplyVMsRequest) (*blixardv1.ApplyVMsResponse, error) {
		return e.vms.ApplyVMs
	})
}

// ExplainVM tells for each node whether it would take an instance, and why not.
func (c *Client) ExplainVM(ctx context.Context, req *blixardv1.ExplainVMRequest) (*blixardv1.ExplainVMResponse, error) {
	return read(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.ExplainVMRequest) (*blixardv1.ExplainVMResponse, error) {
		return e.vms.ExplainVM
	})
}

// ListInstances returns instances by VM, ordinal and generation.
func (c *Client) ListInstances(ctx context.Context, req *blixardv1.ListInstancesRequest) (*blixardv1.ListInstancesResponse, error) {
	return read(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.ListInstancesRequest) (*blixardv1.ListInstancesResponse, error) {
		return e.vms.ListInstances
	})
}

// ListEvents returns what happened, newest first.
func (c *Client) ListEvents(ctx context.Context, req *blixardv1.ListEventsRequest) (*blixardv1.ListEventsResponse, error) {
	return read(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.ListEventsRequest) (*blixardv1.ListEventsResponse, error) {
		return e.events.ListEvents
	})
}

// GetStatus tells how the cluster is, as the answering node sees it.
func (c *Client) GetStatus(ctx context.Context, req *blixardv1.GetStatusRequest) (*blixardv1.ClusterStatus, error) {
	return read(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.GetStatusRequest) (*blixardv1.ClusterStatus, error) {
		return e.cluster.GetStatus
	})
}

// ListNodes returns the nodes by name.
func (c *Client) ListNodes(ctx context.Context, req *blixardv1.ListNodesRequest) (*blixardv1.ListNodesResponse, error) {
	return read(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.ListNodesRequest) (*blixardv1.ListNodesResponse, error) {
		return e.cluster.ListNodes
	})
}

// GetNode returns one node.
func (c *Client) GetNode(ctx context.Context, req *blixardv1.GetNodeRequest) (*blixardv1.GetNodeResponse, error) {
	return read(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.GetNodeRequest) (*blixardv1.GetNodeResponse, error) {
		return e.cluster.GetNode
	})
}

// AddNode makes a node a member, on an operator's word.
func (c *Client) AddNode(ctx context.Context, req *blixardv1.AddNodeRequest) (*blixardv1.Membership, error) {
	return change(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.AddNodeRequest) (*blixardv1.Membership, error) {
		return e.cluster.AddNode
	})
}

// Join makes the calling node a member, by a join token.
func (c *Client) Join(ctx context.Context, req *blixardv1.JoinRequest) (*blixardv1.Membership, error) {
	return change(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.JoinRequest) (*blixardv1.Membership, error) {
		return e.cluster.Join
	})
}

// SetNode changes what a node may do, or its labels.
func (c *Client) SetNode(ctx context.Context, req *blixardv1.SetNodeRequest) (*blixardv1.Change, error) {
	return change(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.SetNodeRequest) (*blixardv1.Change, error) {
		return e.cluster.SetNode
	})
}

// RemoveNode ends a node's membership.
func (c *Client) RemoveNode(ctx context.Context, req *blixardv1.RemoveNodeRequest) (*blixardv1.Change, error) {
	return change(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.RemoveNodeRequest) (*blixardv1.Change, error) {
		return e.cluster.RemoveNode
	})
}

// CreateToken makes a join token. The token is shown this once.
func (c *Client) CreateToken(ctx context.Context, req *blixardv1.CreateTokenRequest) (*blixardv1.CreateTokenResponse, error) {
	return change(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.CreateTokenRequest) (*blixardv1.CreateTokenResponse, error) {
		return e.cluster.CreateToken
	})
}

// ListTokens returns the join tokens that can be used, without secrets.
func (c *Client) ListTokens(ctx context.Context, req *blixardv1.ListTokensRequest) (*blixardv1.ListTokensResponse, error) {
	return read(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.ListTokensRequest) (*blixardv1.ListTokensResponse, error) {
		return e.cluster.ListTokens
	})
}

// RevokeToken makes a join token unusable.
func (c *Client) RevokeToken(ctx context.Context, req *blixardv1.RevokeTokenRequest) (*blixardv1.Change, error) {
	return change(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.RevokeTokenRequest) (*blixardv1.Change, error) {
		return e.cluster.RevokeToken
	})
}

// TransferLeader hands leadership to another voter.
func (c *Client) TransferLeader(ctx context.Context, req *blixardv1.TransferLeaderRequest) (*blixardv1.TransferLeaderResponse, error) {
	return read(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.TransferLeaderRequest) (*blixardv1.TransferLeaderResponse, error) {
		return e.cluster.TransferLeader
	})
}

// SetMaintenance turns maintenance mode on or off.
func (c *Client) SetMaintenance(ctx context.Context, req *blixardv1.SetMaintenanceRequest) (*blixardv1.Change, error) {
	return change(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.SetMaintenanceRequest) (*blixardv1.Change, error) {
		return e.cluster.SetMaintenance
	})
}

// WriteSnapshot has the answering node write a snapshot now.
func (c *Client) WriteSnapshot(ctx context.Context, req *blixardv1.WriteSnapshotRequest) (*blixardv1.WriteSnapshotResponse, error) {
	return read(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.WriteSnapshotRequest) (*blixardv1.WriteSnapshotResponse, error) {
		return e.cluster.WriteSnapshot
	})
}

// ListImages returns the images that the answering node keeps.
func (c *Client) ListImages(ctx context.Context, req *blixardv1.ListImagesRequest) (*blixardv1.ListImagesResponse, error) {
	return read(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.ListImagesRequest) (*blixardv1.ListImagesResponse, error) {
		return e.images.ListImages
	})
}

// DeleteImage removes an imported image from every node.
func (c *Client) DeleteImage(ctx context.Context, req *blixardv1.DeleteImageRequest) (*blixardv1.Change, error) {
	return change(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.DeleteImageRequest) (*blixardv1.Change, error) {
		return e.images.DeleteImage
	})
}

// GetVersion returns what software the answering node runs.
func (c *Client) GetVersion(ctx context.Context, req *blixardv1.GetVersionRequest) (*blixardv1.GetVersionResponse, error) {
	return read(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.GetVersionRequest) (*blixardv1.GetVersionResponse, error) {
		return e.system.GetVersion
	})
}

// GetHealth tells whether the answering node is ready to serve.
func (c *Client) GetHealth(ctx context.Context, req *blixardv1.GetHealthRequest) (*blixardv1.GetHealthResponse, error) {
	return read(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.GetHealthRequest) (*blixardv1.GetHealthResponse, error) {
		return e.system.GetHealth
	})
}
