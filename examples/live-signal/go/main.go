// Command live-signal feeds a signal of two channels, 48000 rows a second in chunks of 10 ms, to two kernels whose rows go to
// whoever reads them. See ../README.md.
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"os"
	"os/signal"
	"slices"
	"time"

	"strait"
)

func main() {
	log.SetFlags(0)
	var p producer
	address := flag.String("address", "", "the host's, as unix:///run/strait; empty: the one that serves here")
	flag.IntVar(&p.chunks, "chunks", 500, "how many chunks")
	flag.IntVar(&p.live, "live", -1, "so many of them in real time, one each 10 ms, and the others as fast as they are taken; -1: all")
	flag.Int64Var(&p.growthMax, "growth", 8<<20, "bytes by which the host's resident size may grow once 1000 chunks have passed")
	flag.Parse()
	if flag.NArg() > 0 || p.chunks < 1 {
		log.Fatal("usage: live-signal [-address ADDRESS] [-chunks N] [-live N] [-growth BYTES], N from 1 on")
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := p.run(ctx, *address); err != nil {
		log.Fatal(err)
	}
}

type producer struct {
	chunks, live int
	growthMax    int64
	client       *strait.Client
	filtered     *strait.Stream
	power        *strait.Stream
}

// Chunks after which the host has all that it needs.
const warmChunks = 1000

func (p *producer) run(ctx context.Context, address string) error {
	var err error
	if p.client, err = strait.Dial(ctx, address); err != nil {
		return err
	}
	defer p.client.Close()
	chunk := strait.Each[float32](chunkRows, channels)
	// A reader may pause for a minute.
	to := func(name string) strait.ChannelOptions { return strait.ChannelOptions{Name: name, Wait: time.Minute} }
	p.filtered, err = p.client.PrepareStream(ctx, "fir", strait.Inputs{"x": chunk, "taps": strait.Slice(lowPass())}, to("filtered"))
	if err != nil {
		return err
	}
	defer p.filtered.Close()
	p.power, err = p.client.PrepareStream(ctx, "rolling-mean", strait.Inputs{"x": chunk}, strait.Param("window", chunkRows), to("power"))
	if err != nil {
		return err
	}
	defer p.power.Close()
	if err := p.awaitReader(ctx); err != nil {
		return err
	}
	return p.feed(ctx)
}

// awaitReader lets real time begin when somebody reads both channels.
func (p *producer) awaitReader(ctx context.Context) error {
	for range 1200 {
		stats, err := p.client.Stats(ctx)
		if err != nil {
			return err
		}
		waits := func(c strait.ChannelStats) bool { return !c.IsRead && (c.Name == "filtered" || c.Name == "power") }
		if !slices.ContainsFunc(stats.Channels, waits) {
			return nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return fmt.Errorf("nobody has come for a minute to read the channels `filtered` and `power`")
}

// feed sends chunk after chunk, and says at the end how fast that was and what it cost the host.
func (p *producer) feed(ctx context.Context) error {
	x, squares := make([]float32, chunkRows*channels), make([]float32, chunkRows*channels)
	samples, powers := strait.Inputs{"x": strait.Slice(x, chunkRows, channels)}, strait.Inputs{"x": strait.Slice(squares, chunkRows, channels)}
	var warm int64
	var late time.Duration
	begun := time.Now()
	for number := range p.chunks {
		if number < p.live || p.live < 0 {
			// Against the clock and not against the chunk before: a late one delays no other.
			due := begun.Add(time.Duration(number) * chunkTime)
			time.Sleep(time.Until(due))
			late = max(late, time.Since(due))
		}
		if number == p.live {
			begun = time.Now()
		}
		fill(x, number)
		for i, sample := range x {
			squares[i] = sample * sample
		}
		if _, err := p.filtered.Chunk(ctx, samples); err != nil {
			return fmt.Errorf("chunk %d: %w", number, err)
		}
		if _, err := p.power.Chunk(ctx, powers); err != nil {
			return fmt.Errorf("power of chunk %d: %w", number, err)
		}
		if number+1 == min(warmChunks, p.chunks) {
			var err error
			if warm, err = p.resident(ctx); err != nil {
				return err
			}
		}
	}
	// Both return when their reader has read everything.
	for _, stream := range []*strait.Stream{p.filtered, p.power} {
		if _, err := stream.Last(ctx, nil); err != nil {
			return fmt.Errorf("the end: %w", err)
		}
	}
	return p.report(ctx, time.Since(begun), late, warm)
}

func (p *producer) resident(ctx context.Context) (int64, error) {
	stats, err := p.client.Stats(ctx)
	return stats.Process.ResidentBytes, err
}

func (p *producer) report(ctx context.Context, took, late time.Duration, warm int64) error {
	if live := p.live; live != 0 {
		if live < 0 || live > p.chunks {
			live = p.chunks
		}
		fmt.Printf("%d chunks in real time, the latest %.1f ms late\n", live, late.Seconds()*1e3)
	}
	if fast := p.chunks - p.live; p.live >= 0 && fast > 0 {
		each := took / time.Duration(fast)
		fmt.Printf("%d chunks of 10 ms in %.1f s: %.0f us each, %.0f times real time\n",
			fast, took.Seconds(), float64(each.Nanoseconds())/1e3, chunkTime.Seconds()/each.Seconds())
	}
	now, err := p.resident(ctx)
	if err != nil {
		return err
	}
	fmt.Printf("the host's resident size: %.1f MiB after %d chunks, %.1f MiB after %d\n",
		mib(warm), min(warmChunks, p.chunks), mib(now), p.chunks)
	if now-warm > p.growthMax {
		return fmt.Errorf("the host has grown by %d bytes, and %d are allowed", now-warm, p.growthMax)
	}
	return nil
}

func mib(bytes int64) float64 { return float64(bytes) / (1 << 20) }
