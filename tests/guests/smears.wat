;; Fills its whole output window, to the end of its last page, and then ends as its first element says.
(global $way (mut i32) (i32.const 0))
(func $run (param i32) (result i32) (local $n i32)
  (global.set $way (i32.trunc_f64_s (f64.load (i32.wrap_i64 (global.get $x)))))
  (local.set $n (i32.wrap_i64 (global.get $bytes)))
  ;; A smaller output is a copy, of which the rest is none.
  (if (i32.ge_u (local.get $n) (i32.const 524288)) (then
    (local.set $n (i32.and (i32.add (local.get $n) (i32.const 65535)) (i32.const -65536)))))
  (memory.fill (i32.wrap_i64 (global.get $y)) (i32.const 0xEE) (local.get $n))
  (if (i32.eq (global.get $way) (i32.const 1)) (then (unreachable)))
  (if (i32.eq (global.get $way) (i32.const 2)) (then (return (i32.const 1))))
  i32.const 0)
(func $extents (result i32)
  (i64.store (i32.const 600) (i64.load (global.get $shape)))
  ;; A third of it; nothing; more than there is.
  (if (i32.eq (global.get $way) (i32.const 3)) (then
    (i64.store (i32.const 600) (i64.div_u (i64.load (global.get $shape)) (i64.const 3)))))
  (if (i32.eq (global.get $way) (i32.const 4)) (then (i64.store (i32.const 600) (i64.const 0))))
  (if (i32.eq (global.get $way) (i32.const 5)) (then (i64.store (i32.const 600) (i64.const -1))))
  (i32.store (i32.const 560) (i32.const 600))
  (i32.store (i32.const 564) (i32.const 1))
  (i32.store (i32.const 552) (i32.const 560))
  (i32.store (i32.const 556) (i32.const 1))
  i32.const 552)
;; As many rows as `extents` says.
(func $step (param $mode i32) (result i32) (local $answer i32)
  (local.set $answer (call $run (local.get $mode)))
  (drop (call $extents))
  (call $moved (global.get $out) (i64.load (i32.const 600)))
  local.get $answer)
