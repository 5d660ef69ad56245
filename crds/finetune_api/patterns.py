"""Patterns of text fields in the spec, and `MISMATCH_TEXTS`: an explanation of each pattern for error messages."""

from __future__ import annotations

OBJECT_NAME = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"
DATA_KEY = r"^[-._a-zA-Z0-9]+$"
NO_SPACE = r"^\S+$"
STORE_URL = r"^https?://[^\s/?#@]+/?$"
LABEL_KEY = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"
STORAGE_URI = r"^(s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^\s?#]*)?|file:///[^\s?#]*|pvc://[a-z0-9][-a-z0-9.]*(/[^\s?#]*)?)$"
LABEL_VALUE = r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$"
IDENTIFIER = r"^[A-Za-z_][A-Za-z0-9_]*$"
VOLUME_NAME = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
ABSOLUTE_PATH = r"^/[^\s:]+$"
OPTIMIZER_NAME = r"^[a-z0-9_]+$"
RUN_NAME_PART = r"^[^$#@&*!]*$"
HUB_REPOSITORY = r"^[\w.-]+(/[\w.-]+)?$"
RELATIVE_FOLDER = r"^[^/\s][^\s]*$"
PROJECT_NAME = r"^[\w.-]+$"
SERVICE_URL = r"^https?://[^\s/?#@]+(/[^\s?#@]*)?$"

MISMATCH_TEXTS: dict[str, str] = {
    OBJECT_NAME: "is not the name of a Kubernetes object: a-z, 0-9, `-` and `.`, with a letter or digit first and last",
    DATA_KEY: "is not a key of a Secret or ConfigMap: letters, digits, `-`, `_` and `.`",
    NO_SPACE: "is empty or contains a space",
    STORE_URL: "is not the URL of a store: `https://` or `http://` and a host, without user, password or path",
    LABEL_KEY: "is not a name such as example.com/gpu: letters, digits, `-`, `_` and `.`, with an optional domain and `/` before the name",
    LABEL_VALUE: "is not a label value: at most 63 letters, digits, `-`, `_` and `.`, with a letter or digit first and last",
    STORAGE_URI: "is not s3://bucket/prefix, pvc://claim/path or file:///path",
    IDENTIFIER: "is not a name of letters, digits and `_`, with a letter or `_` first",
    VOLUME_NAME: "is not the name of a volume: a-z, 0-9 and `-`, with a letter or digit first and last",
    ABSOLUTE_PATH: "is not an absolute path without spaces and `:`",
    OPTIMIZER_NAME: "is not the name of an optimizer: a-z, 0-9 and `_`",
    RUN_NAME_PART: "contains one of the characters $ # @ & * !",
    HUB_REPOSITORY: "is not the name of a hub repository, such as org/name",
    RELATIVE_FOLDER: "is not a folder below storage.uri: it begins with `/`, or contains a space",
    PROJECT_NAME: "is not a name of letters, digits, `-`, `_` and `.`",
    SERVICE_URL: "is not the URL of a service: `https://` or `http://`, a host and an optional path, without user, password or query",
}
"""What an error message says about a value that does not match a pattern, by pattern. The value itself comes before this phrase."""
