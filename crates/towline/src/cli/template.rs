//! `--format`: the templates that people use with Docker's commands, `{{.Name}}` and `{{json .Labels}}`.
//!
//! Fields are looked up in JSON, whatever the case and the underscores of their names. What else Go's templates can (`range`, `if`,
//! pipes) is refused: that is what `--json` and jq are for.

use anyhow::{Context as _, bail};
use serde_json::Value;

use super::output;

/// A template, read once.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Template {
    /// Each object as a line of JSON.
    Json,
    /// Each object as text.
    Text(Vec<Part>),
    /// Each object as a line of a table: a column for each part between tabs.
    Table(Vec<Vec<Part>>),
}

/// A piece of a template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// As it stands.
    Text(String),
    /// A field, by its path; none: the object itself.
    Field {
        /// Names from the outside in.
        path: Vec<String>,
        /// As JSON.
        json: bool,
    },
}

impl Template {
    /// Reads a template.
    ///
    /// # Errors
    /// What is none, with what would be.
    pub(crate) fn parse(text: &str) -> anyhow::Result<Self> {
        let text = text.trim();
        if text == "json" {
            return Ok(Self::Json);
        }
        let text = text.replace("\\t", "\t").replace("\\n", "\n");
        match text.strip_prefix("table") {
            Some(rest) if rest.starts_with([' ', '\t', '{']) => {
                let columns = rest.trim_start().split('\t').map(parts);
                Ok(Self::Table(columns.collect::<anyhow::Result<_>>()?))
            }
            Some("") => {
                bail!("invalid format 'table': name columns, such as 'table {{{{.Name}}}}'")
            }
            _ => Ok(Self::Text(parts(&text)?)),
        }
    }

    /// Prints objects.
    ///
    /// # Errors
    /// A field that the objects don't have.
    pub(crate) fn print(&self, objects: &[Value]) -> anyhow::Result<()> {
        match self {
            Self::Json => objects
                .iter()
                .try_for_each(|object| output::line(&object.to_string())),
            Self::Text(parts) => objects
                .iter()
                .try_for_each(|object| output::line(&fill(parts, object)?)),
            Self::Table(columns) => {
                let headings: Vec<String> = columns.iter().map(|column| heading(column)).collect();
                let headings: Vec<&str> = headings.iter().map(String::as_str).collect();
                let rows = objects.iter().map(|object| {
                    let cells = columns.iter().map(|column| fill(column, object));
                    cells.collect::<anyhow::Result<Vec<_>>>()
                });
                output::table(&headings, rows.collect::<anyhow::Result<Vec<_>>>()?)
            }
        }
    }
}

fn parts(text: &str) -> anyhow::Result<Vec<Part>> {
    let mut parts = Vec::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("{{") {
        if !before.is_empty() {
            parts.push(Part::Text(before.to_owned()));
        }
        let (action, after) = after
            .split_once("}}")
            .with_context(|| format!("invalid format '{text}': a '{{{{' has no '}}}}'"))?;
        parts.push(field(action.trim())?);
        rest = after;
    }
    if !rest.is_empty() {
        parts.push(Part::Text(rest.to_owned()));
    }
    Ok(parts)
}

/// `.Name`, `json .Name`, `.Label "key"`.
fn field(action: &str) -> anyhow::Result<Part> {
    let refused = || {
        format!(
            "invalid format '{{{{{action}}}}}': it can be {{{{.Name}}}}, {{{{json .Labels}}}} or {{{{.Label \"key\"}}}}; \
             for more print --json and use jq"
        )
    };
    let (json, name) = match action.strip_prefix("json ") {
        Some(rest) => (true, rest.trim()),
        None => (false, action),
    };
    let path = name.strip_prefix('.').with_context(refused)?;
    if let Some(key) = path.strip_prefix("Label ") {
        let key = key
            .trim()
            .strip_prefix('"')
            .and_then(|key| key.strip_suffix('"'))
            .with_context(refused)?;
        let path = vec!["labels".to_owned(), key.to_owned()];
        return Ok(Part::Field { path, json });
    }
    let named = |word: &str| {
        word.bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
    };
    let path: Vec<String> = match path {
        "" => Vec::new(),
        path => path.split('.').map(str::to_owned).collect(),
    };
    if path.iter().any(|word| word.is_empty() || !named(word)) {
        bail!(refused());
    }
    Ok(Part::Field { path, json })
}

fn fill(parts: &[Part], object: &Value) -> anyhow::Result<String> {
    let mut text = String::new();
    for part in parts {
        match part {
            Part::Text(part) => text.push_str(part),
            Part::Field { path, json } => {
                let value = look_up(object, path)?;
                text.push_str(&if *json {
                    value.to_string()
                } else {
                    shown(value)
                });
            }
        }
    }
    Ok(text)
}

fn look_up<'a>(object: &'a Value, path: &[String]) -> anyhow::Result<&'a Value> {
    // A label that is not there is no mistake of the template's.
    const NONE: &Value = &Value::Null;
    let mut value = object;
    for (depth, name) in path.iter().enumerate() {
        let fields = value.as_object();
        let exact = fields.and_then(|fields| fields.get(name));
        let same = |other: &str| plain(other) == plain(name);
        let found = exact.or_else(|| {
            let mut fields = fields.into_iter().flatten();
            fields.find(|(key, _)| same(key)).map(|(_, value)| value)
        });
        value = match found {
            Some(found) => found,
            None if depth > 0 && path[0].eq_ignore_ascii_case("labels") => NONE,
            None => {
                let known: Vec<&str> = fields
                    .into_iter()
                    .flatten()
                    .map(|(key, _)| key.as_str())
                    .collect();
                bail!(
                    "invalid format: no field '{}'; there are: {}",
                    path.join("."),
                    known.join(", ")
                )
            }
        };
    }
    Ok(value)
}

/// A name as it is compared: in lower case, without underscores.
fn plain(name: &str) -> String {
    name.replace('_', "").to_ascii_lowercase()
}

fn shown(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => harmless(text),
        Value::Object(fields) => {
            let fields = fields.iter();
            let pairs: Vec<String> = fields
                .map(|(key, value)| format!("{}={}", harmless(key), shown(value)))
                .collect();
            pairs.join(",")
        }
        Value::Array(values) => values.iter().map(shown).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

/// A text that does nothing to a terminal: labels may be from anybody.
pub(crate) fn harmless(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for char in text.chars() {
        match char.is_control() {
            true => shown.extend(char.escape_default()),
            false => shown.push(char),
        }
    }
    shown
}

fn heading(column: &[Part]) -> String {
    let words = column.iter().map(|part| match part {
        Part::Text(text) => text.clone(),
        Part::Field { path, .. } => path.join(" ").to_ascii_uppercase(),
    });
    words.collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn filled(template: &str) -> anyhow::Result<String> {
        let object = json!({
            "id": "abc", "name": "net1", "enable_ipv6": true, "labels": { "a.b": "c", "d": "" },
            "subnets": ["10.0.9.0/24", "fd00:9::/64"], "ipam": { "driver": "default" },
        });
        match Template::parse(template)? {
            Template::Text(parts) => fill(&parts, &object),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn fields_are_found_whatever_their_case() {
        for (template, text) in [
            ("{{.Name}}", "net1"),
            ("{{ .ID }}: {{.name}}", "abc: net1"),
            ("{{.EnableIPv6}}", "true"),
            ("{{.Labels}}", "a.b=c,d="),
            ("{{json .Labels}}", r#"{"a.b":"c","d":""}"#),
            ("{{.Label \"a.b\"}}{{.Label \"none\"}}", "c"),
            ("{{.Subnets}}", "10.0.9.0/24,fd00:9::/64"),
            ("{{.IPAM.Driver}}", "default"),
            ("plain", "plain"),
        ] {
            assert_eq!(filled(template).expect(template), text, "{template}");
        }
        assert_eq!(Template::parse("json").expect("JSON"), Template::Json);
        let table = Template::parse(r"table {{.ID}}\t{{.Name}}").expect("a table");
        let Template::Table(columns) = table else {
            panic!("{table:?}")
        };
        let headings: Vec<String> = columns.iter().map(|column| heading(column)).collect();
        assert_eq!(headings, ["ID", "NAME"]);
    }

    #[test]
    fn a_label_does_nothing_to_a_terminal() {
        let object = json!({ "labels": { "a\u{1b}[2J": "é\nb" } });
        let Template::Text(parts) = Template::parse("{{.Labels}}").expect("a template") else {
            panic!("text")
        };
        assert_eq!(fill(&parts, &object).expect("labels"), "a\\u{1b}[2J=é\\nb");
    }

    #[test]
    fn what_is_no_template_here_is_refused_with_what_is() {
        for (template, word) in [
            ("{{.Name", "has no '}}'"),
            ("{{range .Subnets}}x{{end}}", "use jq"),
            ("{{.Name | upper}}", "use jq"),
            (
                "{{.Colour}}",
                "no field 'Colour'; there are: enable_ipv6, id",
            ),
            ("{{.Label key}}", "use jq"),
            ("table", "name columns"),
        ] {
            let error = filled(template).expect_err(template).to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
