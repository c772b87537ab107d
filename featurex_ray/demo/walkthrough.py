"""What `featurex demo` does and shows, step by step."""

import time
from pathlib import Path

import click
import fsspec

from featurex_ray.console import print_rows
from featurex_ray.demo import MEDIA
from featurex_ray.demo.server import s3_server
from featurex_ray.job import ExtractionJob
from featurex_ray.manifest import build_manifest
from featurex_ray.pipeline.progress import console_progress
from featurex_ray.pipeline.report import RunReport, report_lines
from featurex_ray.pipeline.run import run
from featurex_ray.table.read import open_table

BUCKET = "s3://featurex-demo"
OUTPUT = f"{BUCKET}/features"

IMAGES_SQL = """
    SELECT sample_id, width, height, feature, attention FROM features ORDER BY sample_id
"""
VIDEOS_SQL = """
    SELECT sample_id, clip_index || '/' || num_clips AS clip, start_seconds, end_seconds,
        frame_pts_seconds, feature
    FROM features ORDER BY sample_id, clip_index
"""
FAILURES_SQL = "SELECT sample_id, stage, error, message FROM failures ORDER BY sample_id"


def run_demo(*, keep: str | None) -> None:
    """Serve, upload, list, extract, query.

    Args:
        keep: A directory to copy everything into that the demo's object store holds.
    """
    started = time.monotonic()
    with s3_server() as endpoint:
        _step(f"An S3 server of the demo's own at {endpoint}; it stops with the demo")
        num_files, num_bytes = _upload()
        _step(f"{num_files} bundled media files ({num_bytes / 1e6:.1f} MB) are at {BUCKET}/media/")
        images = _extract("images", "attention_convnet", dataset="photos")
        videos = _extract("videos", "cnn_lstm", dataset="clips", sampling="uniform:16", clip_seconds=5.0)
        _show("attention_convnet", "Images: one row each", IMAGES_SQL)
        _show("cnn_lstm", "Videos: one row for each window of 5 s", VIDEOS_SQL)
        _show_neighbours()
        _show_places(images, videos)
        if keep:
            _keep(keep)
    _step(f"Done in {time.monotonic() - started:.0f} s. {_next_steps(keep)}")


def _step(text: str) -> None:
    click.secho(f"\n> {text}", bold=True)


def _upload() -> tuple[int, int]:
    store = fsspec.filesystem("s3")
    store.mkdir(BUCKET)
    store.put(str(MEDIA / "images"), f"{BUCKET}/media/", recursive=True)
    store.put(str(MEDIA / "videos"), f"{BUCKET}/media/", recursive=True)
    sizes = [entry["size"] for entry in store.find(f"{BUCKET}/media", detail=True).values()]
    return len(sizes), sum(sizes)


def _extract(
    folder: str,
    extractor: str,
    *,
    dataset: str,
    sampling: str | None = None,
    clip_seconds: float | None = None,
) -> RunReport:
    manifest = f"{BUCKET}/manifests/{folder}.parquet"
    built = build_manifest(f"{BUCKET}/media/{folder}", manifest, dataset=dataset)
    _step(f"featurex manifest {BUCKET}/media/{folder} --output {manifest} --dataset {dataset}")
    click.echo("\n".join(built.lines()))
    job = ExtractionJob(
        manifest=manifest,
        output=OUTPUT,
        extractor=extractor,
        sampling=sampling,
        clip_seconds=clip_seconds,
    )
    options = f" --sampling {sampling} --clip-seconds {clip_seconds:g}" if clip_seconds else ""
    _step(f"featurex extract {manifest} --output {OUTPUT} --extractor {extractor}{options}")
    report = run(job, progress=console_progress())
    click.echo("\n".join(report_lines(report)))
    return report


def _show(table: str, title: str, sql: str) -> None:
    opened = open_table(f"{OUTPUT}/{table}")
    _step(f'featurex query {OUTPUT}/{table} "{" ".join(sql.split())}"')
    print_rows(opened.query(sql).to_pylist(), title=title)
    print_rows(opened.query(FAILURES_SQL).to_pylist(), title="What could not be used, and why")


def _show_neighbours() -> None:
    sample = "chelsea.jpg"
    _step(f"featurex search {OUTPUT}/attention_convnet --sample {sample} -k 3")
    found = open_table(f"{OUTPUT}/attention_convnet").search(sample_id=sample, k=3)
    print_rows(
        found.select(["similarity", "sample_id", "uri"]).to_pylist(),
        title="Nearest neighbours of chelsea.jpg, by cosine",
    )


def _show_places(*reports: RunReport) -> None:
    _step("Where things lie")
    for table in (table for report in reports for table in report.tables):
        for key in table.objects:
            click.echo(f"  features   {OUTPUT}/{key}")
    click.echo(f"  failures   {OUTPUT}/<table>.failures/dataset=<dataset>/<plan>.parquet")
    click.echo(f"  reports    {OUTPUT}/_featurex/<table>/runs/<run>.json")


def _keep(directory: str) -> None:
    target = Path(directory).absolute()
    target.mkdir(parents=True, exist_ok=True)
    fsspec.filesystem("s3").get(f"{BUCKET}/", f"{target}/", recursive=True)
    _step(f"A copy of the whole bucket is in {target}")


def _next_steps(keep: str | None) -> str:
    if keep:
        return f"Query it again: featurex query {Path(keep).absolute()}/features/cnn_lstm 'FROM features'"
    return "Keep the tables with --keep DIR; then: featurex manifest and featurex extract on your own media."
