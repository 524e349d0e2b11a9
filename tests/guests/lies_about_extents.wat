;; Says that its output is larger than announced.
(func $extents (result i32)
  (i64.store (i32.const 640) (i64.const 0x7fffffffffffffff))
  (i32.store (i32.const 560) (i32.const 640))
  (i32.store (i32.const 564) (i32.const 1))
  (i32.store (i32.const 552) (i32.const 560))
  (i32.store (i32.const 556) (i32.const 1))
  i32.const 552)
