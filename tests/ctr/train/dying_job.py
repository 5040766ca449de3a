"""`torchrun … dying_job.py FILE arguments…`: scripts/train.py, of which a rank is killed while it writes FILE."""

import os
import sys

from tests.ctr.train.warm_ranks import _die

if __name__ == "__main__":
    _die(sys.argv.pop(1))
    sys.argv[0] = "scripts/train.py"
    from tessera.scripts.train import main

    status = main()
    sys.stdout.flush()
    os._exit(status)
