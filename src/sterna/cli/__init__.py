"""The `sterna` command."""

import gc

# What a start makes, all of it stays: looking through it for garbage takes a tenth of the time to the first answer.
gc.set_threshold(50_000)
