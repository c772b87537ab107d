"""Every error that this package raises on purpose.

FeaturexError
├── RequestError                 the request is wrong; nothing was written (exit 2)
│   ├── ManifestError            a manifest that can't be read or used
│   │   └── NoManifestError      there is none, or none with samples in it
│   ├── RefusedUriError          a URI outside what this run may read
│   ├── ExtractorError           an unknown extractor, or options it doesn't take
│   ├── WeightsError             weights that are missing, altered or of another shape
│   ├── RevisionMismatchError    the output holds another extractor revision
│   ├── StoreRefusedError        a store that can't keep the write protocol's promises
│   └── TableNotFoundError       no feature table there
├── RunError                     the run failed and can be run again (exit 1)
│   ├── StoreUnavailableError    the store did not answer within the time limit
│   └── TableDamagedError        published or staged objects contradict the log
└── SampleError                  one sample can't be used; it becomes a failure row
    ├── FetchError               stage "fetch"
    ├── ProbeError               stage "probe"
    ├── DecodeError              stage "decode"
    └── ExtractError             stage "extract"
"""

from typing import ClassVar, Literal

Stage = Literal["fetch", "probe", "decode", "extract"]


class FeaturexError(Exception):
    """Base of all errors raised on purpose by featurex-ray."""


class RequestError(FeaturexError):
    """The request is wrong; nothing was written."""


class ManifestError(RequestError):
    """A manifest that can't be read or used."""


class NoManifestError(ManifestError):
    """There is no manifest at the given place, or none with samples in it."""


class RefusedUriError(RequestError):
    """A URI outside what this run may read."""


class ExtractorError(RequestError):
    """An unknown extractor, or options that it doesn't take."""


class WeightsError(RequestError):
    """Weights that are missing, altered or of another shape."""


class RevisionMismatchError(RequestError):
    """The output holds another extractor revision."""


class StoreRefusedError(RequestError):
    """A store that can't keep the promises of the write protocol."""


class TableNotFoundError(RequestError):
    """No feature table lies at the given place."""


class RunError(FeaturexError):
    """The run failed and can be run again."""


class StoreUnavailableError(RunError):
    """The store did not answer within the time limit."""


class TableDamagedError(RunError):
    """Published or staged objects contradict the table's log."""


class ReplacedError(TableDamagedError):
    """An object was replaced while it was read: whoever reads it again sees the next one whole."""


class SampleError(FeaturexError):
    """One sample can't be used; it becomes a row of the failures table.

    Args:
        code: Stable, machine-readable, such as `not_found` or `truncated`.
        message: What is wrong and, where there is one, the option that helps.
        attempts: How often it was tried.
    """

    stage: ClassVar[Stage]

    def __init__(self, code: str, message: str, *, attempts: int = 1) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.attempts = attempts

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.code, self.message, self.attempts)


def _rebuild(kind: type[SampleError], code: str, message: str, attempts: int) -> SampleError:
    return kind(code, message, attempts=attempts)


class FetchError(SampleError):
    """The media could not be read from where it lies."""

    stage = "fetch"


class ProbeError(SampleError):
    """The media's header could not be understood."""

    stage = "probe"


class DecodeError(SampleError):
    """The media could not be decoded."""

    stage = "decode"


class ExtractError(SampleError):
    """The extractor could not embed the frames."""

    stage = "extract"
