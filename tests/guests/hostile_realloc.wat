;; From `bind` on, gives every allocation at the place where the input's window will be, was, or far outside.
(global $calls (mut i32) (i32.const 0))
(func $realloc (param i32 i32 i32 i32) (result i32)
  (global.set $calls (i32.add (global.get $calls) (i32.const 1)))
  (if (i32.gt_u (global.get $calls) (i32.const 4)) (then (return (i32.const 0xfffffff0))))
  (global.set $heap (i32.add (global.get $heap) (i32.const 4096)))
  global.get $heap)
