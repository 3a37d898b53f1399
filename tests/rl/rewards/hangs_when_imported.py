"""Define a reward whose module never finishes importing, as one that waits for a download. Not a
test."""

import time

time.sleep(600)
