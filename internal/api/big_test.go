package api_test

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// TestTenThousandInOneApply: all or nothing, also at the largest size.
func TestTenThousandInOneApply(t *testing.T) {
	s := newSite(t, 1)
	var documents []string
	for i := range 10_000 {
		documents = append(documents, fmt.Sprintf(`{"name":"vm-%d","spec":{"replicas":2,"memoryMib":128,"labels":{"app":"web"}}}`, i))
	}
	bad := append(documents[:9_999:9_999], `{"name":"vm-9999","spec":{"dependsOn":["vm-9999"]}}`)
	resp, body := s.do("POST", "/v1/apply", `{"vms":[`+strings.Join(bad, ",")+`]}`)
	if resp.StatusCode != 400 || !strings.Contains(body, `"field":"vms[9999].spec.dependsOn"`) || s.cluster.View().VMCount() != 0 {
		t.Fatalf("%s %.300s, %d VMs", resp.Status, body, s.cluster.View().VMCount())
	}
	start := time.Now()
	if resp, body = s.do("POST", "/v1/apply", `{"vms":[`+strings.Join(documents, ",")+`]}`); resp.StatusCode != 200 || s.cluster.View().VMCount() != 10_000 {
		t.Fatalf("%s %.300s, %d VMs", resp.Status, body, s.cluster.View().VMCount())
	}
	t.Logf("10,000 VMs in %s", time.Since(start))
	if resp, body = s.do("POST", "/v1/apply", `{"vms":[`+strings.Join(append(documents, `{"name":"one-more"}`), ",")+`]}`); resp.StatusCode != 400 {
		t.Errorf("%s %.300s", resp.Status, body)
	}
}
