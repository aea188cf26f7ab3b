package gateway

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// eventInput is what an event (payload format 2.0) is made of.
type eventInput struct {
	request   *http.Request
	body      []byte
	path      string // escaped; below the prefix of /function/<name>
	routeKey  string
	apiID     string
	accountID string
	identity  *Identity // of a signed request
	param     string    // name of the path parameter, "" for none
	value     string
	requestID string
	sourceIP  string
	forwarded forwarded
	traceID   string
	now       time.Time
	// fields: those of a body that is a JSON object stand in the event, too, where
	// it has no field of that name.
	fields bool
}

// forwarded are the headers that say where a request came from.
type forwarded struct {
	client string // all of X-Forwarded-For
	port   string
	proto  string
}

// maxHeaders bounds what is sorted on the stack.
const maxHeaders = 32

// appendEvent writes the event.
func appendEvent(b []byte, in *eventInput) []byte {
	r := in.request
	b = append(b, `{"version":"2.0","routeKey":`...)
	b = appendString(b, in.routeKey)
	b = append(b, `,"rawPath":`...)
	b = appendString(b, in.path)
	b = append(b, `,"rawQueryString":`...)
	b = appendString(b, r.URL.RawQuery)
	b = appendCookies(b, r.Header["Cookie"])
	b = appendHeaders(b, in)
	b = appendQuery(b, r.URL.RawQuery)
	if in.param != "" && in.value != "" {
		b = append(b, `,"pathParameters":{`...)
		b = append(appendString(b, in.param), ':')
		b = append(appendString(b, in.value), '}')
	}
	b = appendContext(b, in)
	if in.fields {
		b = appendFields(b, in.body)
	}
	if len(in.body) > 0 {
		b = append(b, `,"body":`...)
		if isText(r.Header.Get("Content-Type")) && utf8.Valid(in.body) {
			b = appendString(b, in.body)
			return append(b, `,"isBase64Encoded":false}`...)
		}
		b = append(b, '"')
		b = base64.StdEncoding.AppendEncode(b, in.body)
		return append(b, `","isBase64Encoded":true}`...)
	}
	return append(b, `,"isBase64Encoded":false}`...)
}

// eventFields are those that an event may have of itself.
var eventFields = []string{
	"body", "cookies", "headers", "isBase64Encoded", "pathParameters", "queryStringParameters", "rawPath", "rawQueryString", "requestContext", "routeKey", "stageVariables", "version",
}

// appendFields adds the members of a body that is a JSON object: a handler that
// takes its arguments from the event finds them, however it is called.
func appendFields(b, body []byte) []byte {
	if body = bytes.TrimSpace(body); len(body) == 0 || body[0] != '{' {
		return b
	}
	var members map[string]json.RawMessage
	if json.Unmarshal(body, &members) != nil {
		return b // no object: the body alone tells what it is
	}
	for _, name := range slices.Sorted(maps.Keys(members)) {
		if !slices.Contains(eventFields, name) {
			b = append(appendString(append(b, ','), name), ':')
			b = append(b, members[name]...)
		}
	}
	return b
}

func appendCookies(b []byte, lines []string) []byte {
	if len(lines) == 0 {
		return b
	}
	b = append(b, `,"cookies":[`...)
	start := len(b)
	for _, line := range lines {
		for cookie := range strings.SplitSeq(line, ";") {
			if cookie = strings.TrimSpace(cookie); cookie != "" {
				b = append(appendString(b, cookie), ',')
			}
		}
	}
	if len(b) > start {
		b = b[:len(b)-1]
	}
	return append(b, ']')
}

func appendHeaders(b []byte, in *eventInput) []byte {
	b = append(b, `,"headers":{"host":`...)
	b = appendString(b, in.request.Host)
	var room [maxHeaders]string
	names := room[:0]
	for name := range in.request.Header { //order:any sorted below
		if name != "Cookie" && !hopByHop(name) && !isForwarded(name) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	if in.request.ContentLength > 0 && in.request.Header["Content-Length"] == nil {
		b = append(b, `,"content-length":"`...)
		b = append(strconv.AppendInt(b, in.request.ContentLength, 10), '"')
	}
	for _, name := range names {
		b = append(b, ',')
		b = appendLower(b, name)
		b = append(b, ':')
		if values := in.request.Header[name]; len(values) == 1 {
			b = appendString(b, values[0])
		} else {
			b = appendString(b, strings.Join(values, ","))
		}
	}
	for _, h := range [...][2]string{
		{"x-amzn-trace-id", in.traceID}, {"x-forwarded-for", in.forwarded.client}, {"x-forwarded-port", in.forwarded.port}, {"x-forwarded-proto", in.forwarded.proto},
	} {
		b = append(b, ',', '"')
		b = append(b, h[0]...)
		b = append(b, '"', ':')
		b = appendString(b, h[1])
	}
	return append(b, '}')
}

// isForwarded tells the headers that the gateway sets itself.
func isForwarded(name string) bool {
	switch name {
	case "X-Forwarded-For", "X-Forwarded-Port", "X-Forwarded-Proto", "X-Amzn-Trace-Id", "Host":
		return true
	}
	return false
}

func appendQuery(b []byte, raw string) []byte {
	if raw == "" {
		return b
	}
	type pair struct{ key, value string }
	var room [16]pair
	pairs := room[:0]
	for part := range strings.SplitSeq(raw, "&") {
		if part == "" {
			continue
		}
		key, value, _ := strings.Cut(part, "=")
		p := pair{unescapeQuery(key), unescapeQuery(value)}
		if i := slices.IndexFunc(pairs, func(x pair) bool { return x.key == p.key }); i >= 0 {
			pairs[i].value += "," + p.value
			continue
		}
		if len(pairs) < maxQueryPairs {
			pairs = append(pairs, p)
		}
	}
	if len(pairs) == 0 {
		return b
	}
	b = append(b, `,"queryStringParameters":{`...)
	for _, p := range pairs {
		b = append(appendString(b, p.key), ':')
		b = append(appendString(b, p.value), ',')
	}
	b[len(b)-1] = '}'
	return b
}

// maxQueryPairs bounds the parameters that are taken apart; rawQueryString has
// them all.
const maxQueryPairs = 256

func unescapeQuery(s string) string {
	if strings.IndexByte(s, '%') < 0 && strings.IndexByte(s, '+') < 0 {
		return s
	}
	plain, err := url.QueryUnescape(s)
	if err != nil {
		return s
	}
	return plain
}

func appendContext(b []byte, in *eventInput) []byte {
	r := in.request
	b = append(b, `,"requestContext":{"accountId":`...)
	b = appendString(b, in.accountID)
	b = append(b, `,"apiId":`...)
	b = appendString(b, in.apiID)
	if id := in.identity; id != nil {
		b = append(b, `,"authentication":null,"authorizer":{"iam":{"accessKey":`...)
		b = appendString(b, id.AccessKey)
		b = append(b, `,"accountId":`...)
		b = appendString(b, id.AccountID)
		b = append(b, `,"callerId":`...)
		b = appendString(b, id.CallerID)
		b = append(b, `,"cognitoIdentity":null,"principalOrgId":null,"userArn":`...)
		b = appendString(b, id.UserARN)
		b = append(b, `,"userId":`...)
		b = append(appendString(b, id.UserID), '}', '}')
	}
	name := hostName(r.Host)
	prefix, _, _ := strings.Cut(name, ".")
	b = append(b, `,"domainName":`...)
	b = appendString(b, name)
	b = append(b, `,"domainPrefix":`...)
	b = appendString(b, prefix)
	b = append(b, `,"http":{"method":`...)
	b = appendString(b, r.Method)
	b = append(b, `,"path":`...)
	b = appendString(b, in.path)
	b = append(b, `,"protocol":`...)
	b = appendString(b, r.Proto)
	b = append(b, `,"sourceIp":`...)
	b = appendString(b, in.sourceIP)
	b = append(b, `,"userAgent":`...)
	b = appendString(b, r.Header.Get("User-Agent"))
	b = append(b, `},"requestId":`...)
	b = appendString(b, in.requestID)
	b = append(b, `,"routeKey":`...)
	b = appendString(b, in.routeKey)
	b = append(b, `,"stage":"$default","time":"`...)
	b = in.now.UTC().AppendFormat(b, "02/Jan/2006:15:04:05 -0700")
	b = append(b, `","timeEpoch":`...)
	b = strconv.AppendInt(b, in.now.UnixMilli(), 10)
	return append(b, '}')
}

// isText tells the content types whose bodies are written as they are.
func isText(contentType string) bool {
	kind, _, _ := strings.Cut(contentType, ";")
	kind = strings.ToLower(strings.TrimSpace(kind))
	if strings.HasPrefix(kind, "text/") {
		return true
	}
	switch strings.TrimPrefix(kind, "application/") {
	case "json", "xml", "javascript":
		return true
	}
	return strings.HasPrefix(kind, "application/") && (strings.HasSuffix(kind, "+json") || strings.HasSuffix(kind, "+xml"))
}

const hexDigits = "0123456789abcdef"

// appendString writes a JSON string. Bytes that are no UTF-8 become U+FFFD.
func appendString[T string | []byte](b []byte, s T) []byte {
	b = append(b, '"')
	start := 0
	for i := 0; i < len(s); {
		c := s[i]
		if c >= 0x20 && c != '"' && c != '\\' && c < utf8.RuneSelf {
			i++
			continue
		}
		if c >= utf8.RuneSelf {
			_, n := utf8.DecodeRuneInString(string(s[i:min(i+utf8.UTFMax, len(s))]))
			if n == 1 {
				b = append(b, s[start:i]...)
				b = append(b, `\ufffd`...)
				start = i + 1
			}
			i += n
			continue
		}
		b = append(b, s[start:i]...)
		switch c {
		case '"', '\\':
			b = append(b, '\\', c)
		case '\n':
			b = append(b, '\\', 'n')
		case '\r':
			b = append(b, '\\', 'r')
		case '\t':
			b = append(b, '\\', 't')
		default:
			b = append(b, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
		}
		i++
		start = i
	}
	b = append(b, s[start:]...)
	return append(b, '"')
}

// appendLower writes a header's name, which is ASCII, in lower case.
func appendLower(b []byte, name string) []byte {
	b = append(b, '"')
	for i := range len(name) {
		c := name[i]
		if c >= 'A' && c <= 'Z' {
			c += 'a' - 'A'
		}
		if c < 0x21 || c == '"' || c == '\\' || c >= utf8.RuneSelf {
			c = '_'
		}
		b = append(b, c)
	}
	return append(b, '"')
}

// hopByHop tells the headers that belong to one connection.
func hopByHop(name string) bool {
	switch name {
	case "Connection", "Keep-Alive", "Proxy-Connection", "Proxy-Authenticate", "Proxy-Authorization", "Te", "Trailer", "Transfer-Encoding", "Upgrade":
		return true
	}
	return false
}
