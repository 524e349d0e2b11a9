;; Well-behaved: every function is the default one. `y` is a copy of `x`.
