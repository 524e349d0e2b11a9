// Command producer is the Go side of the example: it fills tensors in memory that it shares with a
// strait host, has a plugin transform each, and tells a Julia process to map and reduce the result.
// Beside that it sends the same data to the same Julia code as JSON over HTTP, and has a Go process
// with libjulia inside (../embedded) do it all. Every answer is checked.
//
// ../run starts everything that it needs.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"log"
	"os"
	"os/signal"
	"syscall"
)

type settings struct {
	address  string
	elements int
	window   int
	rounds   int
	// jsonElements is the length of the series that goes as JSON.
	jsonElements int
	jsonRounds   int
	julia        string
	project      string
	consumer     string
	embedded     string
	embeddedArgs []string
	asJSON       bool
}

func main() {
	log.SetFlags(0)
	log.SetPrefix("producer: ")
	var s settings
	flag.StringVar(&s.address, "address", "", "the host's address; empty: where it usually is")
	flag.IntVar(&s.elements, "elements", 12_500_000, "length of the series, in float64")
	flag.IntVar(&s.window, "window", 64, "elements in each mean")
	flag.IntVar(&s.rounds, "rounds", 15, "rounds that count, after three that do not")
	flag.IntVar(&s.jsonElements, "json-elements", 12_500_000, "length of the series that goes as JSON")
	flag.IntVar(&s.jsonRounds, "json-rounds", 3, "rounds of JSON; spread over the others")
	flag.StringVar(&s.julia, "julia", "julia", "the julia program")
	flag.StringVar(&s.project, "project", "", "the Julia client's directory")
	flag.StringVar(&s.consumer, "consumer", "", "consumer.jl")
	flag.StringVar(&s.embedded, "embedded", "", "the program with libjulia inside; its arguments follow the options")
	flag.BoolVar(&s.asJSON, "json", false, "print one JSON object")
	flag.Parse()
	s.embeddedArgs = flag.Args()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, s); err != nil {
		stop()
		log.Fatal(err)
	}
}

func run(ctx context.Context, s settings) error {
	switch {
	case s.window < 1 || s.window > min(s.elements, s.jsonElements):
		return errors.New("the window must fit into the series")
	case s.rounds < 1 || s.jsonRounds < 1:
		return errors.New("at least one round of each is needed")
	}
	report, err := measure(ctx, s)
	if err != nil {
		return err
	}
	if s.asJSON {
		lines := json.NewEncoder(os.Stdout)
		lines.SetIndent("", "  ")
		return lines.Encode(report)
	}
	return report.print(os.Stdout)
}
