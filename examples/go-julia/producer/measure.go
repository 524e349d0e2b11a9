package main

import (
	"context"
	"fmt"
	"math"
	"time"

	"strait"
	"strait/examples/go-julia/series"
)

const (
	// Rounds until every segment and page is as warm as in a service that runs for a while.
	warmRounds = 3
	kernel     = "moving-average"
	flight     = "go-julia-smoothed"
	// Sums of the same numbers in another order.
	tolerance = 1e-9
)

// measure runs all paths, in turns, so that a busy moment of the machine hits all of them.
func measure(ctx context.Context, s settings) (_ *report, err error) {
	client, err := strait.Dial(ctx, s.address, strait.WithName("go-julia/producer"))
	if err != nil {
		return nil, err
	}
	defer client.Close()
	consumer, err := startChild(ctx, s.julia, "--startup-file=no", "--project="+s.project, s.consumer,
		"unix://"+client.Welcome().Directory)
	if err != nil {
		return nil, err
	}
	defer consumer.stop(&err)
	embedded, err := startChild(ctx, s.embedded, append(s.embeddedArgs, fmt.Sprint("-elements=", s.elements), fmt.Sprint("-window=", s.window))...)
	if err != nil {
		return nil, err
	}
	defer embedded.stop(&err)
	x, err := strait.NewTensor[float64](ctx, client, s.elements)
	if err != nil {
		return nil, err
	}
	defer x.Release()
	shared := &sharedPath{client: client, consumer: consumer, x: x, window: s.window, expected: make([]float64, series.Means(s.elements, s.window))}
	defer func() { _ = client.Delete(context.WithoutCancel(ctx), flight) }()
	web, err := newJSONPath(consumer, s.jsonElements, s.window)
	if err != nil {
		return nil, err
	}
	defer web.close()

	r := newReport(s)
	for round := range warmRounds + s.rounds {
		seed := uint64(round + 1)
		measured := round >= warmRounds
		if err := shared.round(ctx, seed, r, measured); err != nil {
			return nil, fmt.Errorf("strait, round %d: %w", round, err)
		}
		if err := embeddedRound(embedded, seed, shared.sum, r, measured); err != nil {
			return nil, fmt.Errorf("cgo, round %d: %w", round, err)
		}
		// The first is for Julia's compiler.
		if jsonRound := round - warmRounds; jsonRound < s.jsonRounds && jsonRound >= -1 {
			if err := web.round(seed, r, measured); err != nil {
				return nil, fmt.Errorf("JSON, round %d: %w", round, err)
			}
		}
	}
	r.finish()
	return r, nil
}

// sharedPath is Go → kernel → Julia through the host.
type sharedPath struct {
	client   *strait.Client
	consumer *child
	x        strait.TensorOf[float64]
	window   int
	// expected is the kernel's result, computed here.
	expected []float64
	// sum is what Julia found last.
	sum float64
}

// mapAnswer is the consumer's to "map", in seconds and bytes.
type mapAnswer struct {
	Sum       float64 `json:"sum"`
	Elements  int     `json:"elements"`
	Allocated int64   `json:"allocated"`
	Map       float64 `json:"map"`
	Reduce    float64 `json:"reduce"`
}

// inspectAnswer is the consumer's to "inspect".
type inspectAnswer struct {
	Sum       float64 `json:"sum"`
	Elements  int     `json:"elements"`
	Allocated int64   `json:"allocated"`
	// Pass is the reduction alone, over pages that this process had touched before.
	Pass float64 `json:"pass"`
	// Release is what giving the pages back takes.
	Release float64 `json:"release"`
	Digest  uint64  `json:"digest"`
	Device  uint64  `json:"device"`
	Inode   uint64  `json:"inode"`
}

func (p *sharedPath) round(ctx context.Context, seed uint64, r *report, measured bool) error {
	options := []strait.CallOption{strait.Param("window", p.window),
		strait.PublishAs("y", flight), strait.Replace(), strait.WithoutResults()}
	if !measured {
		options = append(options, strait.Verify())
	}
	begun := time.Now()
	series.Fill(p.x.Data(), seed)
	filled := time.Since(begun)

	begun = time.Now()
	result, err := p.client.Call(ctx, kernel, strait.Inputs{"x": p.x}, options...)
	if err != nil {
		return err
	}
	called := time.Since(begun)
	var mapped mapAnswer
	if err := p.consumer.ask(&mapped, "map", flight); err != nil {
		return err
	}
	total := time.Since(begun)

	var seen inspectAnswer
	if err := p.consumer.ask(&seen, "inspect", flight); err != nil {
		return err
	}
	if err := p.check(result, &mapped, &seen); err != nil {
		return err
	}
	if !measured {
		return p.samePages(result.Pages, file{seen.Device, seen.Inode})
	}
	run := result.Timing.Run.Seconds()
	r.shared.add(total.Seconds(), run, mapped.Reduce)
	r.Stages.add(total.Seconds(), filled.Seconds(), called.Seconds(), run, &mapped, &seen)
	return nil
}

// check holds the round's answers against what this process computes, outside of the time.
func (p *sharedPath) check(result *strait.Result, mapped *mapAnswer, seen *inspectAnswer) error {
	series.Average(p.expected, p.x.Data(), p.window)
	digest := series.Digest(p.expected)
	own := p.client.ClientStats().CopiedBytes
	switch {
	case result.CopiedBytes != 0:
		return fmt.Errorf("the host copied %d bytes of a call that needs no copy", result.CopiedBytes)
	case own != 0:
		return fmt.Errorf("this client copied %d bytes", own)
	case mapped.Allocated != 0 || seen.Allocated != 0:
		return fmt.Errorf("Julia allocated %d and %d bytes in two reductions, expected none", mapped.Allocated, seen.Allocated)
	case mapped.Elements != len(p.expected):
		return fmt.Errorf("Julia mapped %d elements, expected %d", mapped.Elements, len(p.expected))
	case seen.Digest != digest:
		return fmt.Errorf("Julia saw other elements than the ones computed here: their digest is %x, expected %x", seen.Digest, digest)
	}
	p.sum = mapped.Sum
	return near(mapped.Sum, series.Sum(p.expected))
}

// samePages compares the memory files that the host moved into the guest with the one that this
// process fills and the one that Julia mapped.
func (p *sharedPath) samePages(pages []strait.PortPages, consumed file) error {
	filled, err := memoryFile(p.x.Data())
	if err != nil {
		return err
	}
	own := map[string]file{"x": filled, "y": consumed}
	for _, page := range pages {
		guest := file{page.Device, page.Inode}
		if own[page.Port] != guest {
			return fmt.Errorf("%q is memory file %v in the guest and %v in this example's process", page.Port, guest, own[page.Port])
		}
		delete(own, page.Port)
	}
	if len(own) != 0 {
		return fmt.Errorf("the host did not say which pages %v are", own)
	}
	return nil
}

func near(got, want float64) error {
	if difference := math.Abs(got - want); !(difference <= tolerance*math.Abs(want)) {
		return fmt.Errorf("Julia's sum is %v, expected %v: off by %g, allowed is %g", got, want, difference, tolerance*math.Abs(want))
	}
	return nil
}
