"""The main job, to submit to a Ray cluster; same arguments as `featurex extract`.

ray job submit --working-dir . -- python jobs/extract.py s3://bucket/manifest.parquet \
    --output s3://bucket/features --extractor torchvision/resnet18
"""

import sys

from featurex_ray.cli import cli

if __name__ == "__main__":
    cli.main(["extract", *sys.argv[1:]], prog_name="jobs/extract.py")
