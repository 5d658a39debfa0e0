"""Shards at s3:// or https:// (or http://), read through a bounded cache on this machine's disk.

    client.py     one request to a server: HTTP and S3, through fsspec
    download.py   one file, in as many requests as it takes
    cache.py      Remote: files of an address as files of this machine; bounded, one download for all processes
    prefetch.py   Prefetcher: shards that will be read next, in background threads

fsspec brings connections and credentials; the cache is our own.
"""

from pipeline.remote.cache import Remote, is_address
from pipeline.remote.prefetch import Prefetcher

__all__ = ["Prefetcher", "Remote", "is_address"]
