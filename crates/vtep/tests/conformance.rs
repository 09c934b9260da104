//! The page that lists which test proves which line names only tests that exist.

use std::fs;
use std::path::Path;

#[test]
fn the_conformance_page_names_only_tests_that_exist() {
    let crate_root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let repository = crate_root.join("../..");
    let page = fs::read_to_string(repository.join("docs/conformance.md")).unwrap();
    let mut named = 0;
    let mut missing = Vec::new();
    // What stands between backticks is at the odd places.
    for (file, test) in page
        .split('`')
        .skip(1)
        .step_by(2)
        .filter_map(|code| code.split_once(".rs::"))
    {
        named += 1;
        let root = if file.starts_with("tests/tests") || file.starts_with("crates/") {
            &repository
        } else {
            crate_root
        };
        let source = fs::read_to_string(root.join(format!("{file}.rs"))).unwrap_or_default();
        if !source.contains(&format!("fn {test}(")) {
            missing.push(format!("{file}.rs::{test}"));
        }
    }
    assert!(
        named >= 40,
        "only {named} tests found on the page: has its form changed?"
    );
    assert!(missing.is_empty(), "not found: {missing:#?}");
}
