package main

import (
	"encoding/json"
	"fmt"
	"log"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"strait/examples/go-julia/series"
)

// jsonPath serves the transformed series as JSON over HTTP, and has Julia get and reduce it.
type jsonPath struct {
	consumer *child
	window   int
	server   http.Server
	port     int
	done     sync.WaitGroup

	x, y []float64
	// What the last request took the server, in seconds.
	transform, encode float64
}

func newJSONPath(consumer *child, elements, window int) (*jsonPath, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p := &jsonPath{
		consumer: consumer,
		window:   window,
		port:     listener.Addr().(*net.TCPAddr).Port,
		x:        make([]float64, elements),
		y:        make([]float64, series.Means(elements, window)),
	}
	p.server.Handler = http.HandlerFunc(p.serve)
	p.done.Go(func() { _ = p.server.Serve(listener) })
	return p, nil
}

func (p *jsonPath) close() {
	_ = p.server.Close()
	p.done.Wait()
}

func (p *jsonPath) serve(w http.ResponseWriter, _ *http.Request) {
	begun := time.Now()
	series.Average(p.y, p.x, p.window)
	transformed := time.Now()
	text, err := json.Marshal(p.y)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	p.transform, p.encode = transformed.Sub(begun).Seconds(), time.Since(transformed).Seconds()
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(text)))
	if _, err := w.Write(text); err != nil {
		// The consumer will say why it went away.
		log.Print(err)
	}
}

// getAnswer is the consumer's to "get", in seconds and bytes.
type getAnswer struct {
	Sum      float64 `json:"sum"`
	Elements int     `json:"elements"`
	Text     int64   `json:"text"`
	Receive  float64 `json:"receive"`
	Parse    float64 `json:"parse"`
	Reduce   float64 `json:"reduce"`
}

func (p *jsonPath) round(seed uint64, r *report, measured bool) error {
	series.Fill(p.x, seed)
	begun := time.Now()
	var got getAnswer
	if err := p.consumer.ask(&got, "get", strconv.Itoa(p.port), "/"); err != nil {
		return err
	}
	total := time.Since(begun).Seconds()
	if got.Elements != len(p.y) {
		return fmt.Errorf("Julia parsed %d elements, expected %d", got.Elements, len(p.y))
	}
	if err := near(got.Sum, series.Sum(p.y)); err != nil {
		return err
	}
	if !measured {
		return nil
	}
	r.json.add(total, p.transform, got.Reduce)
	r.JSONStages.add(p.encode, got.Receive-p.transform-p.encode, got.Parse, got.Text)
	return nil
}
