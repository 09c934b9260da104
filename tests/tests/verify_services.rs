//! `towline verify` and rules for services: what somebody changes in a container or on a host is named, and made anew.
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use netns::Netns;
use serde_json::Value;
use towline_tests::service::{ANSWER_LIMIT, ask, shares};
use towline_tests::web::{LIMIT, Web};
use towline_tests::{sh, wait_until};

/// What `verify` finds, asked on the first host.
fn verify(web: &Web) -> Vec<Value> {
    let output = web.cluster.hosts[0].towline("verify --json");
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let found = found.as_array().unwrap().clone();
    let same = found.iter().all(|one| one["result"] == "same");
    assert_eq!(output.status.success(), same, "{found:?}");
    found
}

fn all_the_same(web: &Web) -> bool {
    verify(web).iter().all(|one| one["result"] == "same")
}

/// A rule that `verify` is to name on the second host.
struct Named<'a> {
    network: &'a str,
    container: Option<&'a str>,
    service: Option<&'a str>,
    words: &'a str,
    fault: &'a str,
}

/// Breaks something, until `verify` names it: a host's own rules are looked after every few seconds anyway.
fn is_named_and_mended(web: &Web, netns: &Netns, nft: &str, named: &Named<'_>) {
    let host = web.cluster.hosts[1].name.as_str();
    let is_meant = |rule: &Value| {
        rule["container"] == named.container.map_or(Value::Null, Value::from)
            && rule["service"] == named.service.map_or(Value::Null, Value::from)
            && rule["fault"] == named.fault
            && rule["rule"].as_str().unwrap().contains(named.words)
    };
    let mut last = Vec::new();
    for _ in 0..20 {
        sh(netns, &format!("nft {nft}"));
        last = verify(web);
        let mut of_host = last.iter().filter(|one| one["host"] == host);
        let found = of_host.find(|one| one["network"] == named.network).unwrap();
        let mut rules = found["rules"].as_array().into_iter().flatten();
        if rules.any(is_meant) {
            wait_until("it is mended", LIMIT, || all_the_same(web));
            return;
        }
        wait_until("somebody else mended it", LIMIT, || all_the_same(web));
    }
    panic!("{nft} on {netns}: {} is not named: {last:?}", named.words);
}

#[test]
fn rules_that_somebody_changed_are_named_and_made_anew() {
    let mut web = Web::new(2, &[], "--idle-timeout 1h");
    let names = [0, 1].map(|host| web.add(host, &format!("m{host}")));
    let client = web.add_client(1, "client");
    let name = client.name().unwrap().to_owned();
    web.wait_serving(&[0, 1], 2);
    wait_until("all is as it should be", LIMIT, || all_the_same(&web));

    let vip = web.vips()[0].ip();
    let of_client = |service, words, fault| Named {
        network: "myoverlay",
        container: Some(&name),
        service,
        words,
        fault,
    };
    let element = format!("element {vip} of set services4, to chain svc-web in table inet towline");
    let delete = format!("delete element inet towline services4 {{ {vip} }}");
    let web_rule = "rule \"members of web\" of chain svc-web in table inet towline";
    for (nft, named) in [
        (
            "flush chain inet towline svc-web",
            of_client(Some("web"), web_rule, "missing"),
        ),
        (
            "add rule inet towline svc-web drop",
            of_client(
                Some("web"),
                "rule without a comment of chain svc-web",
                "extra",
            ),
        ),
        (
            "add chain inet towline mine",
            of_client(None, "chain mine", "extra"),
        ),
        (delete.as_str(), of_client(Some("web"), &element, "missing")),
        (
            "delete table inet towline",
            of_client(Some("web"), "table inet towline", "missing"),
        ),
    ] {
        is_named_and_mended(&web, &client, nft, &named);
    }
    let (shared, _) = shares(&client, web.vips()[0], 20, 2);
    assert_eq!(shared.len(), 2, "{shared:?}");

    let member = &web.members[&names[1]].netns;
    let of_member = Named {
        network: "ingress",
        container: Some(&names[1]),
        service: Some("web"),
        words: "element tcp 80 of set targets in table inet towline-ingress",
        fault: "missing",
    };
    is_named_and_mended(
        &web,
        member,
        "flush set inet towline-ingress targets",
        &of_member,
    );
    let of_member = Named {
        words: "table netdev towline-ingress",
        ..of_member
    };
    is_named_and_mended(
        &web,
        member,
        "delete table netdev towline-ingress",
        &of_member,
    );

    let host = &web.cluster.hosts[1].netns;
    let of_host = Named {
        network: "ingress",
        container: None,
        service: Some("web"),
        words: "element tcp 8080 of set published, to chain publish-8080-tcp",
        fault: "missing",
    };
    let delete = "delete element inet towline-ingress published { tcp . 8080 }";
    is_named_and_mended(&web, host, delete, &of_host);
    for target in web.ports(1) {
        let answer = web.client().run(|| ask(target, ANSWER_LIMIT)).unwrap();
        assert!(answer.is_ok(), "{target}: {answer:?}");
    }
    let shown = web.cluster.hosts[0].ok("verify");
    assert!(shown.contains("ok"), "{shown}");
}
