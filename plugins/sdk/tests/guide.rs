//! The examples of `docs/plugin-guide.md`: they build, run, and stand in it word for word.

mod smooth {
    #![allow(
        missing_debug_implementations,
        unreachable_pub,
        reason = "they would not help a reader"
    )]

    include!("guide/smooth.rs");
}

#[test]
fn the_guide_has_the_example_that_is_tested() {
    let guide = include_str!("../../../docs/plugin-guide.md");
    let example = format!("```rust\n{}```\n", include_str!("guide/smooth.rs"));
    assert!(
        guide.contains(&example),
        "docs/plugin-guide.md, \"A streaming kernel\""
    );
}
