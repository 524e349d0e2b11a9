;; Answers `run` with a code that the contract does not have.
(func $run (param i32) (result i32) i32.const 7)
