//! portway.
fn main() {}
