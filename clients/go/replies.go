package strait

import (
	"encoding/binary"
	"sync"
)

// replies is where frames with outputs are received, each straight into the memory that its outputs are to have.
type replies struct {
	conn     *conn
	outputs  []preparedPlace
	replyLen int
	// The outputs' first axes are rows, of which there may be any number.
	streams bool

	// The header and the sizes of the outputs.
	replyHead []byte
	answer    [][]byte
	// What is received between outputs: something only beside a body.
	gaps []byte
	// Those of the outputs that were received last.
	places []Place
}

// rests is memory for what is received behind outputs: an ERROR, or what a body moves there. A call that is under way has one.
var rests = sync.Pool{New: func() any { return new([bodyBytesMax + 1]byte) }}

// newReplies is for outputs that checkPlaces has seen.
func newReplies(c *conn, outputs []preparedPlace, payloadBytes int64, streams bool) replies {
	return replies{
		conn:      c,
		outputs:   outputs,
		replyLen:  int(payloadBytes),
		streams:   streams,
		replyHead: make([]byte, headerBytes+sizesBytes*len(outputs)),
		gaps:      make([]byte, alignBytes*len(outputs)),
		places:    make([]Place, len(outputs)),
	}
}

// answerInto has replies received in outputs. What it returns goes back to rests.
func (r *replies) answerInto(outputs []output) *[bodyBytesMax + 1]byte {
	r.answer = append(r.answer[:0], r.replyHead)
	for i := range outputs {
		bytes := outputs[i].bytes
		r.answer = append(r.answer, bytes, r.gaps[alignBytes*i:][:-len(bytes)&(alignBytes-1)])
	}
	rest := rests.Get().(*[bodyBytesMax + 1]byte)
	r.answer = append(r.answer, rest[:])
	return rest
}

// received reads the n bytes of an answer to asked from where they were received: what it is, and its body. The elements of
// outputs are in their memory then, and r.places says what they are. A LAST has none.
func (r *replies) received(n int, asked op, sequence uint32, outputs []output) (op, callReply, error) {
	refuse := func(err error) (op, callReply, error) { return 0, callReply{}, err }
	h, bodyBytes, err := decodeHeader(r.replyHead[:min(n, headerBytes)], n)
	if err != nil {
		return refuse(err)
	}
	payloadBytes := r.replyLen
	if h.op == opLast {
		// Rows come before it.
		payloadBytes, outputs = 0, nil
	}
	switch {
	// What ends a channel answers no request.
	case h.sequence != sequence && !(asked == opStream && h.op == opError && h.sequence == 0):
		return refuse(protocolError("the reply to call %d answers call %d", sequence, h.sequence))
	case h.op == opError:
		remote := &RemoteError{}
		if err := decodeBody(linear(r.answer, n)[headerBytes:], remote); err != nil {
			return refuse(err)
		}
		return refuse(remote)
	case !r.answers(h.op, asked):
		return refuse(protocolError("op %d answers op %d", h.op, asked))
	case n-headerBytes-bodyBytes != payloadBytes:
		return refuse(protocolError("%d payload bytes answer a call; %d were said", n-headerBytes-bodyBytes, payloadBytes))
	}
	var reply callReply
	if bodyBytes > 0 {
		packet := linear(r.answer, n)
		if err := decodeBody(packet[headerBytes:headerBytes+bodyBytes], &reply); err != nil {
			return refuse(err)
		}
		// To where it is without a body.
		payload := packet[headerBytes+bodyBytes:]
		copy(r.replyHead[headerBytes:], payload)
		for i := range outputs {
			copy(outputs[i].bytes, payload[r.outputs[i].Offset:])
		}
	}
	for i := range outputs {
		r.places[i], err = r.outputs[i].sized(r.replyHead[headerBytes+sizesBytes*i:][:sizesBytes], r.streams)
		if err != nil {
			return refuse(err)
		}
		r.conn.copiedBytes.Add(r.places[i].Length)
	}
	return h.op, reply, nil
}

// answers says whether a frame of that op, which is no ERROR, can answer asked.
func (r *replies) answers(op, asked op) bool {
	switch asked {
	case opStream:
		return op == opChunk || op == opLast
	case opChunk, opLast:
		// Without outputs they go to a channel, and no rows come before the OK.
		return op == opOK || op == opChunk && len(r.outputs) > 0
	}
	return op == opOK
}

// tensor is an output in memory of its own.
func (r *replies) tensor(place Place, memory []byte) *Tensor {
	s := &segment{conn: r.conn, mapping: Mapping{Tensors: []Place{place}}, memory: memory, fd: -1, holders: 1}
	return newTensor(s, &s.mapping.Tensors[0])
}

// linear is a copy of the first n bytes of what lies in parts.
func linear(parts [][]byte, n int) []byte {
	all := make([]byte, 0, n)
	for _, part := range parts {
		all = append(all, part[:min(len(part), n-len(all))]...)
	}
	return all
}

// sized is an output with the sizes that came, in memory of its own. A stream's rows are as they were said.
func (p *preparedPlace) sized(sizes []byte, streams bool) (Place, error) {
	shape := make([]int, len(p.Shape))
	for axis := range rankMax {
		size, most := binary.LittleEndian.Uint64(sizes[8*axis:]), uint64(0)
		if axis < len(shape) {
			most = uint64(p.Shape[axis])
		}
		if size > most || streams && axis > 0 && size != most {
			return Place{}, protocolError("output %q has %d along axis %d; %s was said", p.Port, size, axis, spec(p.DType, p.Shape))
		}
		if axis < len(shape) {
			shape[axis] = int(size)
		}
	}
	// No more than the bytes of the largest.
	bytes, err := byteSize(p.DType, shape)
	return Place{Spec{p.Port, p.DType, shape}, 0, bytes}, err
}
