package main

import (
	"bufio"
	"fmt"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// file is a memory file as the whole machine knows it.
type file struct{ device, inode uint64 }

// memoryFile is the one that lies under a slice.
func memoryFile(elements []float64) (file, error) {
	if len(elements) == 0 {
		return file{}, fmt.Errorf("an empty slice lies on no pages")
	}
	address := uint64(uintptr(unsafe.Pointer(unsafe.SliceData(elements))))
	maps, err := os.Open("/proc/self/maps")
	if err != nil {
		return file{}, err
	}
	defer maps.Close()
	lines := bufio.NewScanner(maps)
	for lines.Scan() {
		var from, to, offset, inode uint64
		var rights string
		var major, minor uint32
		if _, err := fmt.Fscanf(strings.NewReader(lines.Text()), "%x-%x %s %x %x:%x %d", &from, &to, &rights, &offset, &major, &minor, &inode); err != nil {
			return file{}, fmt.Errorf("/proc/self/maps has the line %q: %w", lines.Text(), err)
		}
		if from <= address && address < to {
			return file{unix.Mkdev(major, minor), inode}, nil
		}
	}
	if err := lines.Err(); err != nil {
		return file{}, err
	}
	return file{}, fmt.Errorf("nothing is mapped at %#x", address)
}
