"""fsspec's file systems: which package reads an address, where its credentials come from, what its errors mean.

fsspec brings connections, proxies, credentials, listings and uploads. Errors are sorted into three kinds: FileNotFoundError,
PermissionError, and those after which another request may succeed (RetryableError, or the package's own).
"""

import logging
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

from runtime.errors import UserError, suggest

# of packages: the credentials are missing or were refused
NO_ACCESS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ClientAuthenticationError")
NOT_FOUND, FORBIDDEN = (404, 410), (401, 403, 407)


class Scheme(NamedTuple):
    package: str  # that fsspec needs for it
    extra: str  # of pyproject.toml, which installs it
    settings: str  # where its settings come from
    credentials: str


SCHEMES = {
    "s3": Scheme(
        "s3fs", "remote", "AWS_ENDPOINT_URL",
        "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; AWS_ENDPOINT_URL if the bucket is not at Amazon; "
        "FSSPEC_S3_ANON=true for a public bucket",
    ),
    "https": Scheme(
        "aiohttp", "remote", "FSSPEC_HTTP", "~/.netrc, or headers in FSSPEC_HTTP, if the server needs a login"
    ),
    "gs": Scheme(
        "gcsfs", "gs", "GOOGLE_APPLICATION_CREDENTIALS",
        "GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`; "
        "FSSPEC_GS_TOKEN=anon for a public bucket",
    ),
    "az": Scheme(
        "adlfs", "az", "AZURE_STORAGE_ACCOUNT_NAME",
        "AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
    ),
    "hf": Scheme("huggingface_hub", "hf", "HF_ENDPOINT", "HF_TOKEN, or `hf auth login`"),
}  # fmt: skip
SCHEMES["http"] = SCHEMES["https"]
WRITABLE = ("s3", "gs", "az", "hf")
EXAMPLES = "s3://bucket/path or https://host/path (gs://bucket/path, az://container/path, hf://datasets/name/set too)"


class RetryableError(Exception):
    """A request that failed and may succeed the next time."""


def check_address(address: str) -> SplitResult:
    """The parts of an address. Raises UserError if shards cannot be read from it."""
    try:
        parts = urlsplit(address)
        valid = parts.scheme in SCHEMES and bool(parts.hostname) and parts.port != 0
    except ValueError:  # an invalid port or IPv6 address
        valid = False
    if not valid:
        scheme = address.partition(":")[0]
        close = "" if scheme in SCHEMES else suggest(scheme, tuple(SCHEMES))
        raise UserError(f"{address}: not an address of shards; give a folder, {EXAMPLES}{close}")
    return parts


def open_filesystem(scheme: str, address: str, timeout: float, retries: bool) -> Any:
    """fsspec's file system of a scheme, for this process. retries: whether it repeats failed requests itself, where it can
    be asked not to. Raises UserError if a package is missing or a setting is wrong; `address` begins its message."""
    try:
        import fsspec

        if scheme in ("http", "https"):
            return _http()
        if scheme == "s3":
            return _s3(timeout, retries)
        # gcsfs writes the traceback of each failed request; here it is one message
        logging.getLogger(SCHEMES[scheme].package).setLevel(logging.CRITICAL)
        return fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False)
    except ImportError as error:
        raise UserError(
            f"{address}: a package for remote shards is missing ({error}): pip install -e '.[{SCHEMES[scheme].extra}]'"
        ) from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{address}: {error}; see {SCHEMES[scheme].settings}, FSSPEC_* and ~/.config/fsspec") from None


def _http() -> Any:
    import fsspec
    from fsspec.config import conf

    client = conf.get("http", {}).get("client_kwargs", {}) | conf.get("https", {}).get("client_kwargs", {})
    return fsspec.filesystem(
        "http", skip_instance_cache=True, use_listings_cache=False,
        client_kwargs={"trust_env": True} | client,  # proxies and ~/.netrc, as in other programs
    )  # fmt: skip


def _s3(timeout: float, retries: bool) -> Any:
    import fsspec

    config: dict[str, Any] = {"connect_timeout": timeout, "read_timeout": timeout}
    if not retries:
        config["retries"] = {"total_max_attempts": 1}
    filesystem = fsspec.filesystem(
        "s3", skip_instance_cache=True, use_listings_cache=False, config_kwargs=config,
        max_concurrency=2,  # parts of 50 MB of an upload, which are in memory
    )  # fmt: skip
    if not retries:
        filesystem.retries = 1
    filesystem.connect()
    return filesystem


def sorted_error(error: Exception) -> Exception:
    """A package's error as one of three kinds; a ValueError stays: the request itself is wrong."""
    if isinstance(error, (FileNotFoundError, PermissionError, RetryableError, ValueError)):
        return error
    status = _status(error)
    if status in NOT_FOUND:
        return FileNotFoundError(describe(error))
    if status in FORBIDDEN or type(error).__name__ in NO_ACCESS or str(error).startswith("Forbidden"):  # gcsfs: 403
        return PermissionError(describe(error))
    return RetryableError(describe(error))


def _status(error: Exception) -> int | None:
    """The HTTP status that an error was made from, wherever its package keeps it."""
    response = getattr(error, "response", None)
    for holder, name in ((error, "status_code"), (error, "status"), (error, "code"), (response, "status_code")):
        value = getattr(holder, name, None)
        if isinstance(value, int) or (isinstance(value, str) and value.isdecimal()):
            return int(value)
    return None


def describe(error: Exception) -> str:
    """An error of a request in a few words."""
    response = getattr(error.__cause__ or error, "response", None)
    if isinstance(response, dict):  # botocore's
        status, why = response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""), response.get("Error", {})
        return f"{status} {why.get('Code', '')}: {why.get('Message', '')}".strip(" :")
    return " ".join(str(error).split()) or type(error).__name__
