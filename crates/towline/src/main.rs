//! The program `towline`.
fn main() {}
