"""`python -m flexpert.hbm`: the HBM manager's process, see `daemon`."""

import sys

from flexpert.hbm.daemon import main

if __name__ == "__main__":
    sys.exit(main())
