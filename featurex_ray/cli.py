"""The command line: thin doors to the library, one function a command."""

import csv
import dataclasses
import json
import logging
import re
import signal
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from featurex_ray.console import print_rows
from featurex_ray.errors import FeaturexError, RequestError
from featurex_ray.job import ExtractionJob, option_fields

if TYPE_CHECKING:
    import pyarrow as pa

    from featurex_ray.benchmark.measure import Benchmark
    from featurex_ray.benchmark.sweep import Axis, Sweep
    from featurex_ray.pipeline.report import RunReport

EXIT_FAILED = 1
EXIT_REQUEST = 2
EXIT_TOO_MANY_FAILURES = 3

PEERS = ("dataloader", "ray-data")

GROUP_TITLES = {
    "data": "Data",
    "model": "Model",
    "video": "Video",
    "safety": "Safety",
    "scale": "Scale",
    "training": "Training",
}


class FeaturexCommand(click.Command):
    """A command whose help shows options in the job's groups, and whose errors are one message."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, grouped as the job's fields are."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(param, "group", "Options"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM (`ray job stop`, a scheduler, a node that is drained) ends a command as Ctrl-C does."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class FeaturexGroup(click.Group):
    """Turns the package's errors into exit codes: 2 for a wrong request, 1 for a failed run."""

    command_class = FeaturexCommand

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; errors raised on purpose become one message and an exit code."""
        try:
            with stopped_by_sigterm():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("featurex: stopped; what is done is kept, run it again to go on", err=True)
            ctx.exit(EXIT_FAILED)
        except RequestError as error:
            click.echo(f"featurex: {error}", err=True)
            ctx.exit(EXIT_REQUEST)
        except FeaturexError as error:
            click.echo(f"featurex: {error}", err=True)
            ctx.exit(EXIT_FAILED)


class JobOption(click.Option):
    """A click option made from a field of the job."""

    def __init__(self, *args: Any, group: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = GROUP_TITLES[group]


def job_option(field: "dataclasses.Field[Any]", job: type = ExtractionJob) -> JobOption:
    """The command line option of one of a job's fields."""
    kind, choices = _option_type(field, job)
    # A tuple, or a value or a tuple: the hint says so.
    multiple = "tuple" in str(typing.get_type_hints(job)[field.name])
    required = field.default is dataclasses.MISSING
    return JobOption(
        ["--" + field.name.replace("_", "-"), field.name],
        group=field.metadata["group"],
        help=field.metadata["help"],
        metavar=field.metadata["metavar"],
        type=click.Choice(choices) if choices else kind,
        is_flag=kind is bool,
        multiple=multiple,
        required=required,
        default=None if required or multiple else field.default,
        show_default=not required and not multiple and field.default is not None,
    )


def _option_type(field: "dataclasses.Field[Any]", job: type) -> tuple[type, list[str]]:
    hint = typing.get_type_hints(job)[field.name]
    if typing.get_origin(hint) is typing.Literal:
        return str, list(typing.get_args(hint))
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    plain = [m for m in members if m in (bool, int, float)]
    return (plain[0] if plain else str), []


class _ConfigLoader(yaml.SafeLoader):
    """YAML as people mean it: to YAML 1.1 a pool of `2:8` is a number to base 60, and `010` is eight."""


_ConfigLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if not tag.endswith((":int", ":float"))]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_ConfigLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789")
)
_ConfigLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


def read_config(ctx: click.Context, _param: click.Parameter, path: str | None) -> str | None:
    """Take a YAML file's values as the defaults of this command; flags win."""
    if path is None:
        return None
    try:
        values = yaml.load(Path(path).read_text(), _ConfigLoader)  # noqa: S506  it is a safe one
    except (OSError, yaml.YAMLError) as error:
        raise RequestError(f"--config {path}: {error}") from error
    if not isinstance(values, Mapping):
        raise RequestError(f"--config {path}: give options as NAME: VALUE lines")
    known = {
        name.lstrip("-").replace("-", "_"): param.name
        for param in ctx.command.params
        for name in [*param.opts, *param.secondary_opts]
    }
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    if unknown := sorted(set(values) - set(known)):
        raise RequestError(f"--config {path}: unknown options {', '.join(unknown)}")
    several = {param.name for param in ctx.command.params if getattr(param, "multiple", False)}
    named = {known[name]: value for name, value in values.items()}
    ctx.default_map = {
        name: [value] if name in several and isinstance(value, str) else value
        for name, value in named.items()
    }
    return path


def with_job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of a job: `MANIFEST`, `--config` and every field's."""
    return _with_options_of(ExtractionJob, command)


def with_training_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of a training."""
    from featurex_ray.training.job import TrainingJob

    return _with_options_of(TrainingJob, command)


def _with_options_of(job: type, command: Callable[..., Any]) -> Callable[..., Any]:
    for field in reversed(dataclasses.fields(job)):
        if field.name != "manifest":
            click.decorators._param_memo(command, job_option(field, job))
    config = click.option(
        "--config",
        metavar="FILE.yaml",
        is_eager=True,
        expose_value=False,
        callback=read_config,
        help="Read options from a YAML file, same names; flags win.",
    )
    return config(command)


def job_from(manifest: str, options: dict[str, Any]) -> ExtractionJob:
    """The job that a command line describes."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list | tuple) else value for name, value in options.items()
    }
    return ExtractionJob(manifest=manifest, **values)


@click.group(
    cls=FeaturexGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(package_name="featurex-ray")
def cli() -> None:
    """Turn archives of images and videos into feature tables.

    A manifest names the media; an extractor makes one feature row per clip; the table is plain
    Parquet, partitioned by dataset, that DuckDB, Spark, Trino, pandas and polars read as it is.

    Start with `featurex demo`, then `featurex manifest` and `featurex extract`.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # So that `my_module:MyExtractor` is found where one works; last, so that it hides no package.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)


@cli.command()
@click.option(
    "--keep", metavar="DIR", help="Keep what the demo's object store holds, as a local copy in DIR."
)
def demo(keep: str | None) -> None:
    """Run the whole thing on bundled media and an embedded S3 server, and show the result."""
    from featurex_ray.demo.walkthrough import run_demo

    run_demo(keep=keep)


@cli.command()
@click.argument("source")
@click.option(
    "--output", required=True, metavar="URI", help="Manifest to write: .parquet, .csv, .jsonl (.gz too)."
)
@click.option("--dataset", metavar="NAME", help="Value of the dataset column. Default: SOURCE's last part.")
@click.option(
    "--labels/--no-labels", default=None, help="Sub-folders are labels. Default: where there are any."
)
def manifest(source: str, output: str, dataset: str | None, labels: bool | None) -> None:
    """List SOURCE (a prefix, or a tree of image folders) into a manifest."""
    from featurex_ray.manifest import build_manifest

    counts = build_manifest(source, output, dataset=dataset, labels=labels)
    click.echo("\n".join(counts.lines()))


@cli.command()
@click.argument("manifest")
@with_job_options
@click.option(
    "--prune",
    is_flag=True,
    help="Remove samples that the manifest doesn't name any more, of the datasets that it names.",
)
@click.option(
    "--dry-run", is_flag=True, help="Print what would be done (new, changed, done, refused); write nothing."
)
def extract(manifest: str, prune: bool, dry_run: bool, **options: Any) -> None:
    """Extract features from the media that MANIFEST names, into one table per extractor.

    \b
    featurex extract photos.parquet --output s3://bucket/features --extractor torchvision/resnet18
    featurex extract 's3://b/manifests/*.parquet' --output s3://b/features --extractor cnn_lstm \\
        --sampling uniform:16 --clip-seconds 10

    Running it again does only what is not done yet. Exit codes: 0 done; 1 failed, run it again;
    2 the request was wrong, nothing was written; 3 done, but too many samples failed.
    """
    from featurex_ray.pipeline.progress import console_progress
    from featurex_ray.pipeline.run import plan_only, run

    job = job_from(manifest, options)
    if dry_run:
        click.echo("\n".join(plan_only(job, prune=prune)))
        return
    sys.exit(show(run(job, progress=console_progress(), prune=prune), job.max_failure_rate))


def show(report: "RunReport", max_failure_rate: float) -> int:
    """Print a run's report; the exit code that says how it went."""
    from featurex_ray.pipeline.report import report_lines

    click.echo("\n".join(report_lines(report)))
    if report.failure_rate > max_failure_rate:
        click.echo(
            f"featurex: {report.failure_rate:.1%} of the samples failed, "
            f"--max-failure-rate is {max_failure_rate:.1%}",
            err=True,
        )
        return EXIT_TOO_MANY_FAILURES
    return 0


@cli.command()
@click.argument("manifest")
@with_training_options
def train(manifest: str, **options: Any) -> None:
    """Train an extractor on the labelled media that MANIFEST names.

    \b
    featurex train photos.parquet --output trained --mode head-only \\
        --extractor attention_cnn,backbone=resnet18
    featurex extract other.parquet --output features --extractor attention_cnn,backbone=resnet18 \\
        --weights trained/weights.safetensors

    Killed and started again with --resume, it goes on from its last epoch. Exit codes: 0 done;
    1 failed or diverged, the weights of the last good epoch are kept; 2 the request was wrong.
    """
    from featurex_ray.pipeline.progress import console_progress
    from featurex_ray.training.job import TrainingJob
    from featurex_ray.training.run import train as run_training

    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in options.items()
    }
    report = run_training(TrainingJob(manifest=manifest, **values), say=console_progress().say)
    click.echo(f"weights {report.weights}")
    for name, value in report.card["metrics"].items():
        if name.endswith(("_accuracy", "_loss")):
            click.echo(f"  {name.replace('_', ' ')}: {value:.4f}")


@cli.command()
@click.option(
    "--manifests",
    required=True,
    metavar="TEMPLATE",
    help="Each day's manifest: {date} stands for 2026-01-31, or {year}, {month} and {day}.",
)
@click.option("--from", "first", metavar="DATE", help="First day.")
@click.option("--to", "last", metavar="DATE", help="Last day.")
@click.option(
    "--last", "recent", metavar="DAYS", help="Instead: the last days up to today (UTC), such as 3d."
)
@click.option(
    "--require-all", is_flag=True, help="A day without a manifest is an error; else it is reported."
)
@click.option(
    "--budget", metavar="N|TIME", help="Stop after so many samples, or about such a time: 20000, 6h, 90m."
)
@with_job_options
@click.option("--dry-run", is_flag=True, help="Print what would be done; write nothing.")
def backfill(
    manifests: str,
    first: str | None,
    last: str | None,
    recent: str | None,
    require_all: bool,
    budget: str | None,
    dry_run: bool,
    **options: Any,
) -> None:
    """The nightly job: extract what a range of days brought. Safe to repeat, to overlap and to kill.

    \b
    featurex backfill --manifests 's3://b/manifests/dt={date}/*.parquet' --last 3d \\
        --output s3://b/features --extractor torchvision/resnet18

    A sample that several days name is done once, as its latest day has it. Exit codes: 0 done, or
    stopped by --budget; 1 failed, run it again; 2 the request was wrong, nothing was written; 3 done,
    but too many samples failed.
    """
    from featurex_ray.pipeline.agenda import Budget
    from featurex_ray.pipeline.backfill import Days, listed, prepare_days
    from featurex_ray.pipeline.backfill import backfill as run_days
    from featurex_ray.pipeline.progress import console_progress
    from featurex_ray.pipeline.tables import preview

    days, limit = Days.parse(first, last, recent), Budget.parse(budget) if budget else None
    job = job_from(manifests, options)
    if dry_run:
        request, merged = prepare_days(job, days, require_all=require_all)
        missing = [f"no manifest for {listed(merged.missing)}"] if merged.missing else []
        click.echo("\n".join([*preview(request), *missing]))
        return
    report = run_days(job, days, require_all=require_all, budget=limit, progress=console_progress())
    sys.exit(show(report, job.max_failure_rate))


RETRY_OPTIONS = (
    "batch_size",
    "allow_prefix",
    "only_prefix",
    "isolation",
    "decode_seconds",
    "decode_memory",
    "partial",
    "max_pixels",
    "max_media_seconds",
    "max_media_frames",
    "max_streams",
    "max_ratio",
    "max_failure_rate",
    "max_samples_per_plan",
    "decode_actors",
    "extract_actors",
    "gpus_per_extract_actor",
    "address",
    "max_resources",
)
"""What changes no feature; all else is as the table recorded it."""


def with_retry_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command those options of a job that a retry may choose."""
    for field in reversed(option_fields()):
        if field.name in RETRY_OPTIONS:
            click.decorators._param_memo(command, job_option(field))
    return command


@cli.command()
@click.argument("table")
@click.option("--code", metavar="CODES", help="Only failures of these codes: timeout,unavailable.")
@click.option("--dataset", metavar="NAME", help="Only of this dataset.")
@click.option("--weights", metavar="URI", help="The extractor's weights, if they lie elsewhere by now.")
@with_retry_options
def retry(table: str, code: str | None, dataset: str | None, weights: str | None, **options: Any) -> None:
    """Do the failed samples of TABLE again; what succeeds leaves the failures.

    \b
    featurex retry s3://bucket/features/cnn_lstm --code timeout,unavailable

    Manifest rows, extractor and sampling are those that the table recorded. Where its media lie in
    other buckets than the table, name them with --allow-prefix. Exit codes as of extract; also 2 where
    some of them may not be read: the others are done then.
    """
    from featurex_ray.pipeline.progress import console_progress
    from featurex_ray.pipeline.retry import retry as run_retry

    chosen = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    codes = [part.strip() for part in (code or "").split(",") if part.strip()]
    report = run_retry(
        table, codes=codes, dataset=dataset, weights=weights, progress=console_progress(), **chosen
    )
    sys.exit(show(report, options["max_failure_rate"]))


@cli.command()
@click.option(
    "--media",
    metavar="URI",
    help="Folder or prefix of media to measure on, or a Parquet manifest. Default: bundled images.",
)
@click.option(
    "--extractor",
    "extractors",
    multiple=True,
    default=["torchvision/resnet18"],
    show_default=True,
    metavar="NAME",
    help="Several share decoding.",
)
@click.option(
    "--weights", multiple=True, metavar="URI", help="As for extract. Default: seeded, as fast as any."
)
@click.option("--sampling", metavar="RULE", help="Frames of a video. Default: the extractor's own.")
@click.option("--samples", default=1000, show_default=True, help="Samples of the large run.")
@click.option("--repeats", default=1, show_default=True, help="Of every run; medians are shown.")
@click.option(
    "--compare",
    is_flag=False,
    flag_value="all",
    type=click.Choice(["all", *PEERS]),
    help="Also run a torch DataLoader loop, and Ray Data as its docs show; or only one of them.",
)
@click.option(
    "--latency-ms", default=0.0, metavar="MS", help="Also run from an S3 server that adds this to each GET."
)
@click.option(
    "--precision", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), default="auto", show_default=True
)
@click.option("--batch-size", type=int, help="Frames per device batch. Default: what suits the device.")
@click.option("--device", metavar="DEVICE", help="Such as cuda. Default: a GPU where there is one.")
@click.option("--address", metavar="ADDRESS", help="Of a Ray cluster. Default: a local one for each run.")
@click.option(
    "--scratch",
    metavar="URI",
    help="Where manifests and tables of the runs lie until the end: on a cluster of several hosts a prefix "
    "such as s3://bucket/tmp. Default: a local folder.",
)
@click.option("--ray/--no-ray", "with_ray", default=True, help="Whole runs too, or the stages alone.")
@click.option(
    "--sweep",
    "axis",
    type=click.Choice(["samples", "length", "size", "actors"]),
    help="Measure how cost grows with this instead; length and size make their own media.",
)
@click.option("--plot", metavar="FILE.png", help="Draw how busy the stages were over time, or the sweep.")
@click.option("--json", "path", metavar="FILE", help="Write all figures there as well.")
def benchmark(
    path: str | None,
    plot: str | None,
    media: str | None,
    axis: "Axis | None",
    compare: str | None,
    **options: Any,
) -> None:
    """Measure this machine: each stage alone, the bound they imply, and runs against it.

    \b
    featurex benchmark --media s3://bucket/photos/ --samples 3000 --compare --plot occupancy.png

    Every run is timed twice, over a quarter of the samples and over all of them: what the longer one
    took more gives the rate, the rest is start-up.
    """
    from featurex_ray.benchmark import measure
    from featurex_ray.demo import MEDIA

    _refuse_no_folder(path, plot)
    peers = PEERS if compare == "all" else [compare] if compare else []
    settings = measure.Settings(media=media or str(MEDIA / "images"), compare=peers, **options)
    if axis:
        found: Benchmark | Sweep = measure.measure_growth(settings, axis, _say)
    else:
        found = measure.benchmark(settings, _say)
    click.echo("\n".join(found.lines()))
    if path:
        Path(path).write_text(json.dumps(found.to_json(), indent=1))
    if plot and (picture := found.plot()):
        Path(plot).write_bytes(picture)


@cli.command()
@click.argument("table")
@click.option("--manifest", metavar="URI", help="Also check that each of this manifest's samples is there.")
@click.option("--dataset", metavar="NAME", help="As given to extract, where the manifest has no such column.")
@click.option("--allow-prefix", multiple=True, metavar="URI", help="As given to extract.")
@click.option("--deep", is_flag=True, help="Also extract some samples again, and compare.")
@click.option("--samples", default=20, show_default=True, help="How many, with --deep.")
@click.option("--seed", type=int, help="Choose the same samples again, with --deep.")
@click.option("--weights", metavar="URI", help="The extractor's weights, if they lie elsewhere by now.")
def verify(
    table: str,
    manifest: str | None,
    dataset: str | None,
    allow_prefix: tuple[str, ...],
    deep: bool,
    samples: int,
    seed: int | None,
    weights: str | None,
) -> None:
    """Prove the accounting of TABLE: each sample once, in features or failures, whole."""
    from featurex_ray.storage import ReadPolicy
    from featurex_ray.table.read import open_table
    from featurex_ray.table.verify import verify_table

    report = verify_table(table, manifest=manifest, dataset=dataset, allow_prefixes=allow_prefix)
    if deep:
        from featurex_ray.pipeline.deep import verify_deep

        policy = ReadPolicy(manifest or table, allow_prefixes=allow_prefix)
        verify_deep(open_table(table), report, policy=policy, num_samples=samples, seed=seed, weights=weights)
    click.echo("\n".join(report.lines()))
    sys.exit(0 if report.ok else EXIT_FAILED)


@cli.command()
@click.argument("uri")
@click.option(
    "--address", metavar="ADDRESS", help="Ray cluster. Default: $RAY_ADDRESS, or this machine alone."
)
def doctor(uri: str, address: str | None) -> None:
    """Test a store (URI, an output's root) and a cluster for what a run needs; say what is missing.

    Exit codes: 0 nothing is missing; 1 something is; 2 no table can be written to such a URI.
    """
    from featurex_ray.pipeline.doctor import examine, raise_if_failed

    checks = []
    for check in examine(uri, address=address):
        click.echo(check.line())
        checks.append(check)
    raise_if_failed(checks)


@cli.command("export-delta")
@click.argument("table")
def export_delta(table: str) -> None:
    """Write a Delta log over TABLE, for readers who want snapshots; the data stays where it is.

    Each call adds one version with what is new. Needs the package deltalake.
    """
    from featurex_ray.table.delta import export_delta as export
    from featurex_ray.table.read import open_table

    uri, version, num_objects = export(open_table(table))
    click.echo(f"{uri}: Delta version {version}, {num_objects:,} objects")


@cli.command()
@click.argument("output")
@click.option("--runs", default=20, show_default=True, help="How many past runs to show, the latest first.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def status(output: str, runs: int, as_json: bool) -> None:
    """Show what runs did to the tables below OUTPUT, and what is still open; needs no cluster."""
    from featurex_ray.table.status import status_of

    found = dataclasses.asdict(status_of(output, most_runs=runs))
    if as_json:
        click.echo(json.dumps(found))
        return
    print_rows(found["open_plans"], title="open plans")
    print_rows(found["runs"], title="past runs")


@cli.command()
@click.option("--weights", metavar="URI", help="Show what is said of these weights instead: their card.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def extractors(weights: str | None, as_json: bool) -> None:
    """List the extractors: name, media, dimension, input, weights."""
    from featurex_ray.models.registry import list_extractors

    if weights is not None:
        _show_card(weights, as_json=as_json)
        return
    rows = list_extractors()
    if as_json:
        click.echo("\n".join(json.dumps(dataclasses.asdict(row)) for row in rows))
        return
    print_rows([dataclasses.asdict(row) for row in rows])


def _show_card(weights: str, *, as_json: bool) -> None:
    from featurex_ray.models.weights import read_card

    card = read_card(weights)
    click.echo(json.dumps(card) if as_json else yaml.safe_dump(card, sort_keys=False, width=100).rstrip())


@cli.command("convert-weights")
@click.argument("source")
@click.argument("output")
@click.option(
    "--key", metavar="NAME", help="Where in the file the tensors are. Default: state_dict, model, ..."
)
def convert_weights(source: str, output: str, key: str | None) -> None:
    """Convert a pickled state dict (.pt, .pth) to safetensors, in a process that can do nothing else."""
    from featurex_ray.models.convert import convert_weights as convert

    made = convert(source, output, key=key)
    click.echo(f"{made.num_tensors} tensors; pinned: --weights {made.uri}#sha256={made.sha256}")


with_format = click.option(
    "--format", "form", type=click.Choice(["table", "csv", "json"]), default="table", show_default=True
)


@cli.command()
@click.argument("table")
@click.argument("sql")
@with_format
def query(table: str, sql: str, form: str) -> None:
    """Run SQL over TABLE with DuckDB; it is `features` there, its failures are `failures`.

    \b
    featurex query s3://bucket/features/cnn_lstm 'SELECT dataset, count(*) FROM features GROUP BY ALL'
    """
    from featurex_ray.table.read import open_table

    _print_as(form, open_table(table).query(sql))


def _print_as(form: str, result: "pa.Table") -> None:
    if form == "csv":
        rows = csv.writer(sys.stdout, lineterminator="\n")
        rows.writerow(result.column_names)
        for row in result.to_pylist():
            rows.writerow([_csv_cell(value) for value in row.values()])
    elif form == "json":
        click.echo("\n".join(json.dumps(row, default=str) for row in result.to_pylist()))
    else:
        print_rows(result.to_pylist())


def _say(line: str) -> None:
    """What is being done; results alone are on stdout."""
    click.echo(line, err=True)


def _refuse_no_folder(*files: str | None) -> None:
    """Before work whose results would have nowhere to go."""
    for file in files:
        if file is not None and not Path(file).absolute().parent.is_dir():
            raise RequestError(f"there is no folder {str(Path(file).absolute().parent)!r} for {file!r}")


def _csv_cell(value: Any) -> Any:
    """Lists and structs as JSON, whole, whatever their length."""
    return json.dumps(value, default=str) if isinstance(value, list | dict) else value


@cli.command()
@click.argument("table")
@click.option("--sample", metavar="ID", help="Look for neighbours of this sample of the table.")
@click.option("--image", metavar="FILE", help="Look for neighbours of this image (a path or URI).")
@click.option("--dataset", metavar="NAME", help="The sample's dataset, where several have one of that name.")
@click.option("--weights", metavar="URI", help="The extractor's weights, if they lie elsewhere by now.")
@click.option("-k", default=10, show_default=True, help="How many neighbours.")
@with_format
def search(
    table: str,
    sample: str | None,
    image: str | None,
    dataset: str | None,
    weights: str | None,
    k: int,
    form: str,
) -> None:
    """Find the nearest neighbours of a sample, or of an image, by cosine similarity."""
    from featurex_ray.table.read import open_table

    if (sample is None) == (image is None):
        raise RequestError("give either --sample ID or --image FILE")
    if image is not None and dataset is not None:
        raise RequestError("--dataset says which --sample is meant; with --image all datasets are searched")
    opened = open_table(table)
    if image is None:
        found = opened.search(sample_id=sample, dataset=dataset, k=k)
    else:
        from featurex_ray.search import search_image

        found = search_image(opened, image, k=k, weights=weights)
    _print_as(form, found)


@cli.command()
@click.argument("table")
@click.option(
    "--labels", default="label", show_default=True, metavar="COLUMN", help="What a clip shows, in the table."
)
@click.option("--train-dataset", metavar="NAME", help="Learn, and look for neighbours, in this dataset.")
@click.option("--test-dataset", metavar="NAME", help="Ask about the clips of this one. Default: five folds.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def evaluate(
    table: str, labels: str, train_dataset: str | None, test_dataset: str | None, as_json: bool
) -> None:
    """Measure the features of TABLE by its labels: linear probe, k-NN, recall, mAP."""
    from featurex_ray.evaluate import evaluate as measure
    from featurex_ray.evaluate import read_labelled
    from featurex_ray.table.read import open_table

    _say("reading features")
    labelled = read_labelled(open_table(table), labels=labels)
    found = measure(labelled, train=train_dataset, test=test_dataset, say=_say)
    click.echo(json.dumps(dataclasses.asdict(found)) if as_json else "\n".join(found.lines()))


@cli.command()
@click.option("--image", metavar="FILE", help="An image, path or URI.")
@click.option("--video", metavar="FILE", help="Or a video.")
@click.option("--extractor", required=True, metavar="NAME", help="One with attention.")
@click.option("--weights", metavar="URI", help="As for extract.")
@click.option("--sampling", metavar="RULE", help="Frames of the video. Default: the extractor's own.")
@click.option("--output", required=True, metavar="FILE.png", help="Picture to write.")
def attend(
    image: str | None,
    video: str | None,
    extractor: str,
    weights: str | None,
    sampling: str | None,
    output: str,
) -> None:
    """Draw where an extractor looks: over an image's cells, or at which frames of a video."""
    from featurex_ray.attend import attend_image, attend_video, draw
    from featurex_ray.models.registry import resolve

    if (image is None) == (video is None):
        raise RequestError("give either --image FILE or --video FILE")
    _refuse_no_folder(output)
    resolved = resolve(extractor, weights=weights)
    seen = attend_image(resolved, image) if image else attend_video(resolved, str(video), sampling=sampling)
    Path(output).write_bytes(draw(seen))


def main() -> None:
    """Entry point of the `featurex` command."""
    cli()


if __name__ == "__main__":
    main()
