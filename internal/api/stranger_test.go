package api_test

import (
	"bufio"
	"cmp"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// TestStrangersHoldNothing: who has no token is refused and put off, also when
// the body that was announced never comes.
func TestStrangersHoldNothing(t *testing.T) {
	t.Parallel()
	s := newSite(t, 1)
	address := strings.TrimPrefix(s.urls["node1"], "http://")
	const rest = " HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n"
	conns := map[string]net.Conn{}
	for name, request := range map[string]string{
		"rest":       "POST /v1/vms" + rest + "Content-Type: application/json\r\n\r\n{",
		"unary":      "POST /blixard.v1.VMService/CreateVM" + rest + "Content-Type: application/proto\r\n\r\n\n",
		"stream":     "POST /blixard.v1.EventService/Watch" + rest + "Content-Type: application/connect+proto\r\n\r\n\n",
		"image":      "PUT /v1/images/sha256:" + strings.Repeat("a", 64) + rest + "\r\nx",
		"nowhere":    "POST /v1/nowhere" + rest + "\r\nx",
		"get":        "GET /v1/vms" + rest + "\r\nx",
		"wrong":      "POST /v1/vms" + rest + "Authorization: Bearer wrong\r\nContent-Type: application/json\r\n\r\n{",
		"open":       "GET /healthz" + rest + "\r\nx",
		"in chunks":  "POST /v1/vms HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
		"a bad join": "POST /v1/join" + rest + "Content-Type: text/plain\r\n\r\n{",
	} {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(conn, request); err != nil {
			t.Fatal(err)
		}
		conns[name] = conn
	}
	status := map[string]int{"open": 200, "nowhere": 404, "stream": 200, "a bad join": 415} // the others: 401
	for name, conn := range conns {
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Errorf("%s: no answer: %v", name, err)
			continue
		}
		if want := cmp.Or(status[name], 401); resp.StatusCode != want {
			t.Errorf("%s: the answer is %s, want %d", name, resp.Status, want)
		}
		resp.Body.Close()
		if _, err := io.Copy(io.Discard, conn); err != nil {
			t.Errorf("%s: the connection stays open: %v", name, err)
		}
	}
}

// TestSilentConnections are closed as soon as those that begin a request and do
// not end its header.
func TestSilentConnections(t *testing.T) {
	if testing.Short() {
		t.Skip("it takes as long as the server's patience, 10 s")
	}
	t.Parallel()
	s := newSite(t, 1)
	var conns []net.Conn
	begins := []string{"", "POST /v1/vms HTTP/1.1\r\nHost: x\r\n"}
	for _, begin := range begins {
		conn, err := net.Dial("tcp", strings.TrimPrefix(s.urls["node1"], "http://"))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := io.WriteString(conn, begin); err != nil {
			t.Fatal(err)
		}
		if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	for i, conn := range conns {
		if _, err := io.Copy(io.Discard, conn); err != nil {
			t.Errorf("after %q: %v", begins[i], err)
		}
	}
}
