//! Requests and answers that concern services.

use std::collections::BTreeMap;
use std::net::IpAddr;

use control::service::{Balance, HealthCheck, HealthTest, Protocol, Publish, ServiceSpec};
use serde::{Deserialize, Serialize};

/// Docker's values, in milliseconds where they are times.
const INTERVAL: u32 = 30_000;
const TIMEOUT: u32 = 30_000;
const RETRIES: u32 = 3;

/// What a client asks about services.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Request {
    /// `towline service create`.
    Create(Box<ServiceSpec>),
    /// `towline service update`.
    Update {
        /// Its name or id.
        service: String,
        /// What is to be another way.
        change: Box<Change>,
    },
    /// `towline service ls`.
    List,
    /// `towline service inspect` and `towline service ps`: by name or id.
    Inspect(String),
    /// `towline service rm`: by name or id.
    Remove(String),
}

/// What the agent answers about services.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Response {
    /// Done, nothing to say.
    Done,
    /// To [`Request::Create`], [`Request::Update`] and [`Request::Inspect`].
    Service(Box<Service>),
    /// To [`Request::List`].
    Services(Vec<Summary>),
}

/// What `service update` changes; what is not named stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Change {
    /// Published from now on.
    pub(crate) publish_add: Vec<Publish>,
    /// Published no more, by target port; without a protocol: of both.
    pub(crate) publish_remove: Vec<(u16, Option<Protocol>)>,
    /// How new connections are shared out.
    pub(crate) balance: Option<Balance>,
    /// How members are looked after.
    pub(crate) health: HealthChange,
    /// Seconds after which a silent connection is forgotten; `Some(None)`: as the kernel does it.
    #[serde(with = "double_option")]
    pub(crate) idle_timeout: Option<Option<u32>>,
    /// Seconds that a member's open connections are given when it goes.
    pub(crate) drain_timeout: Option<u32>,
    /// Whether members see their clients' addresses.
    pub(crate) preserve_client: Option<bool>,
    /// Labels to set.
    pub(crate) label_add: BTreeMap<String, String>,
    /// Labels to take away.
    pub(crate) label_remove: Vec<String>,
}

/// What is to be another way of a health check.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HealthChange {
    /// No check at all from now on.
    pub(crate) none: bool,
    /// What is done.
    pub(crate) test: Option<HealthTest>,
    /// Milliseconds between two checks.
    pub(crate) interval: Option<u32>,
    /// Milliseconds that one may take.
    pub(crate) timeout: Option<u32>,
    /// Failures in a row before a member is unhealthy.
    pub(crate) retries: Option<u32>,
    /// Milliseconds after its start in which failures do not count.
    pub(crate) start_period: Option<u32>,
}

/// A change that contradicts itself or the service.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ChangeError {
    /// Nothing of that kind is published.
    #[error("port {0} is not published: 'towline service inspect' shows which are")]
    NotPublished(String),
    /// There is nothing to change.
    #[error(
        "there is no health check to change: give one with --health-cmd, --health-tcp or --health-http"
    )]
    NoCheck,
}

impl HealthChange {
    /// The check as it is after this change.
    ///
    /// # Errors
    /// When times are given and there is no check.
    pub(crate) fn applied(
        self,
        before: Option<HealthCheck>,
    ) -> Result<Option<HealthCheck>, ChangeError> {
        let untouched = self == Self::default();
        if self.none || (untouched && before.is_none()) {
            return Ok(None);
        }
        let test = self
            .test
            .or_else(|| before.as_ref().map(|check| check.test.clone()));
        let of = |value: Option<u32>, was: fn(&HealthCheck) -> u32, default| {
            value.unwrap_or_else(|| before.as_ref().map_or(default, was))
        };
        Ok(Some(HealthCheck {
            interval: of(self.interval, |check| check.interval, INTERVAL),
            timeout: of(self.timeout, |check| check.timeout, TIMEOUT),
            retries: of(self.retries, |check| check.retries, RETRIES),
            start_period: of(self.start_period, |check| check.start_period, 0),
            test: test.ok_or(ChangeError::NoCheck)?,
        }))
    }
}

impl Change {
    /// The service as it is after this change.
    ///
    /// # Errors
    /// When it names what the service does not have.
    pub(crate) fn applied(self, mut spec: ServiceSpec) -> Result<ServiceSpec, ChangeError> {
        for (target, protocol) in self.publish_remove {
            let before = spec.publish.len();
            spec.publish.retain(|port| {
                port.target != target || protocol.is_some_and(|protocol| port.protocol != protocol)
            });
            if spec.publish.len() == before {
                let protocol = protocol.map(|protocol| format!("/{protocol}"));
                return Err(ChangeError::NotPublished(format!(
                    "{target}{}",
                    protocol.unwrap_or_default()
                )));
            }
        }
        spec.publish.extend(self.publish_add);
        spec.balance = self.balance.unwrap_or(spec.balance);
        spec.health = self.health.applied(spec.health)?;
        spec.idle_timeout = self.idle_timeout.unwrap_or(spec.idle_timeout);
        spec.drain_timeout = self.drain_timeout.unwrap_or(spec.drain_timeout);
        spec.preserve_client = self.preserve_client.unwrap_or(spec.preserve_client);
        spec.labels
            .retain(|key, _| !self.label_remove.contains(key));
        spec.labels.extend(self.label_add);
        Ok(spec)
    }
}

/// A service as `service ls` shows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Summary {
    /// Its id.
    pub(crate) id: String,
    /// Its name.
    pub(crate) name: String,
    /// Its network's name.
    pub(crate) network: String,
    /// `vip` or `dnsrr`.
    pub(crate) mode: String,
    /// Its virtual addresses.
    pub(crate) vips: Vec<IpAddr>,
    /// Members that get new connections.
    pub(crate) serving: usize,
    /// All members.
    pub(crate) members: usize,
    /// Its published ports.
    pub(crate) ports: Vec<Publish>,
    /// Its labels.
    pub(crate) labels: BTreeMap<String, String>,
}

/// A service as `service inspect` shows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Service {
    /// Its id.
    pub(crate) id: String,
    /// Its virtual addresses.
    pub(crate) vips: Vec<IpAddr>,
    /// Seconds since 1970.
    pub(crate) created: u64,
    /// What it is to be, its automatic ports filled in.
    pub(crate) spec: ServiceSpec,
    /// Its members, on all hosts.
    pub(crate) members: Vec<Member>,
}

/// A member as `service ps` shows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Member {
    /// The container's name.
    pub(crate) container: String,
    /// Its host's name.
    pub(crate) host: String,
    /// Its addresses on the service's network.
    pub(crate) ips: Vec<IpAddr>,
    /// Its share of new connections, against the others'.
    pub(crate) weight: u16,
    /// `serving`; `not-serving`: starting, unhealthy or about to go; `host-lost`: its host is not heard of; `down`.
    pub(crate) state: String,
}

/// `null` and a field that is left out are two things.
mod double_option {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(
        value: &Option<Option<u32>>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        value.map(|value| [value]).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Option<u32>>, D::Error> {
        let value = Option::<[Option<u32>; 1]>::deserialize(deserializer)?;
        Ok(value.map(|[value]| value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use control::service::{EndpointMode, PublishMode};

    fn port(target: u16, protocol: Protocol) -> Publish {
        Publish {
            target,
            published: Some(8000 + target),
            protocol,
            mode: PublishMode::Ingress,
            on: None,
        }
    }

    fn spec() -> ServiceSpec {
        ServiceSpec {
            name: "web".into(),
            network: "n".into(),
            mode: EndpointMode::Vip,
            balance: Balance::RoundRobin,
            vips: Vec::new(),
            publish: vec![port(80, Protocol::Tcp), port(80, Protocol::Udp)],
            health: None,
            idle_timeout: Some(60),
            drain_timeout: 10,
            preserve_client: true,
            labels: BTreeMap::from([("a".into(), "1".into())]),
        }
    }

    #[test]
    fn what_is_not_named_stays() {
        assert_eq!(Change::default().applied(spec()), Ok(spec()));
    }

    #[test]
    fn ports_go_by_their_target_and_others_come() {
        let change = Change {
            publish_remove: vec![(80, Some(Protocol::Udp))],
            publish_add: vec![port(443, Protocol::Tcp)],
            ..Change::default()
        };
        let after = change.applied(spec()).expect("80/udp is published");
        assert_eq!(
            after.publish,
            [port(80, Protocol::Tcp), port(443, Protocol::Tcp)]
        );
        let both = Change {
            publish_remove: vec![(80, None)],
            ..Change::default()
        };
        assert!(both.applied(spec()).expect("published").publish.is_empty());
        let none = Change {
            publish_remove: vec![(81, Some(Protocol::Tcp))],
            ..Change::default()
        };
        assert_eq!(
            none.applied(spec()),
            Err(ChangeError::NotPublished("81/tcp".into()))
        );
    }

    #[test]
    fn a_check_keeps_what_is_not_changed() {
        let test = HealthTest::Tcp { port: 80 };
        let first = HealthChange {
            test: Some(test.clone()),
            retries: Some(1),
            ..HealthChange::default()
        };
        let first = first.applied(None).expect("a check").expect("one");
        assert_eq!((first.interval, first.retries), (INTERVAL, 1));
        let faster = HealthChange {
            interval: Some(500),
            ..HealthChange::default()
        };
        let second = faster.clone().applied(Some(first)).expect("a check");
        let second = second.expect("one");
        assert_eq!((second.interval, second.retries), (500, 1));
        assert_eq!(second.test, test);
        assert_eq!(faster.applied(None), Err(ChangeError::NoCheck));
        let none = HealthChange {
            none: true,
            ..HealthChange::default()
        };
        assert_eq!(none.applied(Some(second)), Ok(None));
    }

    #[test]
    fn no_timeout_and_no_change_are_told_apart() {
        for idle_timeout in [None, Some(None), Some(Some(5))] {
            let change = Change {
                idle_timeout,
                ..Change::default()
            };
            let text = serde_json::to_string(&change).expect("JSON");
            let back: Change = serde_json::from_str(&text).expect("the same");
            assert_eq!(back, change);
        }
    }
}
