"""`torchrun … dying_job.py FILE arguments…`: scripts/train.py, of which a rank is killed while it writes FILE."""

import os
import sys

from tessera.distributed import process
from tests.ctr.train.warm_ranks import _die

if __name__ == "__main__":
    _die(sys.argv.pop(1))
    sys.argv[0] = "scripts/train.py"
    from tessera.scripts import train

    status = process.run(train.load, train.train)
    sys.stdout.flush()
    os._exit(status)
