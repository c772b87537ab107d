"""From what a table recorded of its extractor back to the extractor."""

from collections.abc import Mapping
from typing import Any

from featurex_ray.errors import RevisionMismatchError, WeightsError
from featurex_ray.models.registry import NO_WEIGHTS, ResolvedExtractor, resolve

Weights = Mapping[str, Any] | str


def resolve_recorded(made_with: Mapping[str, Any], *, weights: str | None = None) -> ResolvedExtractor:
    """The extractor that made a table.

    Args:
        made_with: As in the table's facts.
        weights: Where its weights lie, if not where they lay when the table was made.

    Raises:
        ExtractorError: There is none of that name any more.
        WeightsError: What is found now has other weights.
    """
    text = extractor_text(made_with)
    recorded = made_with["weights"]
    resolved = resolve(text, weights=weights or _source(text, recorded))
    if resolved.spec.to_json()["weights"] != recorded and resolved.spec.weights.sha256 != _sha256(recorded):
        raise WeightsError(
            f"{text} has weights {resolved.spec.weights.sha256} here, "
            f"the table was made with {_sha256(recorded)}: "
            "name the right ones with --weights"
        )
    return resolved


def refuse_other_revision(resolved: ResolvedExtractor, made_with: Mapping[str, Any], revision: str) -> None:
    """Refuses an extractor that makes other features than a table's, though its weights be the same.

    Args:
        resolved: What is found now.
        made_with: As in the table's facts.
        revision: The table's.

    Raises:
        RevisionMismatchError: It has another revision here.
    """
    settings = {name: made_with[name] for name in ("sampling", "clip", "precision", "decoder")}
    here = resolved.spec.revision(**settings)
    if here != revision:
        raise RevisionMismatchError(
            f"{extractor_text(made_with)} has revision {here} here, and the table was made with {revision}: "
            "its features would be others"
        )


def extractor_text(made_with: Mapping[str, Any]) -> str:
    """Name and options, as given to `--extractor`."""
    return ",".join([made_with["name"], *(f"{key}={value}" for key, value in made_with["options"].items())])


def _sha256(weights: Weights) -> str:
    return NO_WEIGHTS if isinstance(weights, str) else str(weights["sha256"])


def _source(text: str, weights: Weights) -> str | None:
    """What to give as `weights` again: URIs as they are, nothing for weights known by a name."""
    if isinstance(weights, str):
        return None if ":" in text else weights  # one's own extractor brings what it needs
    return weights["source"] if "/" in weights["source"] else None
