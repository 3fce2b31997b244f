"""`python -m launcher` is `hpe-launch`."""

import sys

from launcher.cli import main

sys.exit(main())
