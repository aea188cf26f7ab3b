// Command bootstrap is a function for the end-to-end tests: it does what the
// event tells it to do, the good and the bad, over the Lambda Runtime API.
package main

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"time"
)

type order struct {
	Op    string `json:"op"`
	Port  int    `json:"port"`  // tell: of the server on the host that holds the call
	Bytes int    `json:"bytes"` // of what is printed or answered
	Text  string `json:"text"`
	// Body is the order, when it came as an HTTP request.
	Body    string `json:"body"`
	Base64  bool   `json:"isBase64Encoded"`
	Request any    `json:"requestContext"`
}

// once is drawn before the template is saved: the same in all clones.
var once = random()

func random() string {
	b := make([]byte, 16)
	if _, err := rand.Read(b); err != nil {
		panic(err)
	}
	return hex.EncodeToString(b)
}

func main() {
	if len(os.Args) > 1 { // a child of op fork
		fork()
	}
	if os.Getenv("AT_START") == "exit" {
		fmt.Println("leaving at the start")
		os.Exit(3)
	}
	api := "http://" + os.Getenv("AWS_LAMBDA_RUNTIME_API") + "/2018-06-01/runtime/invocation/"
	for {
		next, err := http.Get(api + "next")
		if err != nil {
			panic(err)
		}
		event, err := io.ReadAll(next.Body)
		if err != nil {
			panic(err)
		}
		next.Body.Close()
		answer := serve(event)
		done, err := http.Post(api+next.Header.Get("Lambda-Runtime-Aws-Request-Id")+"/response", "application/json", bytes.NewReader(answer))
		if err != nil {
			panic(err)
		}
		if done.StatusCode != http.StatusAccepted {
			fmt.Println("the answer was refused:", done.Status)
		}
		done.Body.Close()
	}
}

func serve(event []byte) []byte {
	var o order
	if err := json.Unmarshal(event, &o); err != nil {
		return text("no order: " + err.Error())
	}
	if o.Request != nil && o.Body != "" {
		body := []byte(o.Body)
		if o.Base64 {
			var err error
			if body, err = base64.StdEncoding.DecodeString(o.Body); err != nil {
				return text("no order: " + err.Error())
			}
		}
		return serve(body)
	}
	switch o.Op {
	case "identity":
		return identity()
	case "tell":
		return tell(o)
	case "exit":
		os.Exit(7)
	case "hang":
		select {}
	case "spin":
		for {
		}
	case "fork":
		fork()
	case "fill":
		return fill()
	case "memory":
		var kept [][]byte
		for {
			b := make([]byte, 1<<20)
			for i := 0; i < len(b); i += 4096 {
				b[i] = 1
			}
			kept = append(kept, b)
			if len(kept) > 1<<20 {
				return text("no end of memory")
			}
		}
	case "print":
		line := []byte(strings.Repeat("x", 127) + "\n")
		w := bufio.NewWriterSize(os.Stdout, 1<<16)
		for n := 0; n < o.Bytes; n += len(line) {
			if _, err := w.Write(line); err != nil {
				return text("printing: " + err.Error())
			}
		}
		if err := w.Flush(); err != nil {
			return text("printing: " + err.Error())
		}
		return text("printed")
	case "answer":
		return text(strings.Repeat("y", o.Bytes))
	case "raw":
		return []byte(o.Text)
	}
	version := os.Getenv("VERSION")
	return text(strings.TrimSpace("hello " + version))
}

func text(s string) []byte {
	b, err := json.Marshal(s)
	if err != nil {
		panic(err)
	}
	return b
}

// identity is everything in which clones must differ.
func identity() []byte {
	read := func(path string) string {
		b, err := os.ReadFile(path)
		if err != nil {
			return err.Error()
		}
		return strings.TrimSpace(string(b))
	}
	out := map[string]string{
		"once": once, "random": random(), "urandom": read("/proc/sys/kernel/random/uuid"), "machine-id": read("/etc/machine-id"), "boot_id": read("/proc/sys/kernel/random/boot_id"),
		"clock": time.Now().UTC().Format(time.RFC3339Nano),
	}
	var err error
	if out["hostname"], err = os.Hostname(); err != nil {
		out["hostname"] = err.Error()
	}
	links, err := net.Interfaces()
	if err != nil {
		out["mac"] = err.Error()
	}
	for _, l := range links {
		if l.Flags&net.FlagLoopback != 0 {
			continue
		}
		out["mac"] = l.HardwareAddr.String()
		addresses, err := l.Addrs()
		if err != nil || len(addresses) == 0 {
			out["ip"] = fmt.Sprint("none: ", err)
			continue
		}
		out["ip"] = addresses[0].String()
	}
	b, err := json.Marshal(out)
	if err != nil {
		panic(err)
	}
	return b
}

// tell asks a server on the host, which answers when the call shall end. The host
// is where the default route goes.
func tell(o order) []byte {
	routes, err := os.ReadFile("/proc/net/route")
	if err != nil {
		return text(err.Error())
	}
	for _, line := range strings.Split(string(routes), "\n") {
		f := strings.Fields(line) // device, destination, gateway, …
		if len(f) < 3 || f[1] != "00000000" {
			continue
		}
		gateway, err := hex.DecodeString(f[2])
		if err != nil || len(gateway) != 4 {
			return text("the route " + line)
		}
		answer, err := http.Get(fmt.Sprintf("http://%d.%d.%d.%d:%d/?%s", gateway[3], gateway[2], gateway[1], gateway[0], o.Port, o.Text))
		if err != nil {
			return text(err.Error())
		}
		defer answer.Body.Close()
		body, err := io.ReadAll(answer.Body)
		if err != nil {
			return text(err.Error())
		}
		return text(string(body))
	}
	return text("no network")
}

func fork() {
	for {
		if err := exec.Command("/proc/self/exe", "child").Start(); err != nil {
			<-time.After(time.Millisecond)
		}
	}
}

// fill writes until the disk is full.
func fill() []byte {
	f, err := os.Create("/tmp/full")
	if err != nil {
		return text(err.Error())
	}
	defer f.Close()
	chunk := make([]byte, 1<<20)
	for n := 0; ; n++ {
		if _, err := f.Write(chunk); err != nil {
			return text(fmt.Sprintf("full after %d MiB: %v", n, err))
		}
	}
}
