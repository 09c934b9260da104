//! What is to stand in one of our tables, and the transaction that brings it there from what stood before.
//!
//! A chain whose rules did not change is not touched: the kernel's counters of whose turn it is go on.

use std::collections::{BTreeMap, BTreeSet};

use netns::nftables::{Batch, Chain, Element, Protocol, Rule, Set, Table};

/// All of a table, by names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Content {
    /// Chains and their rules.
    pub(crate) chains: BTreeMap<String, (Chain, Vec<Rule>)>,
    /// Sets and maps, and what is in them.
    pub(crate) sets: BTreeMap<String, (Set, BTreeSet<Element>)>,
    /// How long connections may be idle, in seconds. A name says the number too, because one that is in use cannot be changed.
    pub(crate) timeouts: BTreeMap<String, (Protocol, u32)>,
}

impl Content {
    /// Whether no table is needed.
    pub(crate) fn is_empty(&self) -> bool {
        self.chains.is_empty()
    }

    /// A chain with its rules.
    pub(crate) fn chain(&mut self, chain: Chain, rules: Vec<Rule>) {
        self.chains.insert(chain.name.clone(), (chain, rules));
    }

    /// A set or map with its elements.
    pub(crate) fn set(&mut self, set: Set, elements: BTreeSet<Element>) {
        self.sets.insert(set.name.clone(), (set, elements));
    }

    /// What brings `table` from `before` to this. `before` of `None` is not known: all is made anew in the place of what stands there.
    pub(crate) fn since(&self, before: Option<&Self>, table: &Table) -> Batch {
        let mut batch = Batch::new();
        if before == Some(self) {
            return batch;
        }
        if self.is_empty() {
            batch.remove_table(table);
            return batch;
        }
        let nothing = Self::default();
        let before = match before.filter(|before| !before.is_empty() && self.continues(before)) {
            Some(before) => before,
            None => {
                batch.remove_table(table).add_table(table);
                &nothing
            }
        };
        self.make(before, table, &mut batch);
        self.fill(before, table, &mut batch);
        self.clear(before, table, &mut batch);
        batch
    }

    /// Whether what has the same name is the same thing: hooks of chains and types of sets cannot be changed.
    fn continues(&self, before: &Self) -> bool {
        let chains = self.chains.iter().all(|(name, (chain, _))| {
            let known = before.chains.get(name);
            known.is_none_or(|(known, _)| known == chain)
        });
        let sets = self.sets.iter().all(|(name, (set, _))| {
            let known = before.sets.get(name);
            known.is_none_or(|(known, _)| known == set)
        });
        let timeouts = self.timeouts.iter().all(|(name, value)| {
            let known = before.timeouts.get(name);
            known.is_none_or(|known| known == value)
        });
        chains && sets && timeouts
    }

    /// What rules and elements are going to name: it must be there first.
    fn make(&self, before: &Self, table: &Table, batch: &mut Batch) {
        for (name, (chain, _)) in &self.chains {
            if !before.chains.contains_key(name) {
                batch.add_chain(table, chain);
            }
        }
        for (name, (set, _)) in &self.sets {
            if !before.sets.contains_key(name) {
                batch.add_set(table, set);
            }
        }
        for (name, (protocol, seconds)) in &self.timeouts {
            if !before.timeouts.contains_key(name) {
                batch.add_timeout(table, name, *protocol, *seconds);
            }
        }
    }

    /// Elements and rules, the former holders of a key before the new ones.
    fn fill(&self, before: &Self, table: &Table, batch: &mut Batch) {
        let no_elements = BTreeSet::new();
        let elements_of = |content: &Self, name: &str| {
            let set = content.sets.get(name);
            set.map_or(no_elements.clone(), |(_, elements)| elements.clone())
        };
        for name in before.sets.keys() {
            let (was, is) = (elements_of(before, name), elements_of(self, name));
            let gone: Vec<_> = was.difference(&is).cloned().collect();
            if !gone.is_empty() {
                batch.delete_elements(table, name, &gone);
            }
        }
        for (name, (_, rules)) in &self.chains {
            let known = before.chains.get(name);
            if known.is_some_and(|(_, known)| known == rules) {
                continue;
            }
            if known.is_some() {
                batch.flush_chain(table, name);
            }
            for rule in rules {
                batch.add_rule(table, name, rule);
            }
        }
        for name in self.sets.keys() {
            let (was, is) = (elements_of(before, name), elements_of(self, name));
            let new: Vec<_> = is.difference(&was).cloned().collect();
            if !new.is_empty() {
                batch.add_elements(table, name, &new);
            }
        }
    }

    /// What nothing names any more. Rules go before what they name.
    fn clear(&self, before: &Self, table: &Table, batch: &mut Batch) {
        let gone = |name: &&String| !self.chains.contains_key(*name);
        for name in before.chains.keys().filter(gone) {
            batch.flush_chain(table, name);
        }
        for name in before.sets.keys() {
            if !self.sets.contains_key(name) {
                batch.delete_set(table, name);
            }
        }
        for name in before.chains.keys().filter(gone) {
            batch.delete_chain(table, name);
        }
        for name in before.timeouts.keys() {
            if !self.timeouts.contains_key(name) {
                batch.delete_timeout(table, name);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use netns::nftables::{Base, Family, Verdict};

    use super::*;

    fn table() -> Table {
        Table::new(Family::Inet, "towline-test")
    }

    fn content(rules: &[&str]) -> Content {
        let mut content = Content::default();
        content.chain(
            Chain::base("input", Base::filter_input()),
            rules
                .iter()
                .map(|comment| Rule::new(*comment).verdict(Verdict::Accept))
                .collect(),
        );
        content
    }

    #[test]
    fn nothing_is_sent_where_nothing_changed() {
        let content = content(&["one"]);
        assert!(content.since(Some(&content), &table()).is_empty());
        assert!(!content.since(None, &table()).is_empty());
        let nothing = Content::default();
        assert!(nothing.since(Some(&nothing), &table()).is_empty());
        assert!(
            !nothing.since(None, &table()).is_empty(),
            "what another life left is removed"
        );
    }

    #[test]
    fn what_cannot_be_changed_is_made_anew() {
        let before = content(&["one"]);
        let mut after = content(&["one"]);
        assert!(after.continues(&before));
        after.chain(Chain::base("input", Base::filter_output()), Vec::new());
        assert!(!after.continues(&before));
    }
}
