"""How much of a file from outside is read: size, depth, digits, values and time, with reasons.

A file that somebody else wrote may be damaged, or made to hurt. Every reader of this package holds
to these numbers, so that a file costs at most seconds and about a gigabyte, whatever is in it.
"""

from __future__ import annotations

RUN_FILE_BYTES = 2 * 2**30
"""A run's history. A million rows of twenty numbers are 0.6 GB offline and 0.4 GB as CSV."""

CONFIG_BYTES = 256 * 2**10
"""``hparams.yaml``. PyYAML reads about 100 KB a second; real ones are below 10 KB."""

JSON_BYTES = 16 * 2**20
"""One JSON text. W&B refuses values above 1 MB; the rest is for spectra of millions of values.
Nested empty lists take twenty times their text in memory, 320 MB at this bound."""

RECORD_BYTES = 16 * 2**20
"""One record of a `.wandb` or event file. A summary of 10,000 keys is 1 MB, a picture about 0.1 MB.
Millions of empty parts take thirty times their bytes in memory, 0.5 GB at this bound."""

NUM_VALUES = 10_000_000
"""Values of one run, those inside lists counted. As Python objects they take about a gigabyte."""

TABLE_VALUES = 100_000_000
"""Rows times columns of one run, 0.8 GB as float64. Without it a row with a key of its own each
turns a file of 5 MB into a table of 80 GB."""

DEPTH = 64
"""Of nested values and keys. Python gives up at about 1000, W&B and Hydra stay below 10."""

DIGITS = 308
"""Of a whole number: what a float64 can hold. Python itself refuses 4300 digits and more."""

KEY_LENGTH = 1000
"""Of a key, its parents included. Without it one long key is copied for each of its leaves."""

NAME_LENGTH = 128
"""Of the name of a run, which is also W&B's bound; names of files end at 255 bytes."""

NUM_PROBLEMS = 50
"""Problems that are named one by one in one run; the others are counted."""

SEARCH_BYTES = 256 * 2**20
"""Bytes that are checksummed in search of the next whole record after damage: about a second."""

FOLDER_DEPTH = 32
"""Of folders below the one that was named. Loggers nest three to six."""

RUN_SECONDS = 300.0
"""For one run in a worker process. Ten million values take about 90 s on a slow core; only a file
system that does not answer takes longer."""
