package qemu

import (
	"encoding/hex"
	"os"
	"path/filepath"
	"testing"
)

// Guests of some 100 bytes, as multiboot kernels like stub.asm. They start
// within the time QEMU needs and depend on no image.
const (
	multibootHeader = "02b0ad1b00000100fe4f51e4000010000000100000000000000000002000" + "1000"

	// mov esp; write msg to COM1; hlt for ever. msg: "guest is up\n"
	idleGuest = multibootHeader +
		"fabc0080100066baf803be3a001000ac84c07403eeebf8f4ebfd67756573742069732075700a00"

	// enable the ACPI power button (PM1_EN at 0x602); write msg; poll the button
	// (PM1_STS at 0x600); soft off (PM1_CNT at 0x604).
	politeGuest = multibootHeader +
		"fabc0080100066ba020666b8000166ef66baf803be57001000ac84c07403eeebf866ba000666edf6c40174f966ba040666b8002066eff4" +
		"67756573742069732075700a00"

	// soft off at once
	quittingGuest = multibootHeader + "fabc0080100066ba040666b8002066eff4"

	// as idle, over and over
	chattyGuest = multibootHeader +
		"fabc0080100066baf803be39001000ac84c07403eeebf8ebe7" +
		"677565737420697320757020616e642074616c6b7320616e642074616c6b7320616e642074616c6b7320616e642074616c6b730a00"

	guestText = "guest is up"
)

func guestFile(t *testing.T, code string) string {
	t.Helper()
	text, err := hex.DecodeString(code)
	if err != nil {
		t.Fatal(err)
	}
	// A comma, since QEMU's options are separated by it.
	path := filepath.Join(t.TempDir(), "tiny, guest")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
