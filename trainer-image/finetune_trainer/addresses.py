"""Refuses addresses of users that lead to the metadata service of a cloud.

Such a service gives the credentials of the node to every program that can connect to it. The platform's rule `endpoints` compares texts. This
module compares the addresses to which a host name or another notation (`http://2852039166`) resolves. A name server that changes its answer
between this check and the connection is not stopped; a NetworkPolicy with `blockMetadata` stops it.
"""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

from finetune_api.errors import ConfigError
from finetune_api.metadata_addresses import is_metadata_address

METADATA_NAMES = ("metadata.google.internal", "metadata.goog", "instance-data")
"""Names of metadata services. In a pod that uses a proxy, only the proxy may be able to resolve them."""


def refuse_metadata_address(url: str, field: str) -> None:
    """Check the host of a URL. `field`: what names the URL, for the message. A host that cannot be resolved is not refused here.

    Errors: ConfigError `AddressForbidden`.
    """
    host = ""
    try:
        host = (urlsplit(url).hostname or "").rstrip(".")
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)} if host else set()
    except (OSError, ValueError):  # not a URL, or an unknown name: the connection fails with a message of its own
        addresses = set()
    forbidden = sorted(address for address in addresses if is_metadata_address(address))
    if forbidden or host in METADATA_NAMES:
        found = f", which is {forbidden[0]}" if forbidden and forbidden[0] != host else ""
        raise ConfigError(
            "AddressForbidden", f"{field} leads to {host}{found}: at such link-local addresses, clouds serve the credentials of the node",
            hint="write the address of the server itself",
        )  # fmt: skip
