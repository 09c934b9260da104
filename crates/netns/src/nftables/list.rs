//! What stands there, read back: for repair, for removal, and to know rules by their comments.

use crate::netfilter::attributes::{Attributes, Message, MessageHeader, Writer};
use crate::netfilter::{DUMP, NetfilterError, NetfilterSocket, REQUEST, Refusal};

use super::{Family, Table, comment_of, uapi};

/// A rule that stands in a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleEntry {
    /// The chain's name.
    pub chain: String,
    /// Its number within the table, for [`super::Batch::delete_rule`].
    pub handle: u64,
    /// Its comment, if it has one.
    pub comment: Option<String>,
}

/// A chain that stands in a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChainEntry {
    /// Its name.
    pub name: String,
    /// Whether packets enter it by themselves.
    pub is_base: bool,
    /// How many rules and maps it holds or is named by.
    pub uses: u32,
}

/// All of a table but what changes by itself (counters) and what the kernel numbers: two are equal when the same rules
/// stand there in the same order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Snapshot(Vec<Vec<u8>>);

impl Snapshot {
    /// Whether there is no such table.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl NetfilterSocket {
    /// The tables of all families.
    ///
    /// # Errors
    /// When the kernel refuses, or has no nf_tables.
    pub fn tables(&mut self) -> Result<Vec<Table>, NetfilterError> {
        self.list(
            "list nftables' tables",
            uapi::GET_TABLE,
            0,
            |_| {},
            |family, table| {
                Some(Table {
                    family: match family {
                        1 => Family::Inet,
                        2 => Family::Ipv4,
                        5 => Family::Netdev,
                        10 => Family::Ipv6,
                        _ => return None,
                    },
                    name: table.text(uapi::table::NAME)?.to_owned(),
                })
            },
        )
    }

    /// A table's chains; none when there is no such table.
    ///
    /// # Errors
    /// When the kernel refuses, or has no nf_tables.
    pub fn chains(&mut self, table: &Table) -> Result<Vec<ChainEntry>, NetfilterError> {
        self.of_table(table, uapi::GET_CHAIN, |chain| {
            Some(ChainEntry {
                name: chain.text(uapi::chain::NAME)?.to_owned(),
                is_base: chain.find(uapi::chain::HOOK).is_some(),
                uses: chain.u32(uapi::chain::USE).unwrap_or_default(),
            })
        })
    }

    /// A table's rules, chain by chain in their order; none when there is no such table.
    ///
    /// # Errors
    /// When the kernel refuses, or has no nf_tables.
    pub fn rules(&mut self, table: &Table) -> Result<Vec<RuleEntry>, NetfilterError> {
        self.of_table(table, uapi::GET_RULE, |rule| {
            Some(RuleEntry {
                chain: rule.text(uapi::rule::CHAIN)?.to_owned(),
                handle: rule.u64(uapi::rule::HANDLE)?,
                comment: rule
                    .find(uapi::rule::USER_DATA)
                    .and_then(comment_of)
                    .map(str::to_owned),
            })
        })
    }

    /// A table as it stands, to be compared with what stands later. Empty when there is none.
    ///
    /// # Errors
    /// When the kernel refuses, or has no nf_tables.
    pub fn snapshot(&mut self, table: &Table) -> Result<Snapshot, NetfilterError> {
        let mut all = Vec::new();
        if !self.tables()?.contains(table) {
            return Ok(Snapshot::default());
        }
        for (kind, left_out) in SNAPSHOT {
            all.extend(self.of_table(table, *kind, |attributes| {
                let mut kept = Writer::default();
                kept.u16(0, *kind);
                keep(&mut kept, *kind, attributes, left_out);
                Some(kept.as_bytes().to_vec())
            })?);
        }
        for name in self.of_table(table, uapi::GET_SET, |set| {
            set.text(uapi::set::NAME).map(str::to_owned)
        })? {
            all.extend(self.elements_of(table, &name)?);
        }
        Ok(Snapshot(all))
    }

    /// The elements of a set or map, sorted: a hash's order tells nothing.
    pub(super) fn elements_of(
        &mut self,
        table: &Table,
        set: &str,
    ) -> Result<Vec<Vec<u8>>, NetfilterError> {
        let request = |message: &mut Writer| {
            message.text(uapi::elements::TABLE, &table.name);
            message.text(uapi::elements::SET, set);
        };
        let listed = self.list(
            "list nftables' elements",
            uapi::GET_ELEMENTS,
            table.family.number(),
            request,
            |_, part| {
                let list = part.inside(uapi::elements::LIST).into_iter();
                Some(list.map(|(_, value)| value.to_vec()).collect::<Vec<_>>())
            },
        )?;
        let mut elements = listed.concat();
        elements.sort_unstable();
        Ok(elements)
    }

    /// The number of the namespace's ruleset, which grows with each change of any table: while it stays, nothing changed.
    ///
    /// # Errors
    /// When the kernel refuses, or has no nf_tables.
    pub fn generation(&mut self) -> Result<u32, NetfilterError> {
        let operation = "ask for nftables' generation";
        let sequence = self.sequences(1);
        let bytes = question(uapi::GET_GENERATION, REQUEST, sequence, 0, |_| {});
        let failed = |refusal: Refusal| refusal.of(operation.to_owned());
        self.send(&bytes).map_err(|cause| failed(cause.into()))?;
        let mut buffer = Vec::with_capacity(1 << 12);
        self.receive(&mut buffer, |message| {
            if message.sequence != sequence {
                return None;
            }
            match crate::netfilter::answer(message) {
                Some(Err(refusal)) => Some(Err(refusal)),
                Some(Ok(())) => None,
                None => Some(Ok(message
                    .netfilter()
                    .1
                    .u32(uapi::GENERATION_ID)
                    .unwrap_or_default())),
            }
        })
        .map_err(Refusal::from)
        .and_then(|answer| answer)
        .map_err(failed)
    }

    pub(super) fn of_table<T>(
        &mut self,
        table: &Table,
        kind: u16,
        mut each: impl FnMut(Attributes<'_>) -> Option<T>,
    ) -> Result<Vec<T>, NetfilterError> {
        let operation = format!("list table {} {}", table.family.name(), table.name);
        let request = |message: &mut Writer| message.text(uapi::TABLE, &table.name);
        let family = table.family.number();
        let listed = self.list(&operation, kind, family, request, |_, attributes| {
            // Chains are listed whatever table was asked for.
            (attributes.text(uapi::TABLE) == Some(&table.name)).then(|| each(attributes))?
        });
        match listed {
            Err(error) if error.is_absent() => Ok(Vec::new()),
            listed => listed,
        }
    }

    fn list<T>(
        &mut self,
        operation: &str,
        kind: u16,
        family: u8,
        request: impl Fn(&mut Writer),
        mut each: impl FnMut(u8, Attributes<'_>) -> Option<T>,
    ) -> Result<Vec<T>, NetfilterError> {
        let ask = |sequence| question(kind, REQUEST | DUMP, sequence, family, &request);
        self.dump(ask, |message: Message<'_>| {
            let (family, attributes) = message.netfilter();
            each(family, attributes)
        })
        .map_err(|refusal| refusal.of(operation.to_owned()))
    }
}

fn question(
    kind: u16,
    flags: u16,
    sequence: u32,
    family: u8,
    inside: impl FnOnce(&mut Writer),
) -> Vec<u8> {
    let header = MessageHeader {
        kind: uapi::SUBSYSTEM << 8 | kind,
        flags,
        sequence,
        family,
        resource: 0,
    };
    let mut bytes = Writer::default();
    bytes.message(header, inside);
    bytes.as_bytes().to_vec()
}

/// What a snapshot holds, and the attributes that the kernel numbers or counts.
pub(super) const SNAPSHOT: &[(u16, &[u16])] = &[
    (
        uapi::GET_CHAIN,
        &[uapi::chain::HANDLE, uapi::chain::USE, uapi::chain::COUNTERS],
    ),
    (uapi::GET_RULE, &[uapi::rule::HANDLE, uapi::rule::POSITION]),
    (uapi::GET_SET, &[uapi::set::HANDLE]),
    (uapi::GET_OBJECT, &[uapi::object::HANDLE, uapi::object::USE]),
];

/// Copies attributes but for those left out; of expressions that count, only their name.
fn keep(into: &mut Writer, kind: u16, attributes: Attributes<'_>, left_out: &[u16]) {
    for (number, value) in attributes {
        if left_out.contains(&number) {
            continue;
        }
        if (kind, number) != (uapi::GET_RULE, uapi::rule::EXPRESSIONS) {
            into.bytes(number, value);
            continue;
        }
        for (_, expression) in Attributes(value) {
            let name = Attributes(expression).text(uapi::expression::NAME);
            match name {
                Some("counter") => into.text(uapi::expression::NAME, "counter"),
                _ => into.bytes(uapi::expression::ELEMENT, expression),
            }
        }
    }
}
