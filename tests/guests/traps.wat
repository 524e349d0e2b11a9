;; Traps while its windows are in.
(func $run (param i32) (result i32) unreachable)
