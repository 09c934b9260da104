//! One thread: an engine joined to its edges.
