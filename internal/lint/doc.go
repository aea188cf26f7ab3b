// Package lint keeps the architecture by plain tests: which package may import
// which (TestLayers), that the core is a function of its input
// (TestCoreIsDeterministic), that every package says what it is
// (TestPackageDocs), and that nothing lies about (TestNoJunk).
//
// It holds no code of its own. The tests read the files of the tree themselves
// and never ask `go list`: the result of a test that runs a child process is
// cached although the files have changed. Each check is a function that returns
// what it found, and is tested on planted sins, so that a check which no longer
// finds anything is noticed.
package lint
