//! What passes between the lab and a guest over one connection, which is one command's.
//!
//! ```text
//!   lab → guest   32 bytes: the guest's secret    then Request, then Input … InputEnd, Resize now and then
//!   guest → lab   Output … Errors …               then Exit or Failed, and the connection ends
//!
//!   each:  kind (1 byte) | length (4 bytes, big endian) | so many bytes
//! ```
//!
//! A connection that ends before the command has is the wish to end the command.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// Bytes of what a guest wants to hear before anything else.
pub(super) const SECRET_LEN: usize = 32;
/// Most bytes of one frame: bounds what either side allocates on the other's word.
pub(super) const MAX_LEN: usize = 1 << 16;

/// What is to be run in a guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Request {
    /// The program and its arguments.
    pub(super) command: Vec<String>,
    /// The network namespace of the guest to run it in; none: the guest's own.
    pub(super) netns: Option<String>,
    /// The terminal that it is to have; none: pipes.
    pub(super) terminal: Option<Terminal>,
}

/// What a command learns of the terminal that somebody sits at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Terminal {
    /// Its kind, as `TERM` says it; empty: unknown.
    pub(super) kind: String,
    pub(super) size: Size,
}

/// Of a terminal's window, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Size {
    pub(super) rows: u16,
    pub(super) columns: u16,
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// What to run, as JSON.
    Request(Request),
    /// Bytes for its stdin.
    Input(Vec<u8>),
    /// No more of them will come.
    InputEnd,
    /// What it wrote to stdout.
    Output(Vec<u8>),
    /// What it wrote to stderr.
    Errors(Vec<u8>),
    /// It has ended with this code; 128 and a signal's number when that ended it.
    Exit(u8),
    /// It could not be started: the exit code to give, and why.
    Failed(u8, String),
    /// Its terminal's window has another size.
    Resize(Size),
}

const REQUEST: u8 = 1;
const INPUT: u8 = 2;
const INPUT_END: u8 = 3;
const OUTPUT: u8 = 4;
const ERRORS: u8 = 5;
const EXIT: u8 = 6;
const FAILED: u8 = 7;
const RESIZE: u8 = 8;

impl Frame {
    fn kind(&self) -> u8 {
        match self {
            Self::Request(_) => REQUEST,
            Self::Input(_) => INPUT,
            Self::InputEnd => INPUT_END,
            Self::Output(_) => OUTPUT,
            Self::Errors(_) => ERRORS,
            Self::Exit(_) => EXIT,
            Self::Failed(..) => FAILED,
            Self::Resize(_) => RESIZE,
        }
    }

    /// Writes the message whole.
    pub(super) fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let body = match self {
            Self::Request(request) => serde_json::to_vec(request)?,
            Self::Input(bytes) | Self::Output(bytes) | Self::Errors(bytes) => bytes.clone(),
            Self::InputEnd => Vec::new(),
            Self::Exit(code) => vec![*code],
            Self::Failed(code, why) => [&[*code], why.as_bytes()].concat(),
            Self::Resize(size) => [size.rows.to_be_bytes(), size.columns.to_be_bytes()].concat(),
        };
        let len = u32::try_from(body.len())
            .ok()
            .filter(|_| body.len() <= MAX_LEN)
            .ok_or_else(|| bad(format!("a message of {} bytes is too long", body.len())))?;
        let mut message = vec![self.kind()];
        message.extend(len.to_be_bytes());
        message.extend(body);
        to.write_all(&message)?;
        to.flush()
    }

    /// Reads the next message; `None` when the other side has ended the connection between two.
    ///
    /// # Errors
    /// The connection's own; [`io::ErrorKind::InvalidData`] for what is no message.
    pub(super) fn read(from: &mut impl Read) -> io::Result<Option<Self>> {
        let mut kind = [0];
        match from.read_exact(&mut kind) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            other => other?,
        }
        let mut len = [0; 4];
        from.read_exact(&mut len)?;
        let len = u32::from_be_bytes(len) as usize;
        if len > MAX_LEN {
            return Err(bad(format!("a message of {len} bytes is too long")));
        }
        let mut body = vec![0; len];
        from.read_exact(&mut body)?;
        Self::parse(kind[0], body).map(Some)
    }

    fn parse(kind: u8, body: Vec<u8>) -> io::Result<Self> {
        Ok(match (kind, &body[..]) {
            (REQUEST, body) => Self::Request(serde_json::from_slice(body)?),
            (INPUT, _) => Self::Input(body),
            (INPUT_END, []) => Self::InputEnd,
            (OUTPUT, _) => Self::Output(body),
            (ERRORS, _) => Self::Errors(body),
            (EXIT, [code]) => Self::Exit(*code),
            (FAILED, [code, why @ ..]) => {
                Self::Failed(*code, String::from_utf8_lossy(why).into_owned())
            }
            (RESIZE, &[a, b, c, d]) => Self::Resize(Size {
                rows: u16::from_be_bytes([a, b]),
                columns: u16::from_be_bytes([c, d]),
            }),
            (kind, body) => {
                return Err(bad(format!(
                    "a message of kind {kind} with {} bytes is unknown",
                    body.len()
                )));
            }
        })
    }
}

fn bad(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_frame() -> impl Strategy<Value = Frame> {
        let bytes = || proptest::collection::vec(any::<u8>(), 0..300);
        let words = proptest::collection::vec(".{0,20}", 0..5);
        let size =
            || (any::<u16>(), any::<u16>()).prop_map(|(rows, columns)| Size { rows, columns });
        let terminal = proptest::option::of(
            (".{0,20}", size()).prop_map(|(kind, size)| Terminal { kind, size }),
        );
        prop_oneof![
            (words, proptest::option::of("[a-z0-9-]{1,20}"), terminal).prop_map(
                |(command, netns, terminal)| Frame::Request(Request {
                    command,
                    netns,
                    terminal
                })
            ),
            size().prop_map(Frame::Resize),
            bytes().prop_map(Frame::Input),
            Just(Frame::InputEnd),
            bytes().prop_map(Frame::Output),
            bytes().prop_map(Frame::Errors),
            any::<u8>().prop_map(Frame::Exit),
            (any::<u8>(), ".{0,40}").prop_map(|(code, why)| Frame::Failed(code, why)),
        ]
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(frames in proptest::collection::vec(any_frame(), 0..8)) {
            let mut bytes = Vec::new();
            for frame in &frames {
                frame.write(&mut bytes).unwrap();
            }
            let mut from = &bytes[..];
            for frame in frames {
                prop_assert_eq!(Frame::read(&mut from).unwrap(), Some(frame));
            }
            prop_assert_eq!(Frame::read(&mut from).unwrap(), None);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let mut from = &bytes[..];
            while let Ok(Some(_)) = Frame::read(&mut from) {}
        }
    }

    #[test]
    fn a_message_is_bounded_and_known_and_whole() {
        let too_long = [INPUT, 0, 1, 0, 1];
        let unknown = [99, 0, 0, 0, 0];
        let no_code = [EXIT, 0, 0, 0, 0];
        let no_size = [RESIZE, 0, 0, 0, 0];
        for bytes in [too_long, unknown, no_code, no_size] {
            let error = Frame::read(&mut &bytes[..]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
        let cut = [OUTPUT, 0, 0, 0, 9, b'x'];
        assert!(Frame::read(&mut &cut[..]).is_err());
        let huge = Frame::Output(vec![0; MAX_LEN + 1]);
        assert!(huge.write(&mut Vec::new()).is_err());
    }
}
