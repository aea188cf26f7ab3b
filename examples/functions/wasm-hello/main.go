// A WASI command: the event is its standard input, the answer its standard output,
// its standard error the log. A code other than 0 is an error of the function.
package main

import (
	"encoding/json"
	"fmt"
	"os"
)

func main() {
	var event struct {
		Name string `json:"name"`
	}
	if err := json.NewDecoder(os.Stdin).Decode(&event); err != nil {
		fmt.Fprintln(os.Stderr, "the event:", err)
		os.Exit(1)
	}
	fmt.Fprintln(os.Stderr, "greeting", event.Name)
	if err := json.NewEncoder(os.Stdout).Encode(map[string]string{"message": "Hello, " + event.Name}); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
