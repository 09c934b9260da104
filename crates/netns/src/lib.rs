//! Network namespaces and what stands in them: links, addresses, routes, neighbours.
