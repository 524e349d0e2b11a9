//! Gives the shared library the name by which programs find it: it changes with `STRAIT_ABI_VERSION`.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libstrait.so.1");
}
