"""Define a reward whose module ends the process, as a broken native library does. Not a test."""

import os

os._exit(7)
