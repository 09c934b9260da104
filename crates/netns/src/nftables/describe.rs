//! What a message asks for, in words: for errors.

use crate::netfilter::attributes::{Attributes, Message};

use super::{Family, comment_of, uapi};

/// `add rule "answers" to chain inet towline gateway-forward`.
pub(super) fn describe(message: Message<'_>) -> String {
    let (family, attributes) = message.netfilter();
    let family = Family::name_of(family);
    let table = attributes.text(uapi::TABLE).unwrap_or("?");
    let named = |number| attributes.text(number).unwrap_or("?");
    let (verb, what, name) = match message.kind & 0xff {
        uapi::NEW_TABLE => ("add", "table", ""),
        uapi::DELETE_TABLE => ("delete", "table", ""),
        uapi::NEW_CHAIN => ("add", "chain", named(uapi::chain::NAME)),
        uapi::DELETE_CHAIN => ("delete", "chain", named(uapi::chain::NAME)),
        uapi::NEW_RULE | uapi::DELETE_RULE => {
            return rule(message.kind & 0xff, family, attributes);
        }
        uapi::NEW_SET => ("add", "set", named(uapi::set::NAME)),
        uapi::DELETE_SET => ("delete", "set", named(uapi::set::NAME)),
        uapi::NEW_ELEMENTS => ("add", "elements of set", named(uapi::elements::SET)),
        uapi::DELETE_ELEMENTS => ("delete", "elements of set", named(uapi::elements::SET)),
        uapi::NEW_OBJECT => ("add", "time limits", named(uapi::object::NAME)),
        uapi::DELETE_OBJECT => ("delete", "time limits", named(uapi::object::NAME)),
        _ => ("change", "table", ""),
    };
    format!("{verb} {what} {family} {table} {name}")
        .trim_end()
        .to_owned()
}

fn rule(kind: u16, family: &str, attributes: Attributes<'_>) -> String {
    let table = attributes.text(uapi::TABLE).unwrap_or("?");
    let chain = attributes.text(uapi::rule::CHAIN).unwrap_or("?");
    let comment = attributes
        .find(uapi::rule::USER_DATA)
        .and_then(comment_of)
        .map_or_else(String::new, |comment| format!(" \"{comment}\""));
    match (kind, attributes.u64(uapi::rule::HANDLE)) {
        (uapi::NEW_RULE, _) => format!("add rule{comment} to chain {family} {table} {chain}"),
        (_, Some(handle)) => format!("delete rule {handle} of chain {family} {table} {chain}"),
        (_, None) => format!("delete all rules of chain {family} {table} {chain}"),
    }
}
