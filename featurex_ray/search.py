"""Search a table by an image that is not in it: the table's own extractor embeds the image."""

import numpy as np
import pyarrow as pa

from featurex_ray.errors import RequestError, SampleError
from featurex_ray.media.image import decode_image
from featurex_ray.models.embed import Embedder
from featurex_ray.models.recorded import refuse_other_revision, resolve_recorded
from featurex_ray.models.registry import ResolvedExtractor
from featurex_ray.storage import Fetcher, ReadPolicy, redact
from featurex_ray.table.read import TableReader


def search_image(table: TableReader, uri: str, *, k: int, weights: str | None = None) -> pa.Table:
    """The clips of a table that are nearest to an image, by cosine.

    Args:
        table: The table; its facts say with what extractor and precision it was made.
        uri: The image, a path or URI.
        k: How many.
        weights: Where the extractor's weights lie, if not where they lay when the table was made.

    Returns:
        As `TableReader.search`.

    Raises:
        RequestError: The image can't be used, or the extractor is not the one that made the table.
    """
    resolved = extractor_of(table, weights=weights)
    try:
        with Fetcher(ReadPolicy(uri)) as fetcher:
            image = decode_image(fetcher.fetch(uri).data, inputs=[resolved.spec.input])
    except SampleError as error:
        raise RequestError(f"--image {redact(uri)}: {error}") from error
    precision = table.facts.extractor["precision"]
    features = Embedder(resolved, precision=precision).embed(image.frames[0][None], np.array([1]))
    if features.errors:
        raise RequestError(f"--image {redact(uri)}: {features.errors[0]}")
    return table.search(features.feature[0], k=k)


def extractor_of(table: TableReader, *, weights: str | None = None) -> ResolvedExtractor:
    """The extractor that made a table.

    Raises:
        RequestError: It takes no images, or what is found under its name now has other weights
            or another revision.
    """
    made_with = table.facts.extractor
    if made_with["media"] == "video":
        raise RequestError(f"{made_with['name']} takes videos; search it by --sample")
    resolved = resolve_recorded(made_with, weights=weights)
    refuse_other_revision(resolved, made_with, table.facts.revision)
    return resolved
