package main

import (
	"fmt"
	"strconv"
)

// way is one hand-over of ../embedded, in seconds and bytes.
type way struct {
	Transform   float64 `json:"transform_seconds"`
	Reduce      float64 `json:"reduce_seconds"`
	Total       float64 `json:"seconds"`
	CopiedBytes int64   `json:"copied_bytes"`
	Sum         float64 `json:"sum"`
}

// embeddedRound has ../embedded do the round of this seed. Julia's sum there must be the same to the
// last bit: it is the same code over the same elements.
func embeddedRound(embedded *child, seed uint64, sum float64, r *report, measured bool) error {
	var round struct{ Reused, Fresh, Lent way }
	if err := embedded.ask(&round, strconv.FormatUint(seed, 10)); err != nil {
		return err
	}
	for _, each := range []struct {
		way
		path *path
	}{{round.Reused, &r.cgo}, {round.Fresh, &r.cgoFresh}, {round.Lent, &r.cgoLent}} {
		if each.Sum != sum {
			return fmt.Errorf("Julia's sum is %v in %q, over the mapped tensor it was %v", each.Sum, each.path.Name, sum)
		}
		if measured {
			each.path.add(each.Total, each.Transform, each.Reduce)
			each.path.CopiedBytes = each.CopiedBytes
		}
	}
	return nil
}
