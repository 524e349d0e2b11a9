package strait

import (
	"context"
	"errors"
	"math"
	"slices"
	"testing"
)

func TestPipelinesAgainstAHost(t *testing.T) {
	c := dial(t)
	ctx := context.Background()
	x := []float64{-1, 0.5, 1, 7}
	text := "low: clip(lo=0, hi=1) | scale-shift(a=2, b=1)"
	y := must[*Result](t)(c.Call(ctx, text, Inputs{"x": Slice(x)}))
	expect := []float64{1, 2, 3, 3}
	if got := must[[]float64](t)(As[float64](y.Tensor("y"))); !slices.Equal(got, expect) {
		t.Errorf("%v and not %v", got, expect)
	}
	if len(y.Stages) != 2 || y.Stages[0].Name != "low" || y.Stages[1].Name != "2" || y.Stages[1].Kernel != "scale-shift" || y.Stages[0].Took <= 0 {
		t.Errorf("stages %+v", y.Stages)
	}
	y.Release()

	graph := Pipeline{
		Stages: []PipelineStage{
			{Name: "low", Kernel: "clip", Parameters: map[string]any{"lo": math.Inf(-1), "hi": 1}},
			{Kernel: "scale-shift", Parameters: map[string]any{"a": int8(2)}, Inputs: map[string]any{"x": PipelineInput{"x"}}},
		},
		Outputs: map[string]any{"low": "low.y", "up": ".y"},
	}
	both := must[*Result](t)(c.CallPipeline(ctx, graph, Inputs{"x": Slice(x)}))
	defer both.Release()
	for port, expect := range map[string][]float64{"low": {-1, 0.5, 1, 1}, "up": {-2, 1, 2, 14}} {
		if got := must[[]float64](t)(As[float64](both.Tensor(port))); !slices.Equal(got, expect) {
			t.Errorf("%s: %v and not %v", port, got, expect)
		}
	}

	var refused *RemoteError
	if _, err := c.Call(ctx, "clip | cast(to=int3)", Inputs{"x": Slice(x)}); !errors.As(err, &refused) || refused.Reason != "BAD_PARAMETER" {
		t.Errorf("%v", err)
	}
	graph.Stages[0].Parameters["lo"] = struct{}{}
	if _, err := c.CallPipeline(ctx, graph, nil); !errors.Is(err, ErrArgument) {
		t.Errorf("%v", err)
	}
}
