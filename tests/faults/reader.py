"""A reader of table `t`'s plain files, as a program: `python -c READER folder stop most [pause]`."""

READER = """
import json, sys, time
import duckdb, pyarrow.dataset as pads
folder, stop, most = sys.argv[1], sys.argv[2], int(sys.argv[3])
pause = float(sys.argv[4]) if len(sys.argv) > 4 else 0.0
from pathlib import Path
counts = {"duckdb": 0, "pyarrow": 0, "duplicates": 0, "halves": 0, "errors": 0}
glob = f"{folder}/t/**/*.parquet"
while not Path(stop).exists() and counts["duckdb"] + counts["pyarrow"] < most:
    time.sleep(pause)
    which = "duckdb" if counts["duckdb"] <= counts["pyarrow"] else "pyarrow"
    counts[which] += 1
    is_empty = not any(Path(folder, "t").rglob("*.parquet"))
    try:
        if which == "duckdb":
            rows = duckdb.sql(f"SELECT sample_id, clip_index, num_clips FROM '{glob}'").fetchall()
        else:
            table = pads.dataset(f"{folder}/t", format="parquet", partitioning="hive").to_table(
                columns=["sample_id", "clip_index", "num_clips"])
            rows = list(zip(*(column.to_pylist() for column in table.columns)))
    except Exception as error:
        if not is_empty:  # of no files neither can say which columns they have
            counts["errors"] += 1
            counts["last error"] = str(error)[:200]
        continue
    counts["duplicates"] += len(rows) != len(set(rows))
    clips = {}
    for name, clip, total in rows:
        clips.setdefault((name, total), set()).add(clip)
    counts["halves"] += any(len(found) != total for (_, total), found in clips.items())
print(json.dumps(counts))
"""
