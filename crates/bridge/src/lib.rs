//! The gateway bridge of a host: its containers' way out.
