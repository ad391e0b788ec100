"""Pair shards: webdataset tars written atomically and read strictly, in exact order."""
