"""Addresses at which clouds serve credentials and configuration of the node to every program that can reach them."""

from __future__ import annotations

import ipaddress

METADATA_CIDRS = (
    "169.254.169.254/32",
    "169.254.170.2/32",
    "100.100.100.200/32",
    "168.63.129.16/32",
    "192.0.0.192/32",
    "fd00:ec2::254/128",
    "fd20:ce::254/128",
)
"""AWS, Google, Azure and others; AWS tasks; Alibaba; Azure's host agent; Oracle; AWS and Google over IPv6.

Not listed: 169.254.170.23 and fd00:ec2::23, EKS Pod Identity. They serve only the credentials of the pod's own ServiceAccount.
"""

_NETWORKS = tuple(ipaddress.ip_network(cidr) for cidr in METADATA_CIDRS)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""Addresses of IPv4 hosts behind a NAT64 gateway. Their last four bytes are the IPv4 address."""


def is_metadata_address(text: str) -> bool:
    """Whether an IP address is a metadata address or another link-local address. Also for IPv4 addresses that are written as IPv6."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        embedded = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            embedded = ipaddress.IPv4Address(address.packed[-4:])
        if embedded is not None:
            address = embedded
    return address.is_link_local or any(address in network for network in _NETWORKS)
