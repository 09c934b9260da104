//! `--filter KEY=VALUE`, as Docker's lists have it: values of one key are alternatives, keys must all hold, and so must all labels.

use std::collections::BTreeMap;

use anyhow::bail;

/// Filters as given, by key.
#[derive(Debug, Default)]
pub(crate) struct Filters(BTreeMap<String, Vec<String>>);

impl Filters {
    /// Reads filters.
    ///
    /// # Errors
    /// One that is not KEY=VALUE, or whose key is none of `keys`.
    pub(crate) fn parse(texts: &[String], keys: &[&str]) -> anyhow::Result<Self> {
        let mut filters = Self::default();
        for text in texts {
            let Some((key, value)) = text.split_once('=') else {
                bail!(
                    "invalid filter '{text}': write KEY=VALUE; the keys are {}",
                    keys.join(", ")
                );
            };
            let key = key.trim().to_ascii_lowercase();
            if !keys.contains(&key.as_str()) {
                bail!("invalid filter '{key}': the keys are {}", keys.join(", "));
            }
            filters
                .0
                .entry(key)
                .or_default()
                .push(value.trim().to_owned());
        }
        Ok(filters)
    }

    /// The values of a key.
    pub(crate) fn values(&self, key: &str) -> impl Iterator<Item = &str> {
        self.0.get(key).into_iter().flatten().map(String::as_str)
    }

    /// Whether one of a key's values is this; also where the key was not given.
    pub(crate) fn is(&self, key: &str, actual: &str) -> bool {
        self.any(key, |wanted| actual == wanted)
    }

    /// Whether this starts with one of a key's values; also where the key was not given.
    pub(crate) fn starts(&self, key: &str, actual: &str) -> bool {
        self.any(key, |wanted| actual.starts_with(wanted))
    }

    /// Whether one of a key's values is part of this; also where the key was not given.
    pub(crate) fn part_of(&self, key: &str, actual: &str) -> bool {
        self.any(key, |wanted| actual.contains(wanted))
    }

    /// Whether all labels of the key are there: `KEY` with any value, `KEY=VALUE` with this one.
    pub(crate) fn labels(&self, key: &str, labels: &BTreeMap<String, String>) -> bool {
        self.values(key).all(|wanted| has_label(labels, wanted))
    }

    /// Whether none of the labels of the key is there.
    pub(crate) fn no_labels(&self, key: &str, labels: &BTreeMap<String, String>) -> bool {
        self.values(key).all(|wanted| !has_label(labels, wanted))
    }

    fn any(&self, key: &str, matches: impl Fn(&str) -> bool) -> bool {
        let mut values = self.values(key).peekable();
        values.peek().is_none() || values.any(matches)
    }
}

fn has_label(labels: &BTreeMap<String, String>, wanted: &str) -> bool {
    match wanted.split_once('=') {
        Some((key, value)) => labels.get(key).is_some_and(|actual| actual == value),
        None => labels.contains_key(wanted),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filters(texts: &[&str]) -> anyhow::Result<Filters> {
        let texts: Vec<String> = texts.iter().map(|&text| text.to_owned()).collect();
        Filters::parse(&texts, &["name", "driver", "label", "label!"])
    }

    #[test]
    fn values_of_a_key_are_alternatives_and_labels_are_not() {
        let some = filters(&["name=web", "name=db", "label=tier", "label=disk=ssd"]);
        let some = some.expect("filters");
        assert!(some.part_of("name", "my-db") && !some.part_of("name", "cache"));
        assert!(some.is("driver", "overlay"), "not given");
        assert!(some.starts("name", "web-1") && !some.starts("name", "my-web"));
        let labels = |pairs: &[(&str, &str)]| {
            let pairs = pairs.iter();
            pairs
                .map(|&(key, value)| (key.to_owned(), value.to_owned()))
                .collect::<BTreeMap<_, _>>()
        };
        assert!(some.labels("label", &labels(&[("tier", "1"), ("disk", "ssd")])));
        assert!(!some.labels("label", &labels(&[("tier", "1"), ("disk", "hdd")])));
        assert!(!some.labels("label", &labels(&[("disk", "ssd")])));
        let not = filters(&["label!=tier"]).expect("a filter");
        assert!(not.no_labels("label!", &labels(&[])));
        assert!(!not.no_labels("label!", &labels(&[("tier", "")])));
        let exact = filters(&["driver=overlay"]).expect("a filter");
        assert!(exact.is("driver", "overlay") && !exact.is("driver", "overlays"));
    }

    #[test]
    fn what_is_no_filter_is_named() {
        for (text, word) in [
            ("name", "write KEY=VALUE"),
            ("colour=red", "invalid filter 'colour'"),
            ("=red", "invalid filter ''"),
        ] {
            let error = filters(&[text]).expect_err(text).to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
