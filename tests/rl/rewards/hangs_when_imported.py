"""A reward whose module never comes back, as one that waits for a download does. Not a test."""

import time

time.sleep(600)
