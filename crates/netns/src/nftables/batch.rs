//! A transaction: all of it is done at once, or nothing.

use std::collections::HashMap;

use crate::netfilter::attributes::{MessageHeader, Writer, messages};
use crate::netfilter::{
    ACK, APPEND, CREATE, NetfilterError, NetfilterSocket, REQUEST, Refusal, answer,
};

use super::describe::describe;
use super::rule::{Part, Rule};
use super::set::{self, ELEMENTS_PER_MESSAGE, Element, Set};
use super::uapi;
use super::value::Protocol;
use super::{Chain, Family, Policy, Table};

/// Changes of nftables, to be made all at once. Names that do not exist, and names that do, are found out by the kernel
/// when the transaction is [committed](Self::commit).
#[derive(Clone, Debug, Default)]
pub struct Batch {
    messages: Vec<(u16, u16, Family, Writer)>,
    /// Numbers of the sets that this transaction makes: its own rules and elements call them so.
    sets: HashMap<(Table, String), u32>,
    next_set: u32,
}

impl Batch {
    /// A transaction without any change.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether it would change nothing.
    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// Makes a table; one that is there is fine.
    pub fn add_table(&mut self, table: &Table) -> &mut Self {
        self.push(uapi::NEW_TABLE, CREATE, table, |message| {
            message.text(uapi::table::NAME, &table.name);
            // The table's flags: none.
            message.u32(2, 0);
        })
    }

    /// Removes a table with all that is in it; none is fine.
    pub fn remove_table(&mut self, table: &Table) -> &mut Self {
        // Made first, there surely is one to delete. (The kernel's own DESTROYTABLE came with Linux 6.3.)
        self.add_table(table)
            .push(uapi::DELETE_TABLE, 0, table, |message| {
                message.text(uapi::table::NAME, &table.name);
            })
    }

    /// Makes a chain; one that is there with the same hook is fine.
    pub fn add_chain(&mut self, table: &Table, chain: &Chain) -> &mut Self {
        self.push(uapi::NEW_CHAIN, CREATE, table, |message| {
            message.text(uapi::TABLE, &table.name);
            message.text(uapi::chain::NAME, &chain.name);
            let Some(base) = &chain.base else {
                return;
            };
            message.nest(uapi::chain::HOOK, |hook| {
                hook.u32(uapi::chain::HOOK_NUMBER, base.hook.number(table.family));
                hook.bytes(uapi::chain::HOOK_PRIORITY, &base.priority.to_be_bytes());
                if let Some(device) = &base.device {
                    hook.text(uapi::chain::HOOK_DEVICE, device);
                }
            });
            let policy = match base.policy {
                Policy::Drop => 0,
                Policy::Accept => 1,
            };
            message.u32(uapi::chain::POLICY, policy);
            message.text(uapi::chain::TYPE, base.kind.name());
        })
    }

    /// Removes all rules of a chain.
    pub fn flush_chain(&mut self, table: &Table, chain: &str) -> &mut Self {
        self.push(uapi::DELETE_RULE, 0, table, |message| {
            message.text(uapi::TABLE, &table.name);
            message.text(uapi::rule::CHAIN, chain);
        })
    }

    /// Removes a chain with its rules. Nothing may jump to it any more.
    pub fn delete_chain(&mut self, table: &Table, chain: &str) -> &mut Self {
        self.push(uapi::DELETE_CHAIN, 0, table, |message| {
            message.text(uapi::TABLE, &table.name);
            message.text(uapi::chain::NAME, chain);
        })
    }

    /// Adds a rule at the end of a chain.
    pub fn add_rule(&mut self, table: &Table, chain: &str, rule: &Rule) -> &mut Self {
        self.rule(table, chain, rule, CREATE | APPEND)
    }

    /// Puts a rule at the head of a chain.
    pub fn insert_rule(&mut self, table: &Table, chain: &str, rule: &Rule) -> &mut Self {
        self.rule(table, chain, rule, CREATE)
    }

    /// Removes one rule by its number: see [`NetfilterSocket::rules`].
    pub fn delete_rule(&mut self, table: &Table, chain: &str, handle: u64) -> &mut Self {
        self.push(uapi::DELETE_RULE, 0, table, |message| {
            message.text(uapi::TABLE, &table.name);
            message.text(uapi::rule::CHAIN, chain);
            message.u64(uapi::rule::HANDLE, handle);
        })
    }

    /// Makes a set or map; one that is there with the same types is fine.
    pub fn add_set(&mut self, table: &Table, set: &Set) -> &mut Self {
        let id = self.number();
        self.sets.insert((table.clone(), set.name.clone()), id);
        self.push(uapi::NEW_SET, CREATE, table, |message| {
            message.text(uapi::TABLE, &table.name);
            set::write(message, (&set.key, &set.data), &set.name, id, None);
        })
    }

    /// Removes a set or map that no rule looks into any more.
    pub fn delete_set(&mut self, table: &Table, name: &str) -> &mut Self {
        self.push(uapi::DELETE_SET, 0, table, |message| {
            message.text(uapi::TABLE, &table.name);
            message.text(uapi::set::NAME, name);
        })
    }

    /// Puts elements into a set or map. One that is there is fine, unless it leads elsewhere: delete that first.
    pub fn add_elements(&mut self, table: &Table, set: &str, elements: &[Element]) -> &mut Self {
        self.elements(uapi::NEW_ELEMENTS, CREATE, table, set, elements)
    }

    /// Takes elements out of a set or map, by their keys; each must be there.
    pub fn delete_elements(&mut self, table: &Table, set: &str, elements: &[Element]) -> &mut Self {
        self.elements(uapi::DELETE_ELEMENTS, 0, table, set, elements)
    }

    /// Takes all elements out of a set or map.
    pub fn flush_set(&mut self, table: &Table, set: &str) -> &mut Self {
        self.push(uapi::DELETE_ELEMENTS, 0, table, |message| {
            message.text(uapi::elements::TABLE, &table.name);
            message.text(uapi::elements::SET, set);
        })
    }

    /// Makes an object that [`Rule::timeout`] names: how long a connection may be idle, in whole seconds; an established
    /// one for TCP, one answered or not for UDP. Connections that have such limits keep them when it changes; to change
    /// it, delete it first.
    pub fn add_timeout(
        &mut self,
        table: &Table,
        name: &str,
        protocol: Protocol,
        idle: u32,
    ) -> &mut Self {
        // CTA_TIMEOUT_TCP_ESTABLISHED; CTA_TIMEOUT_UDP_UNREPLIED and _REPLIED (`linux/netfilter/nfnetlink_cttimeout.h`).
        let states: &[u16] = match protocol {
            Protocol::Tcp => &[3],
            _ => &[1, 2],
        };
        self.push(uapi::NEW_OBJECT, CREATE, table, |message| {
            message.text(uapi::TABLE, &table.name);
            message.text(uapi::object::NAME, name);
            message.u32(uapi::object::TYPE, uapi::object::CT_TIMEOUT);
            message.nest(uapi::object::DATA, |data| {
                // IPv4 is only what it is called by: the object serves both families (`nft_ct_timeout_obj_eval`).
                data.u16(uapi::object::TIMEOUT_L3PROTO, 2);
                data.u8(uapi::object::TIMEOUT_L4PROTO, protocol.number());
                data.nest(uapi::object::TIMEOUT_DATA, |limits| {
                    for state in states {
                        limits.u32(*state, idle);
                    }
                });
            });
        })
    }

    /// Removes such an object, that no rule names any more.
    pub fn delete_timeout(&mut self, table: &Table, name: &str) -> &mut Self {
        self.push(uapi::DELETE_OBJECT, 0, table, |message| {
            message.text(uapi::TABLE, &table.name);
            message.text(uapi::object::NAME, name);
            message.u32(uapi::object::TYPE, uapi::object::CT_TIMEOUT);
        })
    }

    /// Makes the changes. Packets meet the rules as they were or as they are then, never something between.
    ///
    /// # Errors
    /// The first change that the kernel refused, with its reason. Nothing is changed then.
    pub fn commit(&self, socket: &mut NetfilterSocket) -> Result<(), NetfilterError> {
        if self.is_empty() {
            return Ok(());
        }
        let count = u32::try_from(self.messages.len()).unwrap_or(u32::MAX - 2);
        let begin = socket.sequences(count + 2);
        let (bytes, last) = self.encode(begin);
        let failed = |cause: std::io::Error| Refusal::from(cause).of("change nftables".to_owned());
        socket.send(&bytes).map_err(failed)?;
        let mut refused: Option<Refusal> = None;
        let mut buffer = Vec::with_capacity(1 << 16);
        // Each refused change is told; the last change is acknowledged in any case, unless the batch fails as a whole.
        socket
            .receive(&mut buffer, |message| {
                let sequence = message.sequence;
                if sequence.wrapping_sub(begin) > count {
                    return None;
                }
                if let Err(refusal) = answer(message)? {
                    refused.get_or_insert(refusal);
                    if sequence == begin {
                        return Some(());
                    }
                }
                (sequence == last).then_some(())
            })
            .map_err(failed)?;
        match refused {
            None => Ok(()),
            Some(refusal) => {
                let operation = messages(&bytes)
                    .find(|message| {
                        message.sequence == refusal.sequence && refusal.sequence != begin
                    })
                    .map_or_else(|| "change nftables".to_owned(), describe);
                Err(refusal.of(operation))
            }
        }
    }

    /// The bytes of the whole transaction, and the number of its last change.
    fn encode(&self, begin: u32) -> (Vec<u8>, u32) {
        let mut all = Writer::default();
        let mut sequence = begin;
        let edge = |kind, sequence| MessageHeader {
            kind,
            flags: REQUEST,
            sequence,
            family: 0,
            resource: uapi::SUBSYSTEM,
        };
        all.message(edge(uapi::BATCH_BEGIN, begin), |_| {});
        for (index, (kind, flags, family, attributes)) in self.messages.iter().enumerate() {
            sequence = sequence.wrapping_add(1);
            let ack = if index + 1 == self.messages.len() {
                ACK
            } else {
                0
            };
            let header = MessageHeader {
                kind: uapi::SUBSYSTEM << 8 | kind,
                flags: REQUEST | flags | ack,
                sequence,
                family: family.number(),
                resource: 0,
            };
            all.message(header, |message| message.raw(attributes.as_bytes()));
        }
        all.message(edge(uapi::BATCH_END, sequence.wrapping_add(1)), |_| {});
        (all.as_bytes().to_vec(), sequence)
    }

    fn rule(&mut self, table: &Table, chain: &str, rule: &Rule, flags: u16) -> &mut Self {
        let mut ids = Vec::new();
        for part in &rule.parts {
            let Part::OwnMap(map) = part else { continue };
            let id = self.number();
            ids.push(id);
            self.push(uapi::NEW_SET, CREATE, table, |message| {
                message.text(uapi::TABLE, &table.name);
                let types = (map.key.as_slice(), &map.data);
                set::write(message, types, OWN_MAP, id, Some(map.elements.len()));
            });
            self.element_messages(
                (uapi::NEW_ELEMENTS, CREATE),
                table,
                (OWN_MAP, Some(id)),
                &map.elements,
            );
        }
        self.push(uapi::NEW_RULE, flags, table, |message| {
            message.text(uapi::TABLE, &table.name);
            message.text(uapi::rule::CHAIN, chain);
            message.nest(uapi::rule::EXPRESSIONS, |list| {
                let mut ids = ids.iter();
                for part in &rule.parts {
                    match part {
                        Part::Expressions(expressions) => list.raw(expressions.as_bytes()),
                        Part::OwnMap(map) => {
                            if let Some(id) = ids.next() {
                                map.write_lookup(list, OWN_MAP, *id);
                            }
                        }
                    }
                }
            });
            if !rule.comment.is_empty() {
                message.bytes(uapi::rule::USER_DATA, &super::comment(&rule.comment));
            }
        })
    }

    fn elements(
        &mut self,
        kind: u16,
        flags: u16,
        table: &Table,
        set: &str,
        elements: &[Element],
    ) -> &mut Self {
        let id = self.sets.get(&(table.clone(), set.to_owned())).copied();
        self.element_messages((kind, flags), table, (set, id), elements)
    }

    fn element_messages(
        &mut self,
        (kind, flags): (u16, u16),
        table: &Table,
        (set, id): (&str, Option<u32>),
        elements: &[Element],
    ) -> &mut Self {
        for some in elements.chunks(ELEMENTS_PER_MESSAGE) {
            self.push(kind, flags, table, |message| {
                message.text(uapi::elements::TABLE, &table.name);
                set::write_elements(message, set, id, some);
            });
        }
        self
    }

    fn number(&mut self) -> u32 {
        self.next_set += 1;
        self.next_set
    }

    fn push(
        &mut self,
        kind: u16,
        flags: u16,
        table: &Table,
        inside: impl FnOnce(&mut Writer),
    ) -> &mut Self {
        let mut attributes = Writer::default();
        inside(&mut attributes);
        self.messages.push((kind, flags, table.family, attributes));
        self
    }
}

/// The kernel puts a number in the place of `%d`.
const OWN_MAP: &str = "__map%d";
