package remote

import (
	"encoding/json"
	"slices"
	"strings"
)

// page is the part of all that comes after what the request names, in the order of names, as much of it as a frame has room for.
func page[T any](what string, all []T, request []byte, name func(T) (string, error)) (answer, error) {
	// A frame's body has more; what is around the list needs little.
	const most = 48 << 10
	var asked struct {
		After *string `json:"after"`
	}
	if len(request) > 0 {
		if err := json.Unmarshal(request, &asked); err != nil {
			return answer{}, err
		}
	}
	type entry struct {
		name string
		body json.RawMessage
	}
	var left []entry
	for _, one := range all {
		named, err := name(one)
		if err != nil {
			return answer{}, err
		}
		if asked.After != nil && named <= *asked.After {
			continue
		}
		body, err := json.Marshal(one)
		if err != nil {
			return answer{}, err
		}
		left = append(left, entry{named, body})
	}
	slices.SortFunc(left, func(a, b entry) int { return strings.Compare(a.name, b.name) })
	given, bytes := []json.RawMessage{}, 0
	for _, one := range left {
		bytes += len(one.body) + 1
		if len(given) > 0 && bytes > most {
			break
		}
		given = append(given, one.body)
	}
	return answer{body: map[string]any{what: given, "more": len(given) < len(left)}}, nil
}
