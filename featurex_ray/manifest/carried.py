"""Carried columns: the one portable type under which each of them travels."""

from collections.abc import Callable, Iterable

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as t

from featurex_ray.errors import ManifestError, RequestError
from featurex_ray.schemas import CARRIED_BY_DEFAULT, HELPER, SAMPLE, features_schema

# Only what comes back the same when written again: 007 and 1e3 are names, not numbers.
_INTEGER_PATTERN = r"^(0|-?[1-9][0-9]{0,17})$"

_PORTABLE: list[tuple[Callable[[pa.DataType], bool], Callable[[pa.DataType], pa.DataType]]] = [
    (lambda kind: isinstance(kind, pa.BaseExtensionType), lambda kind: portable_type(kind.storage_type)),
    (t.is_dictionary, lambda kind: portable_type(kind.value_type)),
    (
        lambda kind: t.is_string(kind) or t.is_large_string(kind) or t.is_string_view(kind),
        lambda _: pa.string(),
    ),
    (lambda kind: t.is_binary(kind) or t.is_large_binary(kind), lambda _: pa.binary()),
    (t.is_uint64, lambda _: pa.decimal128(20, 0)),
    (t.is_integer, lambda _: pa.int64()),
    (t.is_floating, lambda _: pa.float64()),
    (t.is_date, lambda _: pa.date32()),
    (t.is_timestamp, lambda kind: pa.timestamp("us", kind.tz)),
    (lambda kind: t.is_null(kind) or t.is_boolean(kind) or t.is_decimal(kind), lambda kind: kind),
    (
        lambda kind: t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind),
        lambda kind: pa.list_(portable_type(kind.value_type)),
    ),
]


def columns_to_carry(keep_columns: Iterable[str]) -> list[str]:
    """The manifest columns that travel along: `label`, and those that were asked for.

    Raises:
        RequestError: A name is that of a feature table's own column.
    """
    names = set(keep_columns)
    ours = {*features_schema(pa.schema([])).names} - {*SAMPLE.names}
    taken = sorted(name for name in names if name in ours or name.startswith(HELPER))
    if taken:
        raise RequestError(
            f"--keep-columns {', '.join(taken)}: the feature table has columns of that name itself"
        )
    if unfit := sorted(names & {"data", "data_file", "data_row", "backfill_day"}):
        raise RequestError(f"--keep-columns {', '.join(unfit)}: that is no column which a table can carry")
    asked = [name for name in keep_columns if name not in SAMPLE.names]
    return list(dict.fromkeys([CARRIED_BY_DEFAULT, *asked]))


def portable_type(kind: pa.DataType) -> pa.DataType:
    """The nearest type that every Parquet reader knows.

    Raises:
        ManifestError: There is none.
    """
    for matches, nearest in _PORTABLE:
        if matches(kind):
            return nearest(kind)
    raise ManifestError(f"{kind} can't be carried into plain Parquet")


def observed_type(column: pa.Array, *, is_text: bool) -> pa.DataType:
    """The type of some values; in text, whole numbers are integers and all else are strings.

    Raises:
        ManifestError: The type is not portable.
    """
    if is_text and t.is_string(column.type):
        whole = pc.all(pc.match_substring_regex(column, _INTEGER_PATTERN), min_count=1).as_py()
        return {True: pa.int64(), False: pa.string(), None: pa.null()}[whole]
    return portable_type(column.type)


def promote(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """The type that holds the values of both, a string if need be. Null is that of no value.

    Raises:
        ManifestError: A list and a scalar.
    """
    if one == other or t.is_null(other):
        return one
    if t.is_null(one):
        return other
    if t.is_list(one) and t.is_list(other):
        return pa.list_(promote(one.value_type, other.value_type))
    if t.is_nested(one) or t.is_nested(other):
        raise ManifestError(f"is {one} here and {other} there")
    numbers = {one, other} <= {pa.int64(), pa.float64()}
    return pa.float64() if numbers else pa.string()


def carry(column: pa.Array, kind: pa.DataType) -> pa.Array:
    """Values under the type that the whole manifest agreed on."""
    if t.is_null(kind):
        return pa.nulls(len(column))
    if isinstance(column.type, pa.BaseExtensionType):
        column = column.storage
    if t.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(kind, safe=not t.is_timestamp(kind))
