"""A table's facts: fixed when it is created (protocol, step 1), obeyed by all who write into it."""

import base64
import json
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from featurex_ray import schemas
from featurex_ray.errors import RequestError, RevisionMismatchError, TableNotFoundError
from featurex_ray.table.layout import Keys
from featurex_ray.table.store import ObjectStore, ensure


@dataclass(frozen=True)
class TableFacts:
    """What a table is.

    Args:
        name: The table's name, a folder below the output.
        revision: The extractor's revision, a hash over all that makes the features.
        dimension: Values in each feature, D.
        extractor: The extractor's spec as JSON values, with the sampling and what `auto` was
            resolved to (precision, decoder policy).
        carried: The schema of the manifest columns that are carried through.
    """

    name: str
    revision: str
    dimension: int
    extractor: dict[str, Any]
    carried: pa.Schema = field(default_factory=lambda: pa.schema([]))

    def __post_init__(self) -> None:
        known = {*schemas.SAMPLE.names, *schemas.features_schema(pa.schema([])).names, "dataset"}
        taken = sorted(known & set(self.carried.names))
        if taken:
            raise RequestError(
                f"columns {taken} can't be carried: the feature table has its own of that name"
            )
        if self.dimension < 1:
            raise ValueError(f"dimension is {self.dimension}, must be at least 1")

    @property
    def keys(self) -> Keys:
        """Where the table's objects lie."""
        return Keys(self.name)

    @property
    def sample_schema(self) -> pa.Schema:
        """The schema of manifest samples and plans."""
        return schemas.sample_schema(self.carried)

    @property
    def features_schema(self) -> pa.Schema:
        """The schema of feature objects."""
        return schemas.features_schema(self.carried)

    def conform(self, samples: pa.RecordBatch) -> pa.RecordBatch:
        """Samples in the table's schema: a carried column that the manifest lacks is null."""
        columns = [
            samples.column(item.name).cast(item.type)
            if item.name in samples.schema.names
            else pa.nulls(samples.num_rows, item.type)
            for item in self.sample_schema
        ]
        return pa.RecordBatch.from_arrays(columns, schema=self.sample_schema)

    def to_json(self) -> bytes:
        """The facts as they lie in `table.json`."""
        return json.dumps(
            {
                "name": self.name,
                "revision": self.revision,
                "dimension": self.dimension,
                "extractor": self.extractor,
                "carried": {item.name: str(item.type) for item in self.carried},
                "carried_schema": base64.b64encode(self.carried.serialize().to_pybytes()).decode(),
            },
            indent=1,
        ).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "TableFacts":
        """The facts of a `table.json`."""
        values = json.loads(data)
        carried = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(values.pop("carried_schema"))))
        return cls(**(values | {"carried": carried}))


def read_facts(store: ObjectStore, name: str) -> TableFacts:
    """The facts of an existing table.

    Raises:
        TableNotFoundError: There is none of that name.
    """
    try:
        return TableFacts.from_json(store.read(Keys(name).facts)[0])
    except FileNotFoundError as error:
        raise TableNotFoundError(f"{store.uri} holds no feature table named {name!r}") from error


def agree(store: ObjectStore, facts: TableFacts) -> TableFacts:
    """Creates `table.json` if there is none, and returns the facts that hold from now on.

    Invariant: one table, one revision; whoever comes second takes over what the first recorded.

    Raises:
        RevisionMismatchError: The table holds another revision.
        RequestError: Public objects without `table.json`, or carried columns that the table lacks.
    """
    if store.head(facts.keys.facts) is None:
        _refuse_foreign_objects(store, facts)
        settled = pa.schema([(item.name, _settled(item.type)) for item in facts.carried])
        ensure(store, facts.keys.facts, replace(facts, carried=settled).to_json())
    held = read_facts(store, facts.name)
    if held.revision != facts.revision:
        raise RevisionMismatchError(
            f"{store.uri}/{facts.name} holds extractor revision {held.revision}, this run makes "
            f"{facts.revision} ({'; '.join(_differences(held.extractor, facts.extractor))}). "
            "Name another --table"
        )
    for item in facts.carried:
        if item.name not in held.carried.names:
            raise RequestError(
                f"{store.uri}/{facts.name} was created without the carried column {item.name}; "
                f"it carries ({', '.join(held.carried.names)})"
            )
        if not _holds(kind := held.carried.field(item.name).type, item.type):
            raise RequestError(
                f"{store.uri}/{facts.name} carries {item.name} as {kind}; this manifest has it as {item.type}"
            )
    return held


def _holds(held: pa.DataType, new: pa.DataType) -> bool:
    """Whether a column takes values of another type: text takes the numbers that a night of CSV may hold."""
    if pa.types.is_null(new):
        return True
    if pa.types.is_list(held) and pa.types.is_list(new):
        return _holds(held.value_type, new.value_type)
    if pa.types.is_string(held):
        return not pa.types.is_nested(new)
    return bool(held == new) or (held == pa.float64() and new == pa.int64())


def _settled(kind: pa.DataType) -> pa.DataType:
    """The type of a new table's column; of values that nobody has seen yet, text, which holds most."""
    if pa.types.is_list(kind):
        return pa.list_(_settled(kind.value_type))
    return pa.string() if pa.types.is_null(kind) else kind


def _refuse_foreign_objects(store: ObjectStore, facts: TableFacts) -> None:
    for prefix in (facts.keys.features, facts.keys.failures):
        found = next(iter(store.list(prefix)), None)
        # A racing creator's first objects may just have appeared; then its table.json is there too.
        if found is not None and store.head(facts.keys.facts) is None:
            raise RequestError(
                f"{store.uri}/{found.key} exists, but {facts.keys.facts} doesn't: this is not a table of "
                "ours. Name another --output or --table"
            )


def _differences(held: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    names = [name for name in sorted({*held, *wanted}) if held.get(name) != wanted.get(name)]
    return [f"{name}: {held.get(name)!r} there, {wanted.get(name)!r} here" for name in names] or ["same spec"]
