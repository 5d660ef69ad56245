"""Recognises secrets in text by their form, so that no message, log line, report or file shows them.

This module recognises the forms that public secret scanners look for and that ordinary text does not have: tokens with a fixed prefix, signed tokens,
private keys, and credentials in headers and URLs. A secret without such a form, for example a bare password, is not recognised.

Users and pods supply the text, so the time of a search must grow only linearly with the length of the text. Therefore no pattern repeats a
group, and every repetition before the end of a pattern is bounded.
"""

from __future__ import annotations

import logging
import re

_PREFIXED_TOKEN_PATTERNS = (
    r"(?:AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{16}",  # AWS access keys
    r"hf_[A-Za-z0-9]{16,}", r"api_org_[A-Za-z0-9]{20,}",  # Hugging Face
    r"sk-(?=[A-Za-z_-]{0,40}[0-9])[A-Za-z0-9_-]{20,}",  # OpenAI, Anthropic, DeepSeek, OpenRouter
    r"gh[pousr]_[A-Za-z0-9]{20,}", r"github_pat_[A-Za-z0-9_]{22,}",  # GitHub
    r"gl(?:pat|dt|rt|cbt|ptt|ft|imt|agent|soat)-[A-Za-z0-9_-]{16,}",  # GitLab
    r"xox[abeoprs]-[A-Za-z0-9-]{10,}", r"xapp-[0-9]-[A-Za-z0-9-]{10,}",  # Slack
    r"AIza[A-Za-z0-9_-]{35}", r"ya29\.[A-Za-z0-9_-]{20,}", r"GOCSPX-[A-Za-z0-9_-]{20,}",  # Google
    r"[rs]k_(?:live|test|prod)_[A-Za-z0-9]{16,}", r"whsec_[A-Za-z0-9]{16,}",  # Stripe
    r"npm_[A-Za-z0-9]{30,}", r"pypi-[A-Za-z0-9_-]{50,}", r"dckr_[a-z]{2,4}_[A-Za-z0-9_-]{20,}",  # package registries
    r"SG\.[A-Za-z0-9_-]{16,64}\.[A-Za-z0-9_-]{16,}",  # SendGrid
    r"do[oprt]_v1_[a-f0-9]{32,}", r"dapi[a-f0-9]{32}", r"nvapi-[A-Za-z0-9_-]{20,}", r"hv[sbr]\.[A-Za-z0-9_-]{20,}",  # clouds, Vault
    r"gsk_[A-Za-z0-9]{20,}", r"xai-[A-Za-z0-9]{20,}", r"r8_[A-Za-z0-9]{20,}", r"pcsk_[A-Za-z0-9_]{20,}", r"lsv2_[a-z]{2}_[A-Za-z0-9_]{20,}",  # model services
    r"wandb_v1_[A-Za-z0-9_]{20,}", r"local-[a-f0-9]{40}",  # W&B
    r"shp(?:at|ca|pa|ss)_[a-fA-F0-9]{32}", r"glsa_[A-Za-z0-9_]{20,}", r"lin_api_[A-Za-z0-9]{20,}", r"dp\.[a-z]{2,5}\.[A-Za-z0-9]{20,}",
    r"ATATT3[A-Za-z0-9_=-]{20,}", r"AGE-SECRET-KEY-1[A-Z0-9]{30,}", r"[0-9]{8,10}:AA[A-Za-z0-9_-]{33}",
    r"eyJ[A-Za-z0-9_-]{10,4000}\.[A-Za-z0-9_-]{10,}(?:\.[A-Za-z0-9_-]+)?",  # JSON Web Tokens
)  # fmt: skip
_TOKEN_START = r"(?:(?<![A-Za-z0-9_])|(?<=\\[nrt])|(?<=%[0-9A-Fa-f]{2})|(?<=\[[0-9]m)|(?<=\[[0-9]{2}m))"  # noqa: S105 -- a pattern
"""Matches a position at which a token can start: at the start of a word, or after an escaped line break, an escaped character of a URL, or a colour code."""
_SENSITIVE_QUERY_NAMES = r"[A-Za-z_-]{0,40}(?:token|key|keyid|secret|password|passwd|credential|sig|signature|auth)"
_SENSITIVE_NAMES = (
    r"secret[_-]?(?:access[_-]?)?key|secret|token|password|passwd|api[_-]?key|access[_-]?key|account[_-]?key|private[_-]?key|"
    r"client[_-]?secret|connection[_-]?string|shared[_-]?access[_-]?signature|set-cookie|cookie"
)

TOKEN_PATTERNS = (
    re.compile(r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY[A-Z ]{0,10}-----[\s\S]*?(?:-----END [A-Z0-9 ]{0,60}-----|\Z)"),
    re.compile(rf"{_TOKEN_START}(?:{'|'.join(_PREFIXED_TOKEN_PATTERNS)})"),
    re.compile(r"(?<=Bearer )[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE),
    re.compile(r"(?<=Basic )(?=[A-Za-z+/]{0,200}[0-9=])[A-Za-z0-9+/]{8,}={0,2}", re.IGNORECASE),
    re.compile(
        r"()(authorization[\"']?\s{0,5}[=:]\s{0,5}[\"']?(?:basic|bearer|token|digest|apikey|negotiate|ntlm|aws4-hmac-sha256) {1,5})([^\r\n\"']{4,})",
        re.IGNORECASE,
    ),
    re.compile(r"(?<=://)[^/\s:@]{1,300}:[^/\s@]{1,500}(?=@)"),
    re.compile(rf"(?<=[?&;])({_SENSITIVE_QUERY_NAMES})(=)([^&\s'\"<>]+)", re.IGNORECASE),
    re.compile(rf"(?<=%26|%3F)({_SENSITIVE_QUERY_NAMES})(%3D)([^&%\s'\"<>]+(?:%2[0-57-9A-F][^&%\s'\"<>]{{0,500}})?)", re.IGNORECASE),
    re.compile(r"(hooks\.slack\.com/(?:services|workflows))(/)([A-Za-z0-9/_+]{20,})"),
)
"""Patterns of secrets that are recognisable by their own form. If a pattern has three groups, only the third is replaced."""

ASSIGNMENT_PATTERN = re.compile(rf"(?<![A-Za-z])({_SENSITIVE_NAMES})([\"']?\s{{0,5}}[=:]\s{{0,5}}[\"']?)([^\s\"',;]{{4,}})", re.IGNORECASE)
"""Matches a value after a name that suggests a secret, as in `password=...`.

Texts that users write, such as YAML files, contain names such as `password` that no secret follows.
"""


def redact_tokens(text: str, replacement: str) -> str:
    """Return the text with every secret that is recognisable by its own form replaced by `replacement`."""
    for pattern in TOKEN_PATTERNS:
        text = _replace_secrets(pattern, text, replacement)
    return text


def redact_all(text: str, replacement: str) -> str:
    """Return the text with every secret replaced by `replacement`, and also every value that follows a name such as `password`."""
    return _replace_secrets(ASSIGNMENT_PATTERN, redact_tokens(text, replacement), replacement)


def _replace_secrets(pattern: re.Pattern[str], text: str, replacement: str) -> str:
    return pattern.sub(lambda match: f"{match[1]}{match[2]}{replacement}" if match.lastindex == 3 else replacement, text)


class RedactingFormatter(logging.Formatter):
    """Formats log records and their tracebacks without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of the record with all secrets replaced."""
        return redact_all(super().format(record), "[redacted]")
