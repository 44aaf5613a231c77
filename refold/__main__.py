"""``python -m refold``."""

import sys

from refold.cli import main

sys.exit(main())
