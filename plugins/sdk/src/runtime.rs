//! Allocator and panic handler of a plugin without std.

#[global_allocator]
static ALLOCATOR: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

/// Traps. With the feature `log` the message is in the host's log; without it only the trap's backtrace
/// tells, since a plugin that does not log imports nothing.
#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    #[cfg(feature = "log")]
    crate::log::panicked(info);
    #[cfg(not(feature = "log"))]
    let _ = info;
    core::arch::wasm32::unreachable()
}
