"""`python -m cogvlm_hpe …`, which is how the deepspeed launcher starts a rank."""

import sys

from cogvlm_hpe.cli import main

sys.exit(main())
