//! Decides where each frame and datagram goes: no socket, no clock, nothing learned.
