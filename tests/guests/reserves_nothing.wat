;; Does not grow in `reserve`.
(func $reserve (param i64) (result i64) i64.const 65536)
