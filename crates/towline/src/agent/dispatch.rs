//! Which part of the agent answers which request.

use std::sync::Arc;

use super::{Agent, container, fdb, host, join, network, status};
use crate::api::{Request, Response};

/// Answers one request.
///
/// # Errors
/// One line for the person who asked.
pub(super) fn handle(agent: &Arc<Agent>, request: Request) -> anyhow::Result<Response> {
    Ok(match request {
        Request::Status => Response::Status(Box::new(status::status(agent))),
        Request::Init(init) => Response::Initialized(join::init(agent, &init)?),
        Request::Join(join) => Response::Joined(join::join(agent, &join)?),
        Request::Leave { force } => {
            join::leave(agent, force)?;
            Response::Done
        }
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
        Request::HostList => Response::Hosts(host::list(agent)?),
        Request::HostRemove(name) => {
            host::remove(agent, &name)?;
            Response::Done
        }
        Request::Fdb { network } => Response::Fdb(fdb::list(agent, network.as_deref())?),
        Request::Container(request) => Response::Container(container::handle(agent, request)?),
    })
}
