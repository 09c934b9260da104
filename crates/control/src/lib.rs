//! Who has which MAC and IP address, on which host: allocation, epochs, distribution.
