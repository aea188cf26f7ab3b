// Package lambdaapi speaks the AWS Lambda API, so that AWS' SDKs, CLI and tools
// work on Blixard's functions unmodified.
//
// A request passes, in this order: the router (operations.go), the judgement of
// its signature's head, the reading of its body within the operation's bound,
// the signature itself, what the key's role allows, and then the operation,
// which reads a linearizable view, proposes commands of package state, or calls
// the function through the gateway. Nothing is done for a request whose
// signature was not found right.
//
// What Blixard has no notion of (layers, VPCs, container images, event source
// mappings, …) is refused in words, never taken and forgotten. What it has
// under another name is translated in one place each: configuration.go for
// versions, the file of the noun for the rest.
//
// The package holds no state of its own but bounds: bytes of bodies in memory,
// and uploads under way. A Server may be used concurrently; it starts no
// goroutine.
package lambdaapi
