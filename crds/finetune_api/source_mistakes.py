"""Recognise common mistakes in sources, such as `gs://bucket/key` or the web page of a hub repository, and suggest the correct source."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

HADOOP_S3_SCHEMES = ("s3a", "s3n")
"""Hadoop's URL schemes for S3."""
S3_ENDPOINT_BY_SCHEME = {
    "gs": "https://storage.googleapis.com", "gcs": "https://storage.googleapis.com", "minio": "http://minio:9000",
    "r2": "https://ACCOUNT.r2.cloudflarestorage.com", "oss": "https://oss-REGION.aliyuncs.com", "cos": "https://cos.REGION.myqcloud.com",
}  # fmt: skip
"""Maps the URL scheme of another store with an S3 interface to the endpoint of this interface, or to an example of such an endpoint."""
SCHEMES_WITHOUT_S3 = ("az", "abfs", "abfss", "wasb", "wasbs", "adl", "hdfs", "dbfs", "ftp", "sftp", "git", "ssh", "nfs")
"""URL schemes of stores without an S3 interface."""
_SCHEME_WITHOUT_SLASHES_PATTERN = re.compile(r"^(s3|hf|pvc|configmap|file):/?(?!/)(\S+)$", re.IGNORECASE)
_S3_ARN_PATTERN = re.compile(r"^arn:[a-z-]+:s3:::(\S+)$")
_WINDOWS_PATH_PATTERN = re.compile(r"^[A-Za-z]:[\\/]|\\")
_PLACEHOLDER_PATTERN = re.compile(r"\$\{?\w|\{\{|<\w+>")
_REVISION_AFTER_COLON_PATTERN = re.compile(r"^([\w.-]+/[\w.-]+):([\w./-]+)$")
_HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_HUB_PAGE_PATTERN = re.compile(r"^/(?:datasets/)?([\w.-]+/[\w.-]+)(?:/tree/([\w.-]+))?/?$")
_HUB_FILE_PAGE_PATTERN = re.compile(r"^/(?:datasets/)?[\w.-]+/[\w.-]+/blob/")
_GITHUB_FILE_PAGE_PATTERN = re.compile(r"^/([\w.-]+/[\w.-]+)/blob/(.+)$")


def explain_mistake(text: str, spec_path: str) -> tuple[str, str] | None:
    """Return (problem, what to write) for a source with a common mistake, or None for any other text. `spec_path`: path of the source in the spec."""
    if match := _S3_ARN_PATTERN.match(text):
        return "this is an ARN and not an address", f"s3://{match[1]}"
    scheme, separator, address = text.partition("://")
    if separator:
        return _explain_scheme(scheme, address, spec_path) or _explain_web_page(text)
    if has_placeholder(text):
        return "this is a placeholder, and a FineTuneJob has no variables", "the value itself"
    if match := _SCHEME_WITHOUT_SLASHES_PATTERN.match(text):
        slashes = ":///" if match[1].lower() == "file" else "://"
        return f"`//` is missing after `{match[1]}:`", f"{match[1].lower()}{slashes}{match[2]}"
    if _WINDOWS_PATH_PATTERN.search(text):
        file_name = re.split(r"[\\/]", text.rstrip("\\/"))[-1]
        return "this seems to be a local path, but pods cannot read files on your machine", f"s3://bucket/{file_name}, after you uploaded the files there"
    if match := _REVISION_AFTER_COLON_PATTERN.match(text):
        return "a revision follows `@` and not `:`", f"{match[1]}@{match[2]}"
    return None


def has_placeholder(text: str) -> bool:
    """Whether a source contains a placeholder that was not replaced, such as `${MODEL}`, `$MODEL`, `{{ model }}` or `<model>`."""
    return bool(_PLACEHOLDER_PATTERN.search(text))


def _explain_scheme(scheme: str, address: str, spec_path: str) -> tuple[str, str] | None:
    lowercase_scheme = scheme.lower()
    if lowercase_scheme in HADOOP_S3_SCHEMES or (lowercase_scheme != scheme and lowercase_scheme in ("s3", "hf", "pvc", "configmap", "file")):
        correct_scheme = "s3" if lowercase_scheme in HADOOP_S3_SCHEMES else lowercase_scheme
        return f"`{scheme}://` is not a supported notation", f"{correct_scheme}://{address}"
    if lowercase_scheme == "https" and scheme != lowercase_scheme:
        # The address may contain a signature, so the suggestion does not repeat the address.
        return f"`{scheme}://` is not a supported notation", "https:// in lower case"
    if lowercase_scheme in S3_ENDPOINT_BY_SCHEME:
        endpoint_field = {"dataset": "dataset.storage.endpoint", "model": "model.storage.endpoint"}.get(spec_path.partition(".")[0], "storage.endpoint")
        problem = f"`{scheme}://` is not a supported notation, but the trainer can use the S3 interface of this store"
        return problem, f"s3://{address}, and the address of the interface in {endpoint_field}, for example {S3_ENDPOINT_BY_SCHEME[lowercase_scheme]}"
    if lowercase_scheme in SCHEMES_WITHOUT_S3:
        problem = f"`{scheme}://` is not a supported notation, because the trainer cannot read this store"
        return problem, "s3://bucket/key or pvc://claim/path, after you copied the files there"
    return None


def _explain_web_page(url: str) -> tuple[str, str] | None:
    """Return (problem, what to write) for the address of a web page that shows a repository or a file. The trainer would read this page as data.

    None: the address is not known to be such a web page.
    """
    try:
        url_parts = urlsplit(url)
    except ValueError:
        return None
    if url_parts.hostname in _HUB_HOSTS:
        if match := _HUB_PAGE_PATTERN.match(url_parts.path):
            return "this is the web page of a hub repository", match[1] + (f"@{match[2]}" if match[2] else "")
        if _HUB_FILE_PAGE_PATTERN.match(url_parts.path):
            return "this is the web page of a file in a hub repository", f"https://{url_parts.hostname}{url_parts.path.replace('/blob/', '/resolve/', 1)}"
    if url_parts.hostname in ("github.com", "www.github.com") and (match := _GITHUB_FILE_PAGE_PATTERN.match(url_parts.path)):
        return "this is the web page of a file", f"https://raw.githubusercontent.com/{match[1]}/{match[2]}"
    return None
