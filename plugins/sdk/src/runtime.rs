//! Allocator and panic handler of a plugin without std.

#[global_allocator]
static ALLOCATOR: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

/// Traps, once the host can read where and why.
#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    crate::record_panic(info.location(), info.message());
    core::arch::wasm32::unreachable()
}
