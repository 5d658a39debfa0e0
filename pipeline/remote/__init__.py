"""Shards at s3://, gs://, az://, hf:// or https:// (or http://), read through a bounded cache on this machine's disk, and
written.

    filesystem.py fsspec's file systems: packages, credentials, kinds of errors
    client.py     one request to a server
    download.py   one file, in as many requests as it takes
    cache.py      Remote: files of an address as files of this machine; bounded, one download for all processes
    prefetch.py   Prefetcher: shards that will be read next, in background threads
    upload.py     Upload: the address that `make shards` writes to

fsspec brings connections and credentials; the cache is our own.
"""

from pipeline.remote.cache import Remote, is_address
from pipeline.remote.prefetch import Prefetcher
from pipeline.remote.upload import Upload

__all__ = ["Prefetcher", "Remote", "Upload", "is_address"]
