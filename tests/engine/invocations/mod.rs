//! Invocations on a host without sockets: both paths give the same bits, nothing is copied
//! where nothing should be, arguments are checked, and results are recycled only when they may.

mod arguments;
mod moves;
mod results;

const MB: usize = 1 << 20;

fn values(n: usize) -> Vec<f64> {
    (0..n).map(|i| (i as f64).sin() * 1e3).collect()
}
