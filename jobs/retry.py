"""The failed samples again, on a Ray cluster; same arguments as `featurex retry`.

ray job submit --working-dir . -- python jobs/retry.py s3://bucket/features/cnn_lstm --code timeout
"""

import sys

from featurex_ray.cli import cli

if __name__ == "__main__":
    cli.main(["retry", *sys.argv[1:]], prog_name="jobs/retry.py")
