;; Grows twice in `reserve`.
(func $reserve (param i64) (result i64)
  (drop (memory.grow (i32.const 1)))
  (i64.mul (i64.extend_i32_u (memory.grow (i32.wrap_i64 (i64.div_u (i64.add (local.get 0) (i64.const 65535)) (i64.const 65536))))) (i64.const 65536)))
