package main

import (
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
)

// samples of one figure, a round each.
type samples []float64

func (s *samples) add(value float64) { *s = append(*s, value) }

func (s samples) median() float64 {
	sorted := slices.Sorted(slices.Values(s))
	middle := len(sorted) / 2
	if len(sorted)%2 == 1 {
		return sorted[middle]
	}
	return (sorted[middle-1] + sorted[middle]) / 2
}

// path is one way from Go to Julia, and what it took: medians over the rounds.
type path struct {
	Name string `json:"name"`
	// Bytes of the series that went in.
	Bytes  int64 `json:"bytes"`
	Rounds int   `json:"rounds"`
	// Seconds from the filled series to Julia's sum; the next three are its parts.
	Seconds          float64 `json:"seconds"`
	TransformSeconds float64 `json:"transform_seconds"`
	HandOverSeconds  float64 `json:"hand_over_seconds"`
	ReduceSeconds    float64 `json:"reduce_seconds"`
	BytesPerSecond   float64 `json:"bytes_per_second"`
	// TimesStrait is how much longer it takes for each byte than through the host.
	TimesStrait float64 `json:"times_strait"`
	// CopiedBytes of tensors in one round.
	CopiedBytes int64  `json:"copied_bytes"`
	Copies      string `json:"copies"`

	total, transform, handOver, reduce samples
}

func (p *path) add(total, transform, reduce float64) {
	p.total.add(total)
	p.transform.add(transform)
	p.handOver.add(total - transform - reduce)
	p.reduce.add(reduce)
}

func (p *path) finish() {
	p.Rounds = len(p.total)
	p.Seconds, p.TransformSeconds = p.total.median(), p.transform.median()
	p.HandOverSeconds, p.ReduceSeconds = p.handOver.median(), p.reduce.median()
	p.BytesPerSecond = float64(p.Bytes) / p.Seconds
}

// stages of Go → kernel → Julia through the host: medians in seconds.
type stages struct {
	// Fill is the producer's own work, in no path's time.
	Fill float64 `json:"fill"`
	// Call is from the producer's request to the host's answer; Kernel, a part of it, is inside the guest.
	Call   float64 `json:"call"`
	Kernel float64 `json:"kernel"`
	Map    float64 `json:"map"`
	// Reduce is the consumer's first pass, with the faults for its page tables.
	Reduce float64 `json:"reduce"`
	// Release is the giving back of the pages, after the answer; in no path's time.
	Release float64 `json:"release"`
	// Pass is the consumer's pass over pages that its page tables have already.
	Pass float64 `json:"pass"`

	fill, call, kernel, mapping, reduce, release, pass, ratio, ratioOfFirst samples
}

func (s *stages) add(total, fill, call, kernel float64, mapped *mapAnswer, seen *inspectAnswer) {
	s.fill.add(fill)
	s.call.add(call)
	s.kernel.add(kernel)
	s.mapping.add(mapped.Map)
	s.reduce.add(mapped.Reduce)
	s.release.add(seen.Release)
	s.pass.add(seen.Pass)
	s.ratio.add(total / (kernel + seen.Pass))
	s.ratioOfFirst.add(total / (kernel + mapped.Reduce))
}

// jsonStages: medians in seconds, and the text's length.
type jsonStages struct {
	Encode   float64 `json:"encode"`
	Transfer float64 `json:"transfer"`
	Parse    float64 `json:"parse"`
	Text     int64   `json:"text_bytes"`

	encode, transfer, parse samples
}

func (s *jsonStages) add(encode, transfer, parse float64, text int64) {
	s.encode.add(encode)
	s.transfer.add(transfer)
	s.parse.add(parse)
	s.Text = text
}

type report struct {
	// Verified: every sum, digest, counter and inode was as expected; else there is no report.
	Verified bool    `json:"verified"`
	Kernel   string  `json:"kernel"`
	Window   int     `json:"window"`
	Paths    []*path `json:"paths"`
	// Ratio is the whole time of a round through the host over the sum of the kernel's own time and the
	// consumer's pass over pages that its page tables have already; RatioOfFirst has the consumer's first
	// pass there, with the faults for its page tables. Medians of the rounds' ratios.
	Ratio        float64    `json:"total_over_kernel_and_pass"`
	RatioOfFirst float64    `json:"total_over_kernel_and_first_pass"`
	Stages       stages     `json:"stages_seconds"`
	JSONStages   jsonStages `json:"json_stages_seconds"`

	shared, cgo, cgoFresh, cgoLent, json path
}

func newReport(s settings) *report {
	bytes, jsonBytes := int64(s.elements)*8, int64(s.jsonElements)*8
	r := &report{Kernel: kernel, Window: s.window}
	r.shared = path{Name: "strait", Bytes: bytes, Copies: "none (host's and client's counters)"}
	r.cgo = path{Name: "cgo, memcpy into one Array", Bytes: bytes, Copies: "1"}
	r.cgoFresh = path{Name: "cgo, memcpy into a new Array", Bytes: bytes, Copies: "1, into fresh pages"}
	r.cgoLent = path{Name: "cgo, Array over Go's memory", Bytes: bytes, Copies: "none, no isolation"}
	r.json = path{Name: "JSON over HTTP", Bytes: jsonBytes, Copies: "to text and back, socket in and out"}
	r.Paths = []*path{&r.shared, &r.cgo, &r.cgoFresh, &r.cgoLent, &r.json}
	return r
}

func (r *report) finish() {
	r.Verified = true
	// At least: text out of numbers, into the socket, out of it, numbers out of text.
	r.json.CopiedBytes = 3*r.JSONStages.Text + r.json.Bytes
	for _, p := range r.Paths {
		p.finish()
		p.TimesStrait = r.shared.BytesPerSecond / p.BytesPerSecond
	}
	s := &r.Stages
	r.Ratio, r.RatioOfFirst = s.ratio.median(), s.ratioOfFirst.median()
	s.Fill, s.Call, s.Kernel, s.Map = s.fill.median(), s.call.median(), s.kernel.median(), s.mapping.median()
	s.Reduce, s.Release, s.Pass = s.reduce.median(), s.release.median(), s.pass.median()
	j := &r.JSONStages
	j.Encode, j.Transfer, j.Parse = j.encode.median(), j.transfer.median(), j.parse.median()
}

func milliseconds(seconds float64) float64 { return seconds * 1e3 }

func (r *report) print(to io.Writer) error {
	fmt.Fprintf(to, "Go → %s(window=%d) → Julia, %.1f MB of float64; medians\n\n", r.Kernel, r.Window, float64(r.shared.Bytes)/1e6)
	table := tabwriter.NewWriter(to, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "path\tMB\trounds\tms\ttransform\thand-over\treduce\tGB/s\t× strait\tcopies")
	for _, p := range r.Paths {
		fmt.Fprintf(table, "%s\t%.1f\t%d\t%.1f\t%.1f\t%.1f\t%.1f\t%.2f\t%.2f\t%s\n", p.Name, float64(p.Bytes)/1e6, p.Rounds, milliseconds(p.Seconds),
			milliseconds(p.TransformSeconds), milliseconds(p.HandOverSeconds), milliseconds(p.ReduceSeconds),
			p.BytesPerSecond/1e9, p.TimesStrait, p.Copies)
	}
	if err := table.Flush(); err != nil {
		return err
	}
	s, j := &r.Stages, &r.JSONStages
	_, err := fmt.Fprintf(to, `
strait: call %.2f ms (kernel %.2f), map %.2f, reduce %.2f (without faults: %.2f), before and after: fill %.1f, release %.2f
JSON:   encode %.0f ms, transfer %.0f, parse %.0f; %.0f MB of text
the whole round took %.3f times the kernel's own time + the consumer's own pass with its page faults,
%.3f times the kernel's own time + a pass without faults (expected at 100 MB: at most 1.15)
verified: every element and sum; the same memory files in Go, guest and Julia; no byte copied by host or
client; no byte allocated by Julia in a reduction
`, milliseconds(s.Call), milliseconds(s.Kernel), milliseconds(s.Map), milliseconds(s.Reduce), milliseconds(s.Pass), milliseconds(s.Fill),
		milliseconds(s.Release), milliseconds(j.Encode), milliseconds(j.Transfer), milliseconds(j.Parse), float64(j.Text)/1e6, r.RatioOfFirst, r.Ratio)
	return err
}
