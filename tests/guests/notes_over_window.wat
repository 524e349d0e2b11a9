;; Answers `notes` with one note whose text lies where the input's window was.
(func $notes (result i32)
  (i32.store (i32.const 600) (i32.wrap_i64 (global.get $x)))
  (i32.store (i32.const 604) (i32.const 16))
  (i32.store (i32.const 608) (i32.wrap_i64 (global.get $y)))
  (i32.store (i32.const 612) (i32.const 16))
  (i32.store (i32.const 568) (i32.const 600))
  (i32.store (i32.const 572) (i32.const 1))
  i32.const 568)
