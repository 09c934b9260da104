//! Who may send what, from where.
