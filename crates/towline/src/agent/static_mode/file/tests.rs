use super::*;

const GOOD: &str = "
    [[hosts]]
    name = 'h1'
    vtep = '192.0.2.1'
    [[hosts]]
    name = 'h2'
    vtep = '192.0.2.2'
    port = 8472
    [[networks]]
    name = 'net1'
    vni = 4097
    subnets = ['10.0.9.0/24', 'fd09::/64']
    gateways = ['10.0.9.254']
    vlan = 'pass'
    [[endpoints]]
    network = 'net1'
    host = 'h1'
    mac = '02:00:00:00:00:01'
    ips = ['10.0.9.1', 'fd09::5']
    netns = 'blue'
    [[endpoints]]
    network = 'net1'
    host = 'h1'
    mac = '02:00:00:00:00:02'
    ips = ['10.0.9.2']
    container = 'c1'
    [[endpoints]]
    network = 'net1'
    host = 'h2'
    mac = '02:00:00:00:00:03'
    ips = ['10.0.9.3']
";

fn plan(text: &str) -> anyhow::Result<Plan> {
    let file: File = toml::from_str(text)?;
    let (own, _) = file.own("h1")?;
    file.plan(own, 1500)
}

#[test]
fn each_host_takes_its_own_out_of_one_file() {
    let first = plan(GOOD).expect("good");
    let file: File = toml::from_str(GOOD).expect("good");
    let (own, at) = file.own("h2").expect("there");
    assert_eq!((own, at), ("h2", ([192, 0, 2, 2], 8472).into()));
    let vni = Vni::new(4097).expect("24 bits");
    let network = &first.networks[&vni];
    assert_eq!(network.network.mtu, 1450);
    assert_eq!(network.network.settings.vlan, Vlan::Pass);
    assert_eq!(
        network.network.subnets[0].gateway,
        IpAddr::from([10, 0, 9, 254])
    );
    let places: Vec<Option<&str>> = network
        .endpoints
        .iter()
        .map(|endpoint| endpoint.place.as_ref().map(|place| place.netns.as_str()))
        .collect();
    assert_eq!(places, [Some("blue"), None, None]);
    // Who has no port there asks nothing of the other's entries; its own must have a place.
    let error = format!("{:#}", file.plan("h2", 1500).expect_err("no place"));
    assert!(error.contains("'container' or 'netns'"), "{error}");
}

#[test]
fn what_does_not_fit_is_named() {
    for (from, to, said) in [
        ("name = 'h2'", "name = 'h1'", "host h1 is there twice"),
        ("name = 'h2'", "name = 'H2'", "invalid host name"),
        ("'192.0.2.2'", "'192.0.2.1'", "another host's too"),
        ("'192.0.2.2'", "'2001:db8::2'", "IP version"),
        ("port = 8472", "port = 0", "port 0"),
        ("vni = 4097", "vni = 16777216", "network \"net1\""),
        ("'10.0.9.0/24',", "'10.0.9.1/24',", "write 10.0.9.0/24"),
        ("'10.0.9.0/24',", "'10.0.9.0/31',", "no room"),
        ("'fd09::/64'", "'10.0.9.128/25'", "overlap"),
        ("'10.0.9.254'", "'10.0.8.1'", "in no subnet"),
        ("'10.0.9.254'", "'10.0.9.255'", "the first or the last"),
        ("vlan = 'pass'", "mtu = 1451", "does not fit"),
        ("vlan = 'pass'", "mtu = 1000", "1280 to 1450"),
        ("vlan = 'pass'", "vlna = 'pass'", "vlna"),
        ("00:00:02'", "00:00:01'", "has this MAC address"),
        ("'02:00:00:00:00:02'", "'03:00:00:00:00:02'", "no unicast"),
        (
            "['10.0.9.2']",
            "['10.0.9.1']",
            "another endpoint of the network has 10.0.9.1",
        ),
        ("['10.0.9.2']", "['10.0.9.254']", "is the gateway"),
        ("['10.0.9.2']", "['10.0.7.2']", "in no subnet"),
        ("['10.0.9.2']", "[]", "no address"),
        (
            "['10.0.9.2']",
            "['10.0.9.2', '10.0.9.4']",
            "several addresses",
        ),
        ("container = 'c1'", "", "endpoint 2 (02:00:00:00:00:02"),
        (
            "container = 'c1'",
            "container = 'c1'\nnetns = 'c1'",
            "give one",
        ),
        ("container = 'c1'", "netns = 'blue'", "'interface'"),
        ("container = 'c1'", "netns = '../x'", "invalid name"),
        (
            "netns = 'blue'",
            "netns = 'blue'\ninterface = 'a/b'",
            "interface \"a/b\"",
        ),
        ("host = 'h2'", "host = 'h3'", "no host \"h3\""),
        (
            "network = 'net1'\n    host = 'h2'",
            "network = 'net2'\n    host = 'h2'",
            "no network \"net2\"",
        ),
    ] {
        let text = GOOD.replacen(from, to, 1);
        assert_ne!(text, GOOD, "{from}");
        let error = format!("{:#}", plan(&text).expect_err(to));
        assert!(error.contains(said), "{to}: {error}");
    }
    let file: File = toml::from_str(GOOD).expect("good");
    let error = file.own("h7").expect_err("another host").to_string();
    assert!(
        error.contains("no host \"h7\"") && error.contains("--name"),
        "{error}"
    );
}

proptest::proptest! {
    #[test]
    fn any_text_is_an_error_or_a_plan(text in proptest::collection::vec(
        proptest::sample::select(vec![
            "[[hosts]]\nname = 'h1'\nvtep = '192.0.2.1'\n", "[[hosts]]\nname = 'h2'\nvtep = '::1'\n",
            "[[networks]]\nname = 'n'\nvni = 7\nsubnets = ['10.0.9.0/24']\n",
            "[[networks]]\nname = 'm'\nvni = 7\nsubnets = []\n", "mtu = 65535\n", "gateways = ['10.0.9.0']\n",
            "[[endpoints]]\nnetwork = 'n'\nhost = 'h1'\nmac = '02:00:00:00:00:01'\nips = ['10.0.9.2']\n",
            "netns = 'x'\n", "interface = ''\n", "container = '\u{0}'\n", "ips = ['fd::']\n",
        ]), 0..12)) {
        let _ = plan(&text.concat());
    }
}
