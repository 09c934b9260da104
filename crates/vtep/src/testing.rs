//! Edges in memory.
