package strait

import (
	"encoding/binary"
	"encoding/json"
)

// The data socket's frames and JSON bodies, as docs/protocol.md states them.

type op uint8

const (
	opHello    op = 1
	opWelcome  op = 2
	opOK       op = 3
	opError    op = 4
	opKernels  op = 5
	opLookup   op = 6
	opList     op = 7
	opPublish  op = 8
	opDrop     op = 9
	opStats    op = 10
	opCreate   op = 11
	opAdopt    op = 13
	opMap      op = 14
	opRelease  op = 15
	opRenew    op = 16
	opInvoke   op = 17
	opPrepare  op = 18
	opCall     op = 19
	opCancel   op = 20
	opStream   op = 21
	opPing     op = 22
	opChunk    op = 64
	opGone     op = 65
	opShutdown op = 66
	opLast     op = 67
)

const (
	protocolVersion = 2
	headerBytes     = 48
	bodyBytesMax    = 61440
	frameBytesMax   = headerBytes + bodyBytesMax + payloadBytesMax
	fdsMax          = 16
)

// header is what a frame's first 48 bytes say beside its lengths.
type header struct {
	op       op
	sequence uint32
	trace    traceContext
}

// traceContext is W3C's: the trace that a request belongs to. All zero: none.
type traceContext struct {
	traceID  [16]byte
	parentID [8]byte
	flags    byte
}

// beside is what goes with a frame's JSON: elements of small tensors, and descriptors.
type beside struct {
	payload []byte
	fds     []int
}

// encodeFrame is the packet of a request.
func encodeFrame(h header, body any, payload []byte) ([]byte, error) {
	text, err := json.Marshal(body)
	if err != nil {
		return nil, argumentError("a request that JSON cannot express: %w", err)
	}
	if len(text) > bodyBytesMax {
		return nil, argumentError("a request of %d bytes; at most %d fit into a frame: shorten its lists or names", len(text), bodyBytesMax)
	}
	frame := make([]byte, headerBytes, headerBytes+len(text)+len(payload))
	encodeHeader(frame, h, len(text), len(payload))
	return append(append(frame, text...), payload...), nil
}

func encodeHeader(frame []byte, h header, bodyBytes, payloadBytes int) {
	frame[0], frame[1], frame[2], frame[3] = 'S', 'T', protocolVersion, byte(h.op)
	binary.LittleEndian.PutUint32(frame[4:], h.sequence)
	binary.LittleEndian.PutUint32(frame[8:], uint32(bodyBytes))
	binary.LittleEndian.PutUint32(frame[12:], uint32(payloadBytes))
	copy(frame[16:], h.trace.traceID[:])
	copy(frame[32:], h.trace.parentID[:])
	frame[40] = h.trace.flags
}

// decodeFrame takes a packet apart: body and payload are parts of it.
func decodeFrame(packet []byte) (h header, body, payload []byte, err error) {
	h, bodyBytes, err := decodeHeader(packet, len(packet))
	if err != nil {
		return header{}, nil, nil, err
	}
	body, payload = packet[headerBytes:headerBytes+bodyBytes], packet[headerBytes+bodyBytes:]
	return h, body, payload, nil
}

// decodeHeader reads the beginning of a packet that has so many bytes in all. What is neither header nor body is payload.
func decodeHeader(packet []byte, length int) (h header, body int, err error) {
	refuse := func(format string, args ...any) (header, int, error) {
		return header{}, 0, protocolError(format, args...)
	}
	// What is of another version is told so, however long its header is.
	if len(packet) > 2 {
		if packet[0] != 'S' || packet[1] != 'T' {
			return refuse("a frame starts with %x and not with \"ST\"", packet[:2])
		}
		if packet[2] != protocolVersion {
			return refuse("a frame of protocol version %d; this client speaks version %d", packet[2], protocolVersion)
		}
	}
	if len(packet) < headerBytes {
		return refuse("a frame of %d bytes is shorter than its header of %d", len(packet), headerBytes)
	}
	bodyBytes, payloadBytes := binary.LittleEndian.Uint32(packet[8:]), binary.LittleEndian.Uint32(packet[12:])
	had := length - headerBytes
	if uint64(bodyBytes)+uint64(payloadBytes) != uint64(had) || bodyBytes > bodyBytesMax || payloadBytes > payloadBytesMax {
		return refuse("a header says %d body bytes of at most %d and %d payload bytes of at most %d, the packet has %d",
			bodyBytes, bodyBytesMax, payloadBytes, payloadBytesMax, had)
	}
	h = header{
		op:       op(packet[3]),
		sequence: binary.LittleEndian.Uint32(packet[4:]),
		trace:    traceContext{[16]byte(packet[16:32]), [8]byte(packet[32:40]), packet[40]},
	}
	if payloadBytes != 0 && !h.op.carries() {
		return refuse("%d payload bytes after op %d; only INVOKE, CALL, CHUNK, LAST and the answers to them carry a payload", payloadBytes, h.op)
	}
	if reserved := packet[41:44]; reserved[0]|reserved[1]|reserved[2] != 0 {
		return refuse("reserved bytes %x in a header; they are 0", reserved)
	}
	if flags := binary.LittleEndian.Uint32(packet[44:]); flags != 0 {
		return refuse("flags %#x in a header; none is known", flags)
	}
	return h, int(bodyBytes), nil
}

// carries says whether a payload may follow the JSON.
func (o op) carries() bool {
	switch o {
	case opInvoke, opCall, opChunk, opLast, opOK:
		return true
	}
	return false
}

// decodeBody reads a reply's JSON; an empty body stands for {}.
func decodeBody(body []byte, into any) error {
	if len(body) == 0 {
		body = []byte("{}")
	}
	if err := json.Unmarshal(body, into); err != nil {
		return protocolError("a malformed reply: %w", err)
	}
	return nil
}

// traced is in every request.
type traced struct {
	RequestID string `json:"request_id,omitempty"`
}

func (t *traced) trace(id string) { t.RequestID = id }

type request interface{ trace(id string) }

type helloRequest struct {
	traced
	Protocol int    `json:"protocol"`
	Client   string `json:"client"`
}

type emptyRequest struct{ traced }

type kernelsRequest struct {
	traced
	After  string `json:"after,omitempty"`
	Kernel string `json:"kernel,omitempty"`
}

type nameRequest struct {
	traced
	Name string `json:"name"`
}

type listRequest struct {
	traced
	After string `json:"after,omitempty"`
}

type createRequest struct {
	traced
	Tensors []Spec `json:"tensors"`
	LeaseMS int64  `json:"lease_ms,omitempty"`
}

type publishRequest struct {
	traced
	Segment string `json:"segment"`
	Name    string `json:"name"`
	Replace bool   `json:"replace,omitempty"`
}

type adoptRequest struct {
	traced
	Tensors []Place `json:"tensors"`
	Name    string  `json:"name,omitempty"`
	Replace bool    `json:"replace,omitempty"`
	LeaseMS int64   `json:"lease_ms,omitempty"`
}

type mapRequest struct {
	traced
	Name    string `json:"name,omitempty"`
	LeaseMS int64  `json:"lease_ms,omitempty"`
}

type leasesRequest struct {
	traced
	Leases  []uint64 `json:"leases"`
	LeaseMS int64    `json:"lease_ms,omitempty"`
}

// cancelRequest has one of the two.
type cancelRequest struct {
	traced
	Sequence uint32 `json:"sequence,omitempty"`
	Prepared uint64 `json:"prepared,omitempty"`
}

// kernelRequest is what INVOKE and PREPARE have in common.
type kernelRequest struct {
	traced
	Kernel     string         `json:"kernel,omitempty"`
	Inputs     map[string]any `json:"inputs"`
	Parameters map[string]any `json:"parameters,omitempty"`
	DeadlineMS int64          `json:"deadline_ms,omitempty"`
	Limits     *Limits        `json:"limits,omitempty"`
}

type prepareRequest struct {
	kernelRequest
	Stream  bool            `json:"stream,omitempty"`
	Channel *channelRequest `json:"channel,omitempty"`
	Ring    bool            `json:"ring,omitempty"`
}

// channelRequest has what comes of a stream go to a channel.
type channelRequest struct {
	Name     string `json:"name"`
	Batches  int    `json:"batches,omitempty"`
	WaitMS   int64  `json:"wait_ms,omitempty"`
	ResumeMS int64  `json:"resume_ms,omitempty"`
}

type streamRequest struct {
	traced
	Channel string `json:"channel"`
}

type invokeRequest struct {
	kernelRequest
	Pipeline       *Pipeline         `json:"pipeline,omitempty"`
	Publish        map[string]string `json:"publish,omitempty"`
	Replace        bool              `json:"replace,omitempty"`
	Seal           bool              `json:"seal,omitempty"`
	LeaseMS        int64             `json:"lease_ms,omitempty"`
	InlineBytes    int64             `json:"inline_bytes,omitempty"`
	Map            *bool             `json:"map,omitempty"`
	Threads        int               `json:"threads,omitempty"`
	Verify         bool              `json:"verify,omitempty"`
	IdempotencyKey string            `json:"idempotency_key,omitempty"`
	// Goes behind the JSON.
	payload []byte
}

type inlineInput struct {
	Inline inlineTensor `json:"inline"`
}

type segmentInput struct {
	Segment string `json:"segment"`
	Tensor  string `json:"tensor,omitempty"`
}

// specInput is an input of PREPARE that each CALL brings.
type specInput struct {
	DType DType `json:"dtype"`
	Shape []int `json:"shape"`
}

// mappedReply is the OK to CREATE, ADOPT, MAP, LOOKUP and PUBLISH.
type mappedReply struct {
	Mapping   Mapping `json:"mapping"`
	Lease     uint64  `json:"lease"`
	ExpiresMS int64   `json:"expires_ms"`
}

func (r *mappedReply) checkLease() error {
	if r.Lease == 0 {
		return protocolError("segment %s comes without a lease", r.Mapping.Segment)
	}
	return nil
}

type listReply struct {
	Flights []Flight `json:"flights"`
	More    bool     `json:"more"`
}

type kernelsReply struct {
	Kernels []Kernel `json:"kernels"`
	More    bool     `json:"more"`
}

type renewReply struct {
	ExpiresMS int64 `json:"expires_ms"`
}

// resultEntry has either a mapping or bytes in the payload.
type resultEntry struct {
	Port      string        `json:"port"`
	Mapping   *Mapping      `json:"mapping"`
	Inline    *inlineTensor `json:"inline"`
	Lease     uint64        `json:"lease"`
	ExpiresMS int64         `json:"expires_ms"`
	FD        *int          `json:"fd"`
	Name      string        `json:"name"`
}

type invokeReply struct {
	Results     []resultEntry `json:"results"`
	Notes       []Note        `json:"notes"`
	CopiedBytes int64         `json:"copied_bytes"`
	Pages       []PortPages   `json:"pages"`
	MinorFaults int64         `json:"minor_faults"`
	Slices      int64         `json:"slices"`
	Seconds     struct {
		Queue       float64 `json:"queue"`
		Instantiate float64 `json:"instantiate"`
		Open        float64 `json:"open"`
		Reserve     float64 `json:"reserve"`
		MoveIn      float64 `json:"move_in"`
		Run         float64 `json:"run"`
		MoveOut     float64 `json:"move_out"`
		Total       float64 `json:"total"`
	} `json:"seconds"`
	Stages    []stageReply `json:"stages"`
	RequestID string       `json:"request_id"`
}

type prepareReply struct {
	Prepared     uint64          `json:"prepared"`
	RequestBytes int64           `json:"request_bytes"`
	Inputs       []preparedPlace `json:"inputs"`
	ReplyBytes   int64           `json:"reply_bytes"`
	Outputs      []preparedPlace `json:"outputs"`
	Ring         *ringReply      `json:"ring"`
	RequestID    string          `json:"request_id"`
}

type streamReply struct {
	Channel    string          `json:"channel"`
	Kernel     string          `json:"kernel"`
	Outputs    []preparedPlace `json:"outputs"`
	BatchBytes int64           `json:"batch_bytes"`
	First      uint64          `json:"first"`
}

// preparedPlace is a tensor's in the payload of a CALL or CHUNK, or of the answers to it.
type preparedPlace struct {
	Port   string `json:"port"`
	DType  DType  `json:"dtype"`
	Shape  []int  `json:"shape"`
	Offset int64  `json:"offset"`
	Length int64  `json:"length"`
}

type callReply struct {
	Notes []Note `json:"notes"`
}

// grantedLeases is what any reply may say about leases, for replies that nobody waits for any more.
type grantedLeases struct {
	Lease   uint64 `json:"lease"`
	Results []struct {
		Lease uint64 `json:"lease"`
	} `json:"results"`
}

type gonePush struct {
	Lease  uint64 `json:"lease"`
	Reason string `json:"reason"`
}

type shutdownPush struct {
	DrainMS int64 `json:"drain_ms"`
}
