;; Copies its output over its input by memory.copy, which runs in host code.
(func $run (param i32) (result i32)
  (memory.copy (i32.wrap_i64 (global.get $x)) (i32.wrap_i64 (global.get $y)) (i32.wrap_i64 (global.get $bytes))) i32.const 0)
