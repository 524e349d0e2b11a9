module strait/examples/live-signal

go 1.25.0

require strait v0.1.0

require golang.org/x/sys v0.47.0 // indirect

replace strait => ../../../clients/go
