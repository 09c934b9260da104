//! Whole VTEPs on a wire in memory: tables, engine, worker and edges together, with a clock moved by hand.
//!
//! Hosts 1 to 3 have one container each, with MAC 02:…:0N and address 10.0.9.(1+N), on one network; a test changes what it
//! needs. Each test says which drop counters moved and requires the rest still.

#![allow(clippy::unwrap_used, reason = "the helpers of tests are tests as well")]

mod cluster;
mod crossing;
mod hostile;
