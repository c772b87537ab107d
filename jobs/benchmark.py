"""Measure a cluster, or one machine without Ray; same arguments as `featurex benchmark`.

python jobs/benchmark.py --media photos --samples 3000
python jobs/benchmark.py --device cuda --no-ray
python jobs/benchmark.py --address auto --media s3://bucket/photos/ --scratch s3://bucket/tmp
"""

import sys

from featurex_ray.cli import cli

if __name__ == "__main__":
    cli.main(["benchmark", *sys.argv[1:]], prog_name="jobs/benchmark.py")
