"""Search of settings, from the command line: ``python -m lightning_danns.sweep --help``.

Rooms: `search_space` says what is searched, `trials` keeps and trains the trials, `pruning` watches one.
"""
