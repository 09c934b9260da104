//! The UDP port of VXLAN: one wish for the whole cluster, and where each host really receives.
//!
//! A host that can't follow keeps its port, says why, and is reached there: every host's own port is in the list of hosts.

use std::time::Duration;

use vtep::flow::FIRST_SOURCE_PORT;

use super::Manager;
use crate::host::HostId;
use crate::request::Response;

/// Characters of a problem that are kept.
const PROBLEM_MAX: usize = 300;

impl Manager {
    pub(super) fn set_vxlan_port(&mut self, port: u16, now: Duration) -> Result<Response, String> {
        if !(1..FIRST_SOURCE_PORT).contains(&port) {
            return Err(format!(
                "invalid VXLAN port {port}: choose one from 1 to {}, hosts send from the ports above",
                FIRST_SOURCE_PORT - 1
            ));
        }
        if self.state.vxlan_port() == Some(port) {
            return Ok(Response::Done);
        }
        self.state.set_vxlan_port(port);
        for liveness in self.liveness.values_mut() {
            liveness.port_problem = None;
        }
        let to = self.connections.keys().copied().collect::<Vec<_>>();
        self.tell_all_hosts(&to, now);
        Ok(Response::Done)
    }

    pub(super) fn take_port(
        &mut self,
        host: HostId,
        port: u16,
        problem: Option<String>,
    ) -> Result<Response, String> {
        let Some(info) = self.state.hosts.get(&host) else {
            return Err("this host is not known: it left the cluster".to_owned());
        };
        if port == 0 {
            return Err("port 0 is none to receive on".to_owned());
        }
        let problem = problem.map(|problem| problem.chars().take(PROBLEM_MAX).collect::<String>());
        let known = self
            .liveness
            .get(&host)
            .and_then(|liveness| liveness.port_problem.as_ref());
        if info.port == port && known == problem.as_ref() {
            return Ok(Response::Done);
        }
        if let Some(problem) = &problem {
            tracing::warn!(host = %info.name, port, "does not receive VXLAN where it should: {problem}");
        } else {
            tracing::info!(host = %info.name, port, "receives VXLAN");
        }
        if info.port != port {
            let mut info = info.clone();
            info.port = port;
            self.state.put_host(info);
        }
        if let Some(liveness) = self.liveness.get_mut(&host) {
            liveness.port_problem = problem;
        }
        self.changed_hosts.insert(host);
        Ok(Response::Done)
    }
}
