//! What a kernel can say about chunks.

/// How a kernel takes a tensor that comes in chunks of rows. A row is what one index of axis 0 holds.
///
/// What comes of it must be the same, bit for bit, however the rows are cut: `testing::assert_streams` tries.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Streaming {
    /// Not at all: [`Kernel::run`](crate::Kernel::run) is called once, with whole tensors.
    Whole,
    /// A row for a row. [`Kernel::run`](crate::Kernel::run) sees as many new rows of each input as there is room for in each output, at
    /// least one, after up to [`Kernel::history`](crate::Kernel::history) rows that it has seen before; all inputs that are not
    /// [whole](crate::Port::whole), and all outputs, have the same number of rows. It may write fewer than there are
    /// ([`Call::written`](crate::Call::written)), and [`Kernel::finish`](crate::Kernel::finish) more.
    Rows,
    /// As the kernel will. [`Kernel::run`](crate::Kernel::run) sees the chunk as it is, perhaps of no rows, and says how
    /// many rows of it it consumed ([`Call::consumed`](crate::Call::consumed); if it does not say, all), how many it has
    /// written ([`Call::written`](crate::Call::written); none), and whether there was too little room
    /// ([`Call::more`](crate::Call::more)).
    Free,
}
