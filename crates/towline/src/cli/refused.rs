//! Commands that other tools of this kind have and this one has not yet: they
//! are refused by name, so that nobody takes silence for success.

use std::ffi::OsString;

use clap::Subcommand;

use super::{USAGE, failure};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    #[command(hide = true)]
    Doctor(Rest),
    #[command(hide = true)]
    Bench(Rest),
}

/// Anything: the command is refused whatever follows it.
#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Rest {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    rest: Vec<OsString>,
}

impl Command {
    pub(crate) fn refuse(&self) -> anyhow::Error {
        let (name, instead) = match self {
            Self::Doctor(_) => ("doctor", "'towline status' shows what the agent sees"),
            Self::Bench(_) => ("bench", "'towline lab bench' measures on one machine"),
        };
        not_built(name, instead)
    }
}

/// Refuses `what`, which is not built yet, and says what to do `instead`.
pub(crate) fn not_built(what: &str, instead: &str) -> anyhow::Error {
    failure(USAGE, format!("'{what}' is not built yet: {instead}"))
}
