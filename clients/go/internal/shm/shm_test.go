package shm

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"unsafe"
)

const mib = 1 << 20

func newFile(t *testing.T, length int64) int {
	t.Helper()
	file, err := NewFile("test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	if err := file.Truncate(length); err != nil {
		t.Fatal(err)
	}
	return int(file.Fd())
}

func mapped(t *testing.T, fd int, length int64, write bool) Pages {
	t.Helper()
	pages, err := Map(fd, length, write)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := pages.Unmap(); err != nil {
			t.Error(err)
		}
	})
	return pages
}

func phase(p Pages) uintptr { return uintptr(p.base) % hugeBytes }

func TestLongMappingsBeginOnTwoMiB(t *testing.T) {
	for _, length := range []int64{hugeMin, hugeMin + 1, 7*mib + 4096, 64 * mib} {
		fd := newFile(t, length)
		for _, write := range []bool{true, false} {
			if pages := mapped(t, fd, length, write); phase(pages) != 0 || pages.Len() != int(length) {
				t.Errorf("%d bytes at %p", length, pages.base)
			}
		}
	}
}

func TestAPageLessThanTheFileIsRefused(t *testing.T) {
	fd := newFile(t, 5*mib)
	for _, length := range []int64{-1, 0, 5*mib + 1, 1 << 62} {
		if _, err := Map(fd, length, true); err == nil || !strings.Contains(err.Error(), "that has 5242880") {
			t.Error(length, err)
		}
	}
	// What cannot be mapped leaves no addresses behind.
	before := lines(t)
	readOnly, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer readOnly.Close()
	for range 10 {
		if pages, err := mapAt(int(readOnly.Fd()), alignedHint(64*mib), 64*mib, true, 0); err == nil {
			t.Error("mapped", pages.Len())
		}
	}
	if after := lines(t); after > before+2 {
		t.Error(before, after)
	}
}

func lines(t *testing.T) int {
	t.Helper()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Count(maps, []byte{'\n'})
}

// TestCollapse looks at every byte: a fill is what was written, and what was not is zero.
func TestCollapse(t *testing.T) {
	const length = 21*mib + 65536
	fd := newFile(t, length)
	pages := mapped(t, fd, length, true)
	for _, none := range [][2]int64{{0, hugeMin - 1}, {65536, hugeMin - 1}, {mib, 0}} {
		if got := pages.Collapse(none[0], none[1]); got != 0 {
			t.Error(none, got)
		}
	}
	const from, to = 65536, 21 * mib
	huge := pages.Collapse(from, to-from)
	if huge%hugeBytes != 0 || huge > 18*mib {
		t.Error(huge)
	}
	if bytes.Count(pages.Bytes(), []byte{0}) != length {
		t.Error("it is not zero")
	}
	for i := range pages.Bytes() {
		pages.Bytes()[i] = byte(i>>16 + 1)
	}
	seen := mapped(t, fd, length, false)
	if !bytes.Equal(seen.Bytes(), pages.Bytes()) {
		t.Error("not the same memory")
	}
	if huge == 0 {
		t.Skip("Linux has no huge pages at hand")
	}
	if rollup, want := pmdMapped(t, pages), huge>>10; rollup != want {
		t.Errorf("%d KiB in huge pages, not %d", rollup, want)
	}
	if rollup, want := pmdMapped(t, seen), huge>>10; rollup != want {
		t.Errorf("read-only: %d KiB in huge pages, not %d", rollup, want)
	}
	if at := pages.base; pages.Freeze(fd) != nil || pages.base != at || pages.Bytes()[from] != 2 || pmdMapped(t, pages) > huge>>10 {
		t.Error("freezing")
	}
}

// pmdMapped is the KiB of a mapping that are in huge pages.
func pmdMapped(t *testing.T, p Pages) int64 {
	t.Helper()
	smaps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	inside := false
	for line := range strings.Lines(string(smaps)) {
		if from, _, ok := strings.Cut(line, "-"); ok && !strings.Contains(from, " ") {
			inside = from == fmt.Sprintf("%x", uintptr(p.base))
		}
		if fields := strings.Fields(line); inside && len(fields) == 3 && fields[0] == "ShmemPmdMapped:" {
			kib, err := strconv.ParseInt(fields[1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return kib
		}
	}
	return 0
}

func TestGrowthKeepsBytesAndAlignment(t *testing.T) {
	file, err := NewFile("grows")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	fd := int(file.Fd())
	length := 65536
	if err := Allocate(fd, int64(length)); err != nil {
		t.Fatal(err)
	}
	pages := mapped(t, fd, int64(length), true)
	pages.Bytes()[length-1] = 7
	var others []Pages
	for _, next := range []int{mib, 3 * mib, hugeMin, 5 * mib, 40 * mib, 6 * mib, 9 * mib, mib, 64 * mib} {
		if next > length {
			if err := Allocate(fd, int64(next)); err != nil {
				t.Fatal(err)
			}
		}
		if err := pages.Resize(next); err != nil {
			t.Fatal(err)
		}
		if err := file.Truncate(int64(next)); err != nil {
			t.Fatal(err)
		}
		if pages.Bytes()[65535] != 7 || next >= hugeMin && next > length && phase(pages) != 0 {
			t.Errorf("%d: %d at %p", next, pages.Bytes()[65535], pages.base)
		}
		pages.Bytes()[next-1] = 7
		length = next
		// A neighbour, so that it has to move.
		others = append(others, mapped(t, fd, int64(mib), true))
	}
	for _, other := range others {
		if other.Bytes()[65535] != 7 {
			t.Error("another mapping was overwritten")
		}
	}
	if unsafe.SliceData(pages.Bytes()) != (*byte)(pages.base) {
		t.Error("Bytes begins elsewhere")
	}
}
