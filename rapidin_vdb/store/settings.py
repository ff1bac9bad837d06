"""Where object stores are: what the environment says of that, which is no secret."""

import os

ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")
# Read by the libraries themselves.
_OTHERS = (
    "AWS_ALLOW_HTTP", "AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ENDPOINT",
    "AZURE_ALLOW_HTTP", "GOOGLE_ALLOW_HTTP",
)  # fmt: skip


def first_of(names: tuple[str, ...]) -> str | None:
    """Return the first of some variables that is set to anything."""
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def store_settings() -> dict[str, str]:
    """Return the variables that another machine needs to find the same store; credentials it must have itself."""
    found = {name: os.environ[name] for name in (*ENDPOINTS, *REGIONS, *_OTHERS) if os.environ.get(name)}
    # An address may hold a password or a signature.
    return {name: value for name, value in found.items() if "@" not in value and "?" not in value}
