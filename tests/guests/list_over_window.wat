;; Answers `extents` with a list of a million shapes that lies where the input's window was.
(func $extents (result i32)
  (i32.store (i32.const 552) (i32.wrap_i64 (global.get $x)))
  (i32.store (i32.const 556) (i32.const 100000))
  i32.const 552)
