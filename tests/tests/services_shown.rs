//! Services as people and programs read them: `service ls`, `service ps` and `service inspect`, and what is refused by its name.
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::time::Duration;

use towline_tests::cluster::Cluster;
use towline_tests::wait_until;

const LIMIT: Duration = Duration::from_secs(30);
const FAILED: i32 = 1;
const USAGE: i32 = 2;

#[test]
fn services_are_filtered_and_shown_as_people_are_used_to() {
    let cluster = Cluster::joined(1, &[]);
    let host = &cluster.hosts[0];
    host.ok("network create --subnet 10.0.9.0/24 blue");
    host.ok("network create --subnet 10.0.8.0/24 --ipv4 green");
    let id = host.ok("service create --name web --network name=blue --label tier=front --publish 8080:80 --no-healthcheck");
    let id = id.trim();
    host.ok("service create --name db --network green --label tier=back --endpoint-mode dnsrr");
    let members = ["m1", "m2"].map(|name| cluster.container(name));
    for name in &members {
        host.ok(&format!(
            "run -d --name {name} --service web -- sleep infinity"
        ));
    }
    wait_until("both serve", LIMIT, || {
        host.json("service ls --json --filter name=web")[0]["serving"] == 2
    });

    let names = |filters: &str| {
        let listed = host.ok(&format!("service ls --format {{{{.Name}}}} {filters}"));
        let mut names: Vec<String> = listed.lines().map(str::to_owned).collect();
        names.sort();
        names
    };
    assert_eq!(names(""), ["db", "web"]);
    for (filters, expected) in [
        ("--filter name=we", "web"),
        (&format!("--filter id={}", &id[..6]), "web"),
        ("--filter network=green", "db"),
        ("--filter mode=dnsrr", "db"),
        ("--filter label=tier=front", "web"),
        ("--filter label=tier --filter name=db", "db"),
    ] {
        assert_eq!(names(filters), [expected], "{filters}");
    }
    assert_eq!(names("--filter label=disk"), Vec::<String>::new());
    assert_eq!(
        host.ok("service ls --filter name=web --format {{.ID}}|{{.Network}}|{{.Mode}}|{{.Members}}|{{.Ports}}|{{.Labels}}|{{.VIPs}}"),
        format!(
            "{}|blue|vip|2/2|*:8080->80/tcp|tier=front|10.0.9.2\n",
            &id[..12]
        )
    );
    let labels = host.json("service ls --filter name=web --json")[0]["labels"].clone();
    assert_eq!(labels, serde_json::json!({ "tier": "front" }));
    assert_eq!(
        host.ok("service ls --no-trunc --quiet --filter name=web"),
        format!("{id}\n")
    );

    let [m1, m2] = &members;
    assert_eq!(
        host.ok(&format!("service ps --quiet --filter name={m2} web")),
        format!("{m2}\n")
    );
    let own = host.ok("host ls --json");
    let own: serde_json::Value = serde_json::from_str(&own).unwrap();
    let own = own[0]["name"].as_str().unwrap();
    let listed = host.ok(&format!(
        "service ps --filter host={own} --filter state=serving --format {{{{.Name}}}}|{{{{.Service}}}}|{{{{.Host}}}}|{{{{.State}}}} web"
    ));
    let mut listed: Vec<&str> = listed.lines().collect();
    listed.sort_unstable();
    let mut expected = members
        .each_ref()
        .map(|name| format!("{name}|web|{own}|serving"));
    expected.sort();
    assert_eq!(listed, expected);
    assert_eq!(
        host.json("service ps --filter state=down --json web"),
        serde_json::json!([])
    );

    assert_eq!(
        host.ok("service inspect --format {{.Spec.Name}}|{{.Spec.Balance}}|{{.VIPs}} web"),
        "web|rr|10.0.9.2\n"
    );
    let pretty = host.ok("service inspect --pretty web db");
    for line in [
        "Name:          web",
        "Ports:         *:8080->80/tcp",
        "Health check:  none",
        "Endpoint mode: dnsrr",
    ] {
        assert!(
            pretty.lines().any(|shown| shown == line),
            "{line}: {pretty}"
        );
    }
    assert!(
        pretty.contains(&format!("{m1} on {own} (serving)")),
        "{pretty}"
    );

    for (args, code, words) in [
        (
            "service ls --filter colour=red",
            FAILED,
            "the keys are id, name",
        ),
        (
            "service ls --format {{.Colour}}",
            FAILED,
            "no field 'Colour'",
        ),
        (
            "service ps --filter node=h1 web",
            FAILED,
            "the keys are name, host",
        ),
        (
            "service inspect --format {{.Name web",
            FAILED,
            "has no '}}'",
        ),
        (
            "service create --name x --network blue,alias=y",
            USAGE,
            "'service create --network NAME,alias=ALIAS' is not built yet",
        ),
        (
            "service create --name x --network blue --network green",
            USAGE,
            "'towline run --service NAME --network OTHER'",
        ),
        (
            "service create --name x --network blue --mount target=/data",
            USAGE,
            "'towline run --service'",
        ),
        ("service update web --vip 10.0.9.9", USAGE, "not built yet"),
        (
            "service update web --network-add green",
            USAGE,
            "'towline network connect'",
        ),
        (
            "service update web --no-healthcheck --health-tcp 80",
            USAGE,
            "contradicts",
        ),
        (
            "network create --ipv4=false red",
            FAILED,
            "--subnet fd00:9::/64",
        ),
        (
            "run --expose 80 -- true",
            USAGE,
            "'run --expose' is not built yet",
        ),
        ("run --volume-driver nfs -- true", USAGE, "docs/volumes.md"),
    ] {
        host.refused(args, code, &[words]);
    }
    assert_eq!(names(""), ["db", "web"], "nothing was made or changed");
    host.ok("network create --ipv4=false --subnet fd00:7::/64 six");
    let six = host.json("network ls --filter name=six --json");
    assert_eq!(
        (&six[0]["ipv4"], &six[0]["ipv6"]),
        (&false.into(), &true.into())
    );
}
