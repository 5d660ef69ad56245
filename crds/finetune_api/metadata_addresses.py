"""Addresses at which clouds serve the node's credentials and configuration to every program that can reach them."""

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
"""Addresses of the metadata services, in this order: AWS, Google, Azure and others; AWS ECS tasks; Alibaba; Azure's host agent; Oracle; AWS over IPv6;
Google over IPv6.

169.254.170.23 and fd00:ec2::23 (EKS Pod Identity) are not listed, because they serve only the credentials of the pod's own ServiceAccount.
"""

_METADATA_NETWORKS = tuple(ipaddress.ip_network(cidr) for cidr in METADATA_CIDRS)
_NAT64_NETWORK = ipaddress.IPv6Network("64:ff9b::/96")
"""IPv6 addresses of IPv4 hosts behind a NAT64 gateway. The last four bytes of these IPv6 addresses are the IPv4 address."""


def is_metadata_address(address_text: str) -> bool:
    """Whether an IP address is a metadata address or another link-local address. If an IPv6 address contains an IPv4 address, the IPv4 address is checked."""
    address = ipaddress.ip_address(address_text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        embedded_ipv4 = address.ipv4_mapped or address.sixtofour
        if address in _NAT64_NETWORK:
            embedded_ipv4 = ipaddress.IPv4Address(address.packed[-4:])
        if embedded_ipv4 is not None:
            address = embedded_ipv4
    return address.is_link_local or any(address in network for network in _METADATA_NETWORKS)
