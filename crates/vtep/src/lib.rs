//! Encapsulates and decapsulates Ethernet frames in VXLAN over UDP, and decides where each goes.
