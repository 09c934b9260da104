//! Running the host's packet filter programs, inside the host's namespace.

use std::path::{Path, PathBuf};
use std::process::Command;

use netns::Netns;

use crate::BridgeError;

/// Folders of system programs that a user's PATH may lack.
const SYSTEM_FOLDERS: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin"];

/// The path of a program, on PATH or in the system's folders.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .filter(|folder| folder.is_absolute())
        .chain(
            SYSTEM_FOLDERS
                .iter()
                .map(|folder| Path::new(folder).to_owned()),
        )
        .map(|folder| folder.join(program))
        .find(|candidate| candidate.is_file())
}

/// `nft`, without which there is no gateway.
pub(crate) fn nft() -> Result<PathBuf, BridgeError> {
    find("nft").ok_or(BridgeError::MissingProgram {
        program: "nft",
        package: "nftables",
    })
}

/// Runs a program to its end and returns what it printed.
pub(crate) fn run(
    netns: &Netns,
    program: &Path,
    arguments: &[&str],
) -> Result<String, BridgeError> {
    let shown = || format!("{} {}", name(program), arguments.join(" "));
    let output = netns.run(|| {
        Command::new(program)
            .args(arguments)
            .env("LC_ALL", "C")
            .output()
    })?;
    let output = output.map_err(|cause| BridgeError::Run {
        program: shown(),
        cause,
    })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(BridgeError::Failed {
        program: shown(),
        said: one_line(&String::from_utf8_lossy(&output.stderr)),
    })
}

/// A program's last words, fit for an error message.
pub(crate) fn one_line(text: &str) -> String {
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let words = words.trim_end_matches('.');
    match words.char_indices().nth(300) {
        Some((end, _)) => format!("{}…", &words[..end]),
        None if words.is_empty() => "it did not say why".to_owned(),
        None => words.to_owned(),
    }
}

fn name(program: &Path) -> String {
    program
        .file_name()
        .unwrap_or(program.as_os_str())
        .to_string_lossy()
        .into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_outside_a_users_path() {
        assert!(find("sh").is_some());
        assert!(find("no-such-program").is_none());
    }

    #[test]
    fn last_words_fit_one_line() {
        assert_eq!(
            one_line("Error: syntax error\n  add rule\n      ^^^^.\n"),
            "Error: syntax error add rule ^^^^"
        );
        assert_eq!(one_line(" \n"), "it did not say why");
        assert_eq!(one_line(&"ä".repeat(1000)).chars().count(), 301);
    }
}
