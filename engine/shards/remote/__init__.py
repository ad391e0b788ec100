"""Shards of elsewhere: fetched over https, S3 or the hub, into a cache that processes share."""
