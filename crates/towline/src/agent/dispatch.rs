//! Which part of the agent answers which request.

use std::sync::Arc;

use super::{
    Agent, capture, container, fdb, host, installed, join, manager, names, network, port, service,
    status, trust, volumes,
};
use crate::api::{Request, Response};

/// An answer.
pub(super) enum Answer {
    /// One line.
    Once(Response),
    /// A line, and then a stream.
    Stream(Box<capture::Running>),
}

/// Answers one request.
///
/// # Errors
/// One line for the person who asked.
pub(super) fn handle(agent: &Arc<Agent>, request: Request) -> anyhow::Result<Answer> {
    Ok(Answer::Once(match request {
        Request::Status => Response::Status(Box::new(status::status(agent))),
        Request::Init(init) => Response::Initialized(join::init(agent, &init)?),
        Request::Join(join) => Response::Joined(join::join(agent, &join)?),
        Request::Leave { force } => {
            join::leave(agent, force)?;
            Response::Done
        }
        Request::Promote => {
            manager::promote(agent)?;
            Response::Done
        }
        Request::Token(wanted) => Response::Token(trust::token(agent, &wanted)?),
        Request::CaExport(path) => Response::CaExported(trust::export(agent, &path)?),
        Request::NetworkCreate(create) => {
            Response::Network(Box::new(network::create(agent, create)?))
        }
        Request::NetworkList => Response::Networks(network::list(agent)?),
        Request::NetworkInspect(name) => {
            Response::Network(Box::new(network::inspect(agent, name)?))
        }
        Request::NetworkRemove { name, force } => {
            network::remove(agent, name, force)?;
            Response::Done
        }
        Request::NetworkPrune(wanted) => Response::Pruned(network::prune(agent, wanted)?),
        Request::HostList => Response::Hosts(host::list(agent)?),
        Request::HostUpdate { host, add, remove } => {
            host::update(agent, host, add, remove)?;
            Response::Done
        }
        Request::HostRemove { host, force } => {
            host::remove(agent, &host, force)?;
            Response::Done
        }
        Request::Update(update) => Response::Hosts(port::update(agent, &update)?),
        Request::Fdb { network } => Response::Fdb(fdb::list(agent, network.as_deref())?),
        Request::Resolve(wanted) => Response::Resolved(names::resolve(agent, &wanted)?),
        Request::Events(from) => Response::Events(host::events(agent, from)?),
        Request::Verify { network } => Response::Verified(installed::verify(agent, network)?),
        Request::Capture(wanted) => {
            let running = capture::start(agent, &wanted)?;
            return Ok(Answer::Stream(Box::new(running)));
        }
        Request::Service(request) => Response::Service(service::handle(agent, request)?),
        Request::Volume(request) => Response::Volume(volumes::handle(agent, request)?),
        Request::Container(request) => Response::Container(container::handle(agent, request)?),
    }))
}
