//! Small datagrams that test whether a host reaches another's VXLAN port, and at what size.
