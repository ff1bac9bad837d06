"""Nothing of deleted or replaced rows is left in a table's files."""

from datetime import UTC, datetime

from rapidin_vdb.errors import TableError
from rapidin_vdb.store.indexing import make_anew
from rapidin_vdb.store.place import Place
from rapidin_vdb.store.version import BATCH_BYTES

PURGED = "rapidin_vdb.purged"
# As Lance's own scans have it, which would take gibibytes of wide rows at once.
_MOST_ROWS_A_BATCH = 8192


def purge_table(place: Place, name: str) -> None:
    """Write a table anew without what is gone, and remove its older versions; called while committing.

    Raises:
        TableError: some of them could not be removed.
    """
    import lance

    # Every fragment that lost a row, however large, is written anew without it.
    dataset = place.dataset(name)
    rows = BATCH_BYTES // (2 * dataset.schema.field("vector").type.list_size)
    dataset.optimize.compact_files(
        materialize_deletions=True,
        materialize_deletions_threshold=0.0,
        batch_size=min(max(1, rows), _MOST_ROWS_A_BATCH),
    )
    # Scalar indices hold values of rows that are gone.
    make_anew(place.open_table(name))
    # The newest version says what made it, as a deletion's filter with its ids and texts: so it is made by adding no
    # rows. New metadata would do too, but could be committed on top of what another's late fence undid.
    newest = place.dataset(name)
    nothing = lance.Transaction(
        newest.version, lance.LanceOperation.Append([]), transaction_properties={PURGED: datetime.now(UTC).isoformat()}
    )
    base = lance.LanceDataset.commit(newest.uri, nothing, storage_options=place.options)
    kept = place.remove_old(name, int(base.version))
    # Lance passes over files that it may not delete.
    if len(left := place.dataset(name).versions()) > kept:
        raise TableError(
            f"{len(left) - kept} older versions of the table {name} of {place} could not be deleted: "
            "permission denied, or others are writing; see to it, and run the purge again"
        )
