//! The program `towline`: the agent of a host and the commands that ask it.
//!
//! Every command but `agent`, `lab`, `shim` and `completions` is a client: it
//! sends one request over the agent's Unix socket and prints the answer.
//! Results go to stdout, everything else to stderr; an error is one line.
//! Exit codes are listed in `towline --help` and in `docs/json.md`.

mod agent;
mod api;
mod cli;
mod client;
mod config;
mod pcapng;
mod shim;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    match cli.run() {
        Ok(code) => code,
        Err(error) => {
            // `{:#}` joins the chain of causes into one line.
            eprintln!("towline: {error:#}");
            cli::exit_code_of(&error)
        }
    }
}
