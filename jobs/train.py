"""Train an extractor, to submit to a Ray cluster; same arguments as `featurex train`.

ray job submit --working-dir . -- python jobs/train.py s3://bucket/manifest.parquet \
    --config jobs/recipes/attention_convnet-cifar10.yaml --output s3://bucket/trained
"""

import sys

from featurex_ray.cli import cli

if __name__ == "__main__":
    cli.main(["train", *sys.argv[1:]], prog_name="jobs/train.py")
