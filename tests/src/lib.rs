//! Whole hosts in network namespaces. Needs root; run by `scripts/test`.
