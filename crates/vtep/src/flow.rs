//! The hash of a frame's inner flow.
