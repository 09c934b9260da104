//! Copies of frames for people and programs that watch; lossy, and never in a worker's way.
