package strait

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"strings"
	"testing"
)

// frames is tests/conformance/frames.json, which every client's tests read.
type frames struct {
	Version int
	Frames  []struct {
		Name       string
		Op         op
		Sequence   uint32
		Body       string
		Payload    string
		TraceID    string `json:"trace_id"`
		ParentID   string `json:"parent_id"`
		TraceFlags byte   `json:"trace_flags"`
		Hex        string
	}
	Refused []struct {
		Name string
		Says []string
		Hex  string
	}
}

func readFrames(t *testing.T) (table frames) {
	t.Helper()
	text, err := os.ReadFile("../../tests/conformance/frames.json")
	if errors.Is(err, os.ErrNotExist) {
		t.Skip("not in the repository")
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &table); err != nil {
		t.Fatal(err)
	}
	if table.Version != protocolVersion || len(table.Frames) == 0 || len(table.Refused) == 0 {
		t.Fatal(table)
	}
	return table
}

func unhex(t *testing.T, text string) []byte {
	t.Helper()
	bytes, err := hex.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	return bytes
}

func TestFramesAreByteExact(t *testing.T) {
	for _, want := range readFrames(t).Frames {
		given := header{want.Op, want.Sequence, traceContext{
			[16]byte(unhex(t, want.TraceID)), [8]byte(unhex(t, want.ParentID)), want.TraceFlags,
		}}
		frame, err := encodeFrame(given, json.RawMessage(want.Body), unhex(t, want.Payload))
		if err != nil {
			t.Fatal(want.Name, err)
		}
		if got := hex.EncodeToString(frame); got != want.Hex {
			t.Errorf("%s: %s\nis not\n%s", want.Name, got, want.Hex)
		}
		read, body, payload, err := decodeFrame(unhex(t, want.Hex))
		if err != nil || read != given || string(body) != want.Body || hex.EncodeToString(payload) != want.Payload {
			t.Error(want.Name, read, string(body), payload, err)
		}
	}
}

func TestBadFramesAreNamed(t *testing.T) {
	for _, bad := range readFrames(t).Refused {
		_, _, _, err := decodeFrame(unhex(t, bad.Hex))
		if !errors.Is(err, ErrProtocol) {
			t.Errorf("%s: %v", bad.Name, err)
			continue
		}
		for _, word := range bad.Says {
			if !strings.Contains(err.Error(), word) {
				t.Errorf("%s: %v does not say %q", bad.Name, err, word)
			}
		}
	}
	if _, err := encodeFrame(header{op: opLookup, sequence: 1}, &nameRequest{Name: strings.Repeat("x", bodyBytesMax)}, nil); !errors.Is(err, ErrArgument) {
		t.Error("a body that fits no frame:", err)
	}
}
