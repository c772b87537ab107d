"""The nightly job, to schedule on a Ray cluster; same arguments as `featurex backfill`.

ray job submit --working-dir . -- python jobs/backfill.py --last 3d \
    --manifests 's3://bucket/manifests/dt={date}/*.parquet' \
    --output s3://bucket/features --extractor torchvision/resnet18
"""

import sys

from featurex_ray.cli import cli

if __name__ == "__main__":
    cli.main(["backfill", *sys.argv[1:]], prog_name="jobs/backfill.py")
