"""`python -m blip3o_jax`: the same as the `blip3o` command."""

import sys

from blip3o_jax.cli import main

if __name__ == "__main__":  # worker processes import this module; only the parent runs the command
    sys.exit(main())
