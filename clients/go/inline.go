package strait

import (
	"strait/internal/shm"
)

// Small tensors travel in frames: the elements of inputs behind the JSON of an INVOKE, those of results behind that
// of its OK. What travels so needs no segment, no descriptor and no lease.

const (
	payloadBytesMax = 131072
	// Linux keeps so much of a socket's send buffer to itself.
	sendBufferOwn = 32
)

// payloadRoom is how much payload a frame with the longest body has room for, on a socket with such a buffer.
func payloadRoom(sendBuffer int) int {
	return min(max(sendBuffer-sendBufferOwn-headerBytes-bodyBytesMax, 0), payloadBytesMax)
}

// inlineTensor is elements in a frame's payload.
type inlineTensor struct {
	DType  DType `json:"dtype"`
	Shape  []int `json:"shape"`
	Offset int64 `json:"offset"`
	Length int64 `json:"length"`
}

// inline puts d into the frame of the call; false if it is too large for that, or there is no room left.
func (d Copied) inline(c *Client, call *invokeRequest) (inlineInput, bool) {
	offset := (len(call.payload) + alignBytes - 1) / alignBytes * alignBytes
	most := c.welcome.InlineBytes
	if most == 0 || int64(len(d.bytes)) > most || len(d.bytes) > c.conn.payloadRoom-offset {
		return inlineInput{}, false
	}
	call.payload = append(call.payload, make([]byte, offset-len(call.payload))...)
	call.payload = append(call.payload, d.bytes...)
	c.conn.copiedBytes.Add(int64(len(d.bytes)))
	// The wire's empty shape is a list and not null.
	return inlineInput{inlineTensor{d.dtype, append([]int{}, d.shape...), int64(offset), int64(len(d.bytes))}}, true
}

// unframe makes a tensor of a result that came in the payload, which stays as long as the tensor, or a slice of it.
func (c *conn) unframe(port string, result *inlineTensor, payload []byte) ([]*Tensor, error) {
	place := Place{Spec{port, result.DType, result.Shape}, result.Offset, result.Length}
	if err := place.check(int64(len(payload))); err != nil {
		return nil, protocolError("output %q in a payload: %w", port, err)
	}
	c.copiedBytes.Add(place.Length)
	s := &segment{conn: c, mapping: Mapping{Tensors: []Place{place}}, memory: payload, fd: -1, holders: 1}
	return []*Tensor{newTensor(s, &s.mapping.Tensors[0])}, nil
}

// aligned is a copy of a frame's payload where elements of every type are aligned.
func aligned(payload []byte) []byte {
	if len(payload) == 0 {
		return nil
	}
	words := make([]uint64, (len(payload)+7)/8)
	bytes := shm.Raw(words)[:len(payload)]
	copy(bytes, payload)
	return bytes
}
