// Package e2e holds no code but tests: real server processes, real guests, real
// kill -9. A Cluster builds the binaries once, starts nodes on loopback ports
// and ends everything it started, by pid.
package e2e
