"""A Delta log over a feature table, for readers who want snapshots and time travel.

The data objects are the table's own: the log only names them. Each export is one commit that adds
what is new; a table's objects never go. Objects that were replaced keep their names, so an older
version can't be read once an object of it was replaced: changed, pruned and retried samples do that.
"""

import json
from typing import Any

import pyarrow as pa

from featurex_ray.errors import RequestError
from featurex_ray.table.layout import numbered
from featurex_ray.table.log import open_parquet
from featurex_ray.table.read import TableReader
from featurex_ray.table.store import Listed, S3Store

NO_CHECKPOINTS = {"delta.checkpointInterval": str(2**31 - 1)}
"""Checkpoints are Parquet files in the table's folder: a plain glob would read them as features."""


def export_delta(table: TableReader) -> tuple[str, int, int]:
    """Writes one commit with the feature objects of this moment.

    Returns:
        The table's URI, the version that was written, and its number of objects.

    Raises:
        RequestError: The package `deltalake` is missing.
    """
    try:
        import deltalake
        from deltalake import PostCommitHookProperties
        from deltalake.transaction import create_table_with_add_actions
    except ImportError as error:
        raise RequestError("export-delta needs: pip install 'featurex-ray[delta]'") from error
    uri, options = f"{table.store.uri}/{table.facts.name}", _storage_options(table)
    fields = [*table.facts.features_schema, pa.field("dataset", pa.string())]
    schema = deltalake.Schema.from_arrow(pa.schema([field.with_nullable(True) for field in fields]))
    objects = _objects(table)
    if not deltalake.DeltaTable.is_deltatable(uri, options):
        create_table_with_add_actions(
            uri,
            schema,
            [_add_action(table, item) for item in objects],
            mode="error",
            partition_by=["dataset"],
            name=table.facts.name,
            configuration=NO_CHECKPOINTS,
            storage_options=options,
        )
        return uri, 0, len(objects)
    delta = deltalake.DeltaTable(uri, storage_options=options)
    known = _known(delta)
    fresh = [item for item in objects if (_path(table, item), item.num_bytes, _millis(item)) not in known]
    if fresh:
        delta.create_write_transaction(
            [_add_action(table, item) for item in fresh],
            mode="append",
            schema=schema,
            partition_by=["dataset"],
            post_commithook_properties=PostCommitHookProperties(
                create_checkpoint=False, cleanup_expired_logs=False
            ),
        )
        delta = deltalake.DeltaTable(uri, storage_options=options)
    return uri, delta.version(), len(objects)


def _objects(table: TableReader) -> list[Listed]:
    prefix = table.facts.keys.features
    return [item for item in table.store.list(prefix) if numbered(item.key, prefix)]


def _path(table: TableReader, item: Listed) -> str:
    return item.key.removeprefix(table.facts.keys.features)


def _millis(item: Listed) -> int:
    return int(item.modified.timestamp() * 1000)


def _known(delta: Any) -> set[tuple[str, int, int]]:
    """(path, bytes, modified) of what the log names now."""
    rows = pa.table(delta.get_add_actions(flatten=True)).select(["path", "size_bytes", "modification_time"])
    return set(zip(*(column.to_pylist() for column in rows.columns), strict=True))


def _add_action(table: TableReader, item: Listed) -> Any:
    from deltalake.transaction import AddAction

    with open_parquet(table.store, item.key) as (file, _):
        stats = {"numRecords": file.metadata.num_rows}
    path = _path(table, item)
    return AddAction(
        path=path,
        size=item.num_bytes,
        partition_values={"dataset": path.partition("/")[0].removeprefix("dataset=")},
        modification_time=_millis(item),
        data_change=True,
        stats=json.dumps(stats),
    )


def _storage_options(table: TableReader) -> dict[str, str] | None:
    if not isinstance(table.store, S3Store):
        return None
    endpoint = table.store.endpoint
    return {"AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": str(endpoint.startswith("http://")).lower()}
