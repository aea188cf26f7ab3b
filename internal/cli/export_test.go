package cli

import "github.com/blixard/blixard"

// DocumentedExit is the exit code that the documentation gives for a code.
func DocumentedExit(code blixard.Code) int {
	for _, row := range exitCodes {
		if row.code == code {
			return row.exit
		}
	}
	return -1
}
