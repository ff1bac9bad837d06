"""A database in an object store: S3 and what speaks its language, Google's or Azure's."""

import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from rapidin_vdb.errors import OvertakenError, TableError, without_secrets
from rapidin_vdb.store.cache import cache_folder
from rapidin_vdb.store.fence import before_fences, fence, is_half_done
from rapidin_vdb.store.leftovers import remove_versions, unnamed_files
from rapidin_vdb.store.place import STABLE, as_lance, connected, manifest_name
from rapidin_vdb.store.settings import ENDPOINTS, REGIONS, first_of, store_settings
from rapidin_vdb.store.telling import first_line

_LEASE = ".commit.lease"
_TABLES = ("samples", "tokens")
# A store that does not answer is given up after this.
_RETRIES, _RETRY_SECONDS = 4, 30


class Bucket:
    """A place in an object store."""

    cached = True
    patience = 600.0

    def __init__(self, uri: str) -> None:
        """Find the way there; nothing is read yet.

        Raises:
            TableError: the URI holds what may be a secret, or names no bucket; or the libraries are missing.
        """
        scheme, _, rest = uri.partition("://")
        if "@" in rest or "?" in rest:
            raise TableError(
                f"{without_secrets(uri)}: give credentials in the environment or in the provider's own files, not in "
                "the URI"
            )
        if "#" in rest:
            # Whoever reads the URI after us would take what follows for no part of the name.
            raise TableError(f"{uri}: a name in an object store can have no # here; give another")
        if not rest.strip("/"):
            raise TableError(f"{uri}: wanted a bucket and a folder in it, as {scheme}://bucket/db")
        self.uri = self.address = uri.rstrip("/")
        self.cache = cache_folder(self.uri)
        self.options, self._store = _way_to(scheme, self.uri)
        self.settings = store_settings() | _settings_of(self.options)
        # Here, where the libraries are known to be there.
        from rapidin_vdb.store.lease import RENEWAL_SECONDS, Lease

        _, hasty = _way_to(scheme, self.uri, timeout=RENEWAL_SECONDS)
        self.lock: Any = Lease(self._store, _LEASE, place=self.uri, fence=self._fence, hasty=hasty)
        self._whole: dict[str, int] = {}  # the last version of each table that is known to be no fence half done

    def __str__(self) -> str:
        return self.uri

    @cached_property
    def _connection(self) -> Any:
        # Without looks at newer versions: a commit has to be on top of what was read before the lease was checked.
        return connected(self.uri, storage_options=self.options)

    def open_table(self, name: str) -> Any:
        """Return the newest version of a table; whoever holds the lease first restores what a late fence undid."""
        while True:
            table = self._connection.open_table(name)
            if not self.lock.check() or self._is_whole(name, table.version):
                return table
            self._end_former(name, self.lock.is_ours)

    def counting(self, name: str, version: int) -> int:
        """Return the version whose rows count where this is the newest: the same, or what a late fence undid."""
        if self._is_whole(name, version):
            return version
        return before_fences(self._dataset(name, version), kept=partial(self._has_version, name))

    def create_table(self, name: str, schema: pa.Schema) -> None:
        """Make a table."""
        # It has no version, so that what lies there was left by who died.
        self._remove([path for path in self._below(f"{name}.lance/") if "/_versions/" not in path])
        self._connection.create_table(name, schema=schema, storage_options=self.options | STABLE)

    def dataset(self, name: str) -> Any:
        """Return a table as Lance knows it."""
        return self._dataset(name, int(self.open_table(name).version))

    def _dataset(self, name: str, version: int | None = None) -> Any:
        return as_lance(f"{self.uri}/{name}.lance", version, self.options)

    def remove_old(self, name: str, base: int) -> int:
        """Remove what only versions of a table before `base` need, and what writers that died have left of others.

        Lance would take what another writes at the moment for the latter, and we may have lost the lease without
        knowing it: it is let remove only what older versions name. What remains are two versions, the newest of which
        is a fence: of the one that stopped a former writer, which may stand still to this day, nothing is left.
        """
        if not self._end_former(name, self.lock.is_ours):
            self.lock.check()
            raise OvertakenError("another writer took over meanwhile; run the same command again to go on")
        # All from this version on is kept, whatever came behind it.
        kept = self._dataset(name, base)
        remove_versions(kept, unnamed=False)
        newest, below = self.dataset(name), f"{name}.lance/"
        listed = [path.removeprefix(below) for path in self._below(below)]
        unnamed = set(unnamed_files(kept, listed)) & set(unnamed_files(newest, listed))
        self._remove([below + path for path in sorted(unnamed)])
        return 2

    def has_table(self, name: str) -> bool:
        """Say whether a table has a committed version."""
        # The first is enough: a store lists a thousand at a time, and there is one for every commit.
        return any(path.endswith(".manifest") for path in self._below(f"{name}.lance/_versions/"))

    def entries(self) -> set[str] | None:
        """Return the first parts of the names of what is there."""
        import obstore

        from rapidin_vdb.store.lease import PROBE

        listed = obstore.list_with_delimiter(self._store)
        names = {entry["path"] for entry in listed["objects"]} | set(listed["common_prefixes"])
        found = {name.strip("/").rpartition("/")[2] for name in names} - {_LEASE}
        # One that is killed leaves what it tried the store with.
        return {name for name in found if not name.startswith(PROBE)}

    def prepare(self) -> None:
        """See that two writers cannot both win."""
        from rapidin_vdb.store.lease import check_conditional_puts

        check_conditional_puts(self._store, place=self.uri)

    def manifest(self, name: str, version: int) -> bytes | None:
        """Return what Lance wrote of a version of a table."""
        import obstore

        try:
            return bytes(obstore.get(self._store, f"{name}.lance/_versions/{manifest_name(version)}").bytes())
        except FileNotFoundError:
            return None

    def bytes(self) -> int:
        """Return how much all objects take."""
        import obstore

        return sum(entry["size"] for batch in obstore.list(self._store) for entry in batch)

    def _below(self, prefix: str) -> Iterator[str]:
        """Yield the paths of what is there, asking for more as long as somebody wants to have them."""
        import obstore

        return (entry["path"] for batch in obstore.list(self._store, prefix) for entry in batch)

    def _remove(self, listed: list[str]) -> None:
        """Delete objects that were listed while committing.

        Whoever takes the lease from us does so after this check, and writes under names that nobody had before: however
        long we stand still from here on, nothing of theirs is in the list.
        """
        import obstore

        self.lock.check()
        for path in listed:
            obstore.delete(self._store, path)

    def _fence(self, holding: Callable[[], bool], taken_over: bool) -> bool:
        """Let whatever a former writer is about to commit fail, and keep whatever it has committed.

        Where the lease was not taken over but let go of, only what another left half done is finished.
        """
        for name in _TABLES:
            if self.has_table(name) and (taken_over or not self._is_whole(name)):
                if not self._end_former(name, holding):
                    return False
        return True

    def _is_whole(self, name: str, version: int | None = None) -> bool:
        """Say whether a version of a table, the newest if none, is anything but a fence half done."""
        if version is None or self._whole.get(name) != version:
            found = self._dataset(name, version)
            if is_half_done(found, kept=partial(self._has_version, name)):
                return False
            self._whole[name] = int(found.version)
        return True

    def _end_former(self, name: str, holding: Callable[[], bool]) -> bool:
        uri, kept = f"{self.uri}/{name}.lance", partial(self._has_version, name)
        return fence(uri, self.options, kept=kept, holding=holding)

    def _has_version(self, name: str, version: int) -> bool:
        return self.manifest(name, version) is not None


def _way_to(scheme: str, uri: str, *, timeout: float | None = None) -> tuple[dict[str, str], Any]:
    """Return what Lance has to be told, and the store as our own library knows it; that gives up after a timeout.

    Raises:
        TableError: a library is missing, or the store's options do not make sense.
    """
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError as error:
        raise TableError(f"{uri}: object stores need another library: pip install 'rapidin-vdb[cloud]'") from error
    options, provider = _of_s3(uri) if scheme == "s3" else ({}, None)
    ours: dict[str, Any] = {name: value for name, value in options.items() if name != "allow_http"}
    if provider is not None:
        ours["credential_provider"] = provider
    client: Any = {"allow_http": True} if "allow_http" in options else {}
    client |= {} if timeout is None else {"timeout": timedelta(seconds=timeout)}
    retry: Any = {"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=_RETRY_SECONDS)}
    options |= {"client_max_retries": str(_RETRIES), "client_retry_timeout": str(_RETRY_SECONDS)}
    try:
        return options, from_url(uri, client_options=client, retry_config=retry, **ours)
    except (BaseError, ValueError, TypeError) as error:
        raise TableError(f"{uri} cannot be reached: {first_line(error)}") from error


def _settings_of(options: dict[str, str]) -> dict[str, str]:
    """Return what a store's options would be in the environment of another machine, which may have no such files."""
    found = {ENDPOINTS[0]: options.get("endpoint", ""), REGIONS[0]: options.get("region", "")}
    return {name: value for name, value in found.items() if value and "@" not in value and "?" not in value}


def _of_s3(uri: str) -> tuple[dict[str, str], Any]:
    """Return endpoint and region, and who provides credentials where these are not in the environment.

    The environment goes before the files of AWS (`~/.aws/config` and `credentials`, and AWS_PROFILE).
    """
    endpoint, region, provider = first_of(ENDPOINTS), first_of(REGIONS), None
    files = [
        Path(os.environ.get(name) or f"~/.aws/{file}").expanduser()
        for name, file in (("AWS_CONFIG_FILE", "config"), ("AWS_SHARED_CREDENTIALS_FILE", "credentials"))
    ]
    if any(file.is_file() for file in files) or "AWS_PROFILE" in os.environ:
        try:
            import boto3
            from botocore.exceptions import BotoCoreError
            from obstore.auth.boto3 import Boto3CredentialProvider
        except ImportError as error:
            raise TableError(f"{uri}: AWS's files need another library: pip install 'rapidin-vdb[cloud]'") from error
        try:
            session = boto3.Session()
            region = region or session.region_name
            endpoint = endpoint or session._session.get_scoped_config().get("endpoint_url")
            if "AWS_ACCESS_KEY_ID" not in os.environ and session.get_credentials() is not None:
                # Asked again when less than five minutes are left of this. AWS's library renews what has less than
                # fifteen, so that none is used that has run out; by default it would be asked every 25.
                provider = Boto3CredentialProvider(session, ttl=timedelta(minutes=6))
        except BotoCoreError as error:
            raise TableError(f"{uri}: AWS's files cannot be used: {error}") from error
    options = {}
    if endpoint:
        options["endpoint"] = endpoint
        if endpoint.startswith("http://"):
            options["allow_http"] = "true"
    if region or endpoint:
        # Stores that are not Amazon's have none, but a signature does.
        options["region"] = region or "us-east-1"
    return options, provider
