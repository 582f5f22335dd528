"""`python -m tinybert_jax` is the `tinybert` command."""

import sys

from tinybert_jax.cli import main

sys.exit(main())
