package strait

import (
	"context"
	"time"
)

// Pipeline is several kernels for one CallPipeline, each of which takes what those before it give. Call takes the same as
// text: "clip(lo=0) | cast(to=int8)". The protocol's documentation has the rules for both.
type Pipeline struct {
	// Stages run in this order.
	Stages []PipelineStage `json:"stages"`
	// Outputs are the pipeline's, by name, as Inputs of a stage have them. Without any they are those of the last stage.
	Outputs map[string]any `json:"outputs,omitempty"`
}

// PipelineStage is one kernel of a Pipeline.
type PipelineStage struct {
	// Name is what others call it; empty: its number, from 1.
	Name   string `json:"name,omitempty"`
	Kernel string `json:"kernel"`
	// Parameters have values as Param takes them.
	Parameters map[string]any `json:"parameters,omitempty"`
	// Inputs are where the tensors of ports come from: a string, such as "stage.port", ".port", "stage" or the name of an
	// input of the pipeline; or a PipelineInput.
	Inputs map[string]any `json:"inputs,omitempty"`
}

// PipelineInput is an input of the pipeline, even if its name has a dot or is that of a stage.
type PipelineInput struct {
	Input string `json:"input"`
}

// Stage is one of a pipeline that has run.
type Stage struct {
	// Name is the stage's, or its number from 1.
	Name        string
	Kernel      string
	CopiedBytes int64
	// Took is the time from its instance to its results.
	Took time.Duration
}

// stageReply is a Stage as the host tells it.
type stageReply struct {
	Stage       string  `json:"stage"`
	Kernel      string  `json:"kernel"`
	CopiedBytes int64   `json:"copied_bytes"`
	Seconds     float64 `json:"seconds"`
}

// stages is what the host tells of them.
func stages(replies []stageReply) []Stage {
	var all []Stage
	for _, r := range replies {
		all = append(all, Stage{r.Stage, r.Kernel, r.CopiedBytes, seconds(r.Seconds)})
	}
	return all
}

// said is the pipeline with parameters as the protocol has them.
func (p Pipeline) said() (*Pipeline, error) {
	said := Pipeline{Stages: make([]PipelineStage, 0, len(p.Stages)), Outputs: p.Outputs}
	for i, stage := range p.Stages {
		parameters := make(map[string]any, len(stage.Parameters))
		for name, value := range stage.Parameters {
			value, err := parameter(value)
			if err != nil {
				return nil, argumentError("stage %d: parameter %q: %w", i+1, name, err)
			}
			parameters[name] = value
		}
		stage.Parameters = parameters
		said.Stages = append(said.Stages, stage)
	}
	return &said, nil
}

// CallPipeline runs several kernels in one call. Everything else is as with Call; inputs are the pipeline's.
func (c *Client) CallPipeline(ctx context.Context, pipeline Pipeline, inputs Inputs, options ...CallOption) (*Result, error) {
	said, err := pipeline.said()
	if err != nil {
		return nil, err
	}
	return c.invoke(ctx, &invokeRequest{Pipeline: said}, inputs, options)
}
