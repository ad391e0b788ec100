"""Looking after sets of shards: checking, showing and merging them. See ``cdpo shards --help``."""
