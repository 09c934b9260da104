//! A view over an Ethernet frame.
