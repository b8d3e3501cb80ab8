"""`python -m mlxvlm` is the `mlxvlm` command."""

import sys

from mlxvlm.cli import main

sys.exit(main())
