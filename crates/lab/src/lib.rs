//! Many hosts on one machine, and what is measured between them.
