use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::process::{Command, Stdio};

use tokio::io::{copy, sink};

use super::*;

/// How many, unless the environment says otherwise: docs/limits.md has the figures of a thousand.
const AGENTS: u16 = 200;
/// How many, from the environment.
const COUNT: &str = "TOWLINE_TEST_AGENTS";
/// Tells the other process which part of this test it is to play.
const MANAGER: &str = "TOWLINE_TEST_MANAGER";
/// What it says when its part is done.
const ALL: &str = "all are connected";

fn count() -> u16 {
    let count = std::env::var(COUNT).ok();
    count.map_or(AGENTS, |count| count.parse().unwrap())
}

/// The agents, in a process of their own: their memory is not the manager's.
#[test]
#[ignore = "a part of another test"]
fn agents() {
    let Ok(manager) = std::env::var(MANAGER) else {
        panic!("started by many_agents_cost_a_manager_little alone")
    };
    let manager: SocketAddr = manager.parse().unwrap();
    raise_file_limit(u64::from(count()) + 100);
    let mut pem = String::new();
    io::stdin().lock().read_to_string(&mut pem).unwrap();
    let authority = Authority::from_pem(&pem).unwrap();
    runtime().block_on(async {
        for host in 2..count() + 2 {
            let mut stream = connect(manager, &authority, host).await.unwrap();
            say(&mut stream, &hello(manager, host)).await;
            let (mut reader, mut writer) = tokio::io::split(stream);
            tokio::spawn(async move { copy(&mut reader, &mut sink()).await });
            tokio::spawn(async move {
                let heartbeat = ToManager::Heartbeat.encode();
                while write_frame(&mut writer, &heartbeat).await.is_ok()
                    && writer.flush().await.is_ok()
                {
                    tokio::time::sleep(Duration::from_secs(2)).await;
                }
            });
        }
        println!("{ALL}");
        std::future::pending::<()>().await;
    });
}

#[test]
fn many_agents_cost_a_manager_little() {
    raise_file_limit(u64::from(count()) + 200);
    let stand = Stand::start(126);
    let one = stand.join(1);
    let (before, began) = (resident(), Instant::now());
    let mut agents = Command::new(std::env::current_exe().unwrap())
        .args([
            "server::tests::many::agents",
            "--exact",
            "--ignored",
            "--nocapture",
        ])
        .env(MANAGER, stand.at.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let pem = stand.authority.to_pem();
    let mut stdin = agents.stdin.take().unwrap();
    stdin.write_all(pem.as_bytes()).unwrap();
    drop(stdin);
    let mut lines = BufReader::new(agents.stdout.take().unwrap()).lines();
    let all = lines.any(|line| line.is_ok_and(|line| line.contains(ALL)));
    let joined = began.elapsed();
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        assert!(all, "not all agents could connect");
        wait_until("all agents are in", || {
            stand.manager.status().connected == usize::from(count()) + 1
        });
        let each = resident().saturating_sub(before) / usize::from(count());
        println!(
            "{} agents joined in {joined:?}; {each} bytes of the manager for each",
            count()
        );
        assert!(each < 256 << 10, "{each}");
        create(&one, "10.0.9.0/24");
    }));
    agents.kill().unwrap();
    agents.wait().unwrap();
    if let Err(panic) = done {
        std::panic::resume_unwind(panic);
    }
}
