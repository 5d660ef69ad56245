"""Refuses addresses that lead to the metadata service of a cloud.

Such a service gives the credentials of the node to every program that can connect to it. The platform's rule `endpoints` only compares the text
of an address. This module resolves the host of an address and checks the IP addresses, so that it also recognises host names and other notations
(`http://2852039166`). This check does not help if a name server changes its answer between the check and the connection. A NetworkPolicy with
`blockMetadata` helps in this case, too.
"""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

from finetune_api.errors import ConfigError
from finetune_api.metadata_addresses import is_metadata_address

METADATA_NAMES = ("metadata.google.internal", "metadata.goog", "instance-data")
"""Host names of metadata services. These names are refused even if this pod cannot resolve them, because a proxy may resolve them."""


def refuse_metadata_address(url: str, origin: str) -> None:
    """Refuse a URL whose host is a metadata service. A host that cannot be resolved is accepted here.

    `origin`: where the URL comes from, as the subject of the error message, for example a field of the spec.
    Errors: ConfigError `AddressForbidden`.
    """
    host = ""
    try:
        host = (urlsplit(url).hostname or "").rstrip(".")
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)} if host else set()
    except (OSError, ValueError):  # not a URL, or an unknown host name: the later connection fails with its own message
        addresses = set()
    forbidden_addresses = sorted(address for address in addresses if is_metadata_address(address))
    if forbidden_addresses or host in METADATA_NAMES:
        address_note = f", which is {forbidden_addresses[0]}" if forbidden_addresses and forbidden_addresses[0] != host else ""
        raise ConfigError(
            "AddressForbidden", f"{origin} leads to {host}{address_note}: at such link-local addresses, clouds serve the credentials of the node",
            hint="write the address of the server itself",
        )  # fmt: skip
