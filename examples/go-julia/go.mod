module strait/examples/go-julia

go 1.25.0

require strait v0.1.0

require golang.org/x/sys v0.47.0

replace strait => ../../clients/go
