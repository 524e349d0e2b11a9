package strait

import (
	"fmt"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"strait/internal/shm"
)

// Mapping is what the host says about a segment.
type Mapping struct {
	// Version of the mapping's format: 1.
	Version int `json:"strait-mmap"`
	// HostID is that of the host that has the segment: another host's mapping cannot be mapped.
	HostID string `json:"host_id"`
	// Socket is that host's data socket.
	Socket string `json:"socket"`
	// Segment is the segment's id, 32 hexadecimal digits.
	Segment    string `json:"segment"`
	Generation uint64 `json:"generation"`
	// Bytes is the segment's length.
	Bytes int64 `json:"bytes"`
	// Writers says who can still write: "none"; "host" the host, or "worker" the process of the host that ran the kernel,
	// neither of which does while anyone holds a lease; "creator" the client that made it; "anyone" whoever has the descriptor.
	Writers string  `json:"writers"`
	Tensors []Place `json:"tensors"`
}

// Spec describes a tensor to be made.
type Spec struct {
	Name  string `json:"name"`
	DType DType  `json:"dtype"`
	// Shape is row-major: the last size is the fastest. Empty is one element.
	Shape []int `json:"shape"`
}

// Place is a tensor in a segment.
type Place struct {
	Spec
	// Offset from the segment's start in bytes.
	Offset int64 `json:"offset"`
	// Length in bytes.
	Length int64 `json:"length"`
}

const (
	writersNone    = "none"
	writersHost    = "host"
	writersWorker  = "worker"
	writersCreator = "creator"
	writersAnyone  = "anyone"
	// Tensors start on page boundaries, in a payload on multiples of this. It is enough for every element type.
	alignBytes = 64
)

// check holds the host's word against itself, so that later no tensor reaches out of its segment.
func (m *Mapping) check() error {
	if m.Version != 1 {
		return protocolError("mapping of segment %s: its version is %d, known is 1", m.Segment, m.Version)
	}
	for _, place := range m.Tensors {
		if err := place.check(m.Bytes); err != nil {
			return protocolError("tensor %q of segment %s: %w", place.Name, m.Segment, err)
		}
	}
	return nil
}

// check is for a place among so many bytes.
func (p *Place) check(had int64) error {
	bytes, err := byteSize(p.DType, p.Shape)
	switch {
	case err != nil:
		return err
	case bytes != p.Length:
		return fmt.Errorf("%s has %d bytes, not %d", spec(p.DType, p.Shape), bytes, p.Length)
	case p.Offset < 0 || p.Offset > had || p.Length > had-p.Offset:
		return fmt.Errorf("it has %d bytes at %d of %d in all", p.Length, p.Offset, had)
	case p.Length > 0 && p.Offset%alignBytes != 0:
		return fmt.Errorf("it is at %d, no multiple of %d", p.Offset, alignBytes)
	}
	return nil
}

// segment is shared memory that this process maps, and the lease that holds it; or, without a lease, the payload
// of a reply, which is of the Go heap and read-only by the same rules. Its tensors have a handle each.
type segment struct {
	conn *conn
	// 0 for a payload.
	lease uint64
	// What the host said. Of a payload it has the places only.
	mapping Mapping

	mu    sync.Mutex
	pages shm.Pages
	// The pages, or the payload.
	memory []byte
	// The descriptor to map anew from, as long as the segment can be written to; else -1.
	fd int
	// Fills of the client's own under way, which freeze would make crash.
	fills int
	// Handles that are not released, and uses of the pages under way. At 0 they are unmapped.
	holders int
}

// open maps a segment and makes a tensor of each of its places. It takes over fd and the lease, also
// when it fails.
func (c *conn) open(reply *mappedReply, fd int, write bool) ([]*Tensor, error) {
	c.hold(reply.Lease, duration(reply.ExpiresMS))
	s := &segment{conn: c, lease: reply.Lease, mapping: reply.Mapping, fd: -1}
	err := s.mapping.check()
	if err == nil && !write && !slices.Contains([]string{writersNone, writersHost, writersWorker}, s.mapping.Writers) {
		err = fmt.Errorf("strait: segment %s can still be written to (writers: %q); it must be published first",
			s.mapping.Segment, s.mapping.Writers)
	}
	if err == nil {
		err = shm.CheckSeals(fd, s.mapping.Writers == writersNone)
	}
	if err == nil {
		s.pages, err = shm.Map(fd, s.mapping.Bytes, write)
	}
	if err == nil && write {
		s.fd = fd
	} else {
		closeAll([]int{fd})
	}
	if err != nil {
		c.release(reply.Lease)
		return nil, err
	}
	s.memory = s.pages.Bytes()
	c.mappings.Add(1)
	s.holders = len(s.mapping.Tensors)
	tensors := make([]*Tensor, 0, s.holders)
	for i := range s.mapping.Tensors {
		tensors = append(tensors, newTensor(s, &s.mapping.Tensors[i]))
	}
	if s.holders == 0 {
		s.holders = 1
		s.drop()
	}
	return tensors, nil
}

// use keeps the pages mapped until drop; false if they are unmapped already.
func (s *segment) use() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.holders == 0 {
		return false
	}
	s.holders++
	return true
}

// drop ends a handle's life or a use: the last one unmaps, then releases the lease.
func (s *segment) drop() {
	s.mu.Lock()
	s.holders--
	last := s.holders == 0
	var err error
	if last {
		s.memory = nil
		err = s.pages.Unmap()
		s.closeFD()
	}
	s.mu.Unlock()
	if !last || s.lease == 0 {
		return
	}
	defer s.conn.mappings.Add(-1)
	if err != nil {
		// Then the host must not use the pages for anything else, so the lease is kept.
		s.conn.log.Error("strait: a segment could not be unmapped", "segment", s.mapping.Segment, "error", err)
		return
	}
	s.conn.release(s.lease)
}

// closeFD is called with the lock held.
func (s *segment) closeFD() {
	if s.fd >= 0 {
		_ = unix.Close(s.fd)
		s.fd = -1
	}
}

// freeze gives up writing, which the host needs to see before it can seal.
func (s *segment) freeze() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.fd < 0:
		return nil
	case s.fills > 0:
		return argumentError("segment %s is being filled; publish it when ReadFrom has returned", s.mapping.Segment)
	}
	if err := s.pages.Freeze(s.fd); err != nil {
		return err
	}
	s.closeFD()
	return nil
}

// fill keeps the pages writable until filled; false if they are not.
func (s *segment) fill() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd < 0 {
		return false
	}
	s.fills++
	return true
}

func (s *segment) filled() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fills--
}

func (s *segment) writable() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.fd >= 0
}

// bytes is the memory of a handle's place; its caller has the handle or a use.
func (s *segment) bytes(h *handle) []byte {
	place := h.place
	s.mu.Lock()
	defer s.mu.Unlock()
	// Now it is going to be filled: one that never is costs nobody anything. Under the lock, as it
	// writes and must not meet freeze.
	if s.fd >= 0 && !h.born {
		h.born = true
		s.conn.hugeBytes.Add(s.pages.Collapse(place.Offset, place.Length))
	}
	// Clipped, so that no append writes into what lies behind.
	return slices.Clip(s.memory[place.Offset : place.Offset+place.Length])
}
