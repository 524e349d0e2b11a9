package strait

import (
	"context"
	"encoding/json"
)

// Stats is the host's counts at one moment.
type Stats struct {
	Process struct {
		FDs           int64 `json:"fds"`
		Mappings      int64 `json:"mappings"`
		Threads       int64 `json:"threads"`
		MinorFaults   int64 `json:"minor_faults"`
		ResidentBytes int64 `json:"resident_bytes"`
	} `json:"process"`
	Segments     int64 `json:"segments"`
	SegmentBytes int64 `json:"segment_bytes"`
	// Flights are this principal's.
	Flights  int64 `json:"flights"`
	Leases   int64 `json:"leases"`
	Sessions int64 `json:"sessions"`
	// Invocations since the host's start, and those under way.
	Invocations int64 `json:"invocations"`
	Running     int64 `json:"running"`
	// CopiedBytes of tensors since the host's start, and by place.
	CopiedBytes int64            `json:"copied_bytes"`
	Copied      map[string]int64 `json:"copied"`
	// Huge is about results, uploads and files: bytes for which huge pages were requested, and those that got them.
	Huge struct {
		AskedBytes int64 `json:"asked_bytes"`
		HugeBytes  int64 `json:"huge_bytes"`
	} `json:"huge"`
	// Pool is the segments that results are taken from.
	Pool struct {
		Segments     int64 `json:"segments"`
		Bytes        int64 `json:"bytes"`
		IdleSegments int64 `json:"idle_segments"`
		IdleBytes    int64 `json:"idle_bytes"`
	} `json:"pool"`
	// Account is what this principal has of the host, and may have.
	Account AccountStats `json:"account"`
	// Channels are this principal's.
	Channels []ChannelStats `json:"channels"`
	// Own is this session's share.
	Own struct {
		Leases   int64 `json:"leases"`
		Segments int64 `json:"segments"`
	} `json:"own"`
	// JSON is the host's whole answer.
	JSON json.RawMessage `json:"-"`
}

// AccountStats is what a principal has of a host. Refused counts what did not fit its quota.
type AccountStats struct {
	// Quotas by name: bytes, segments, connections, … ; nil: as many as the host has.
	Quotas    map[string]*uint64 `json:"quotas"`
	Bytes     uint64             `json:"bytes"`
	PeakBytes uint64             `json:"peak_bytes"`
	Segments  int64              `json:"segments"`
	Refused   int64              `json:"refused"`
	// Elsewhere is what the host let go of and somebody still has open.
	ElsewhereBytes     uint64 `json:"elsewhere_bytes"`
	ElsewhereSegments  int64  `json:"elsewhere_segments"`
	Connections        int64  `json:"connections"`
	ConnectionsRefused int64  `json:"connections_refused"`
	Sessions           int64  `json:"sessions"`
	Streams            int64  `json:"streams"`
	StreamsRefused     int64  `json:"streams_refused"`
	Leases             int64  `json:"leases"`
	LeasesRefused      int64  `json:"leases_refused"`
	Names              int64  `json:"names"`
	NamesRefused       int64  `json:"names_refused"`
	Descriptors        int64  `json:"descriptors"`
	DescriptorsRefused int64  `json:"descriptors_refused"`
	Invocations        int64  `json:"invocations"`
	Queued             int64  `json:"queued"`
	Running            int64  `json:"running"`
	QueueRefused       int64  `json:"queue_refused"`
	// CPUPercent of one CPU in about the last minute, and what was more than the quota before.
	CPUPercent int64   `json:"cpu_percent"`
	CPURefused int64   `json:"cpu_refused"`
	CPUSeconds float64 `json:"cpu_seconds"`
}

// ChannelStats is how far one channel has come.
type ChannelStats struct {
	Name   string `json:"name"`
	Kernel string `json:"kernel"`
	// Batches so far.
	Batches uint64 `json:"batches"`
	// LagBatches are not acknowledged yet, the oldest of them for LagMS milliseconds.
	LagBatches uint64 `json:"lag_batches"`
	LagMS      int64  `json:"lag_ms"`
	IsRead     bool   `json:"is_read"`
}

// Stats asks the host for its counts. ClientStats has this client's own.
func (c *Client) Stats(ctx context.Context) (Stats, error) {
	var stats Stats
	if err := c.conn.ask(ctx, opStats, &emptyRequest{}, &stats.JSON); err != nil {
		return Stats{}, err
	}
	return stats, decodeBody(stats.JSON, &stats)
}

// ClientStats is what one client did.
type ClientStats struct {
	// CopiedBytes of tensors that were copied on this side: Slice inputs, small results (out of the reply, and each
	// time that they go into a call or under a name), all that goes into a call of a Prepared or Stream and comes out of it or of a Channel, and
	// a bool8 with bytes that no Go bool has. With a host that is not on this machine also all that goes there and comes from there.
	CopiedBytes int64
	// HugeBytes of tensors to fill that got huge pages before the first fill. Tensors of less than 4 MiB
	// do without; so does all memory where Linux has no huge pages at hand.
	HugeBytes int64
	// Calls that were sent, those of a Prepared and the chunks of a Stream among them.
	Calls int64
	// Mappings that are live, including those in the cache for copies.
	Mappings int64
	// Forgotten tensors: they lent a slice and were never released. They stay mapped.
	Forgotten int64
}

// ClientStats is this client's own counts since Dial.
func (c *Client) ClientStats() ClientStats {
	copied := c.conn.copiedBytes.Load()
	if c.conn.copiedFar != nil {
		copied += c.conn.copiedFar()
	}
	return ClientStats{
		CopiedBytes: copied,
		HugeBytes:   c.conn.hugeBytes.Load(),
		Calls:       c.conn.calls.Load(),
		Mappings:    c.conn.mappings.Load(),
		Forgotten:   c.conn.lostTensors.Load(),
	}
}
