"""One counter-based hash: every random number of the pipeline, for a whole batch at once.

A draw depends only on the words that it is keyed by (seed, epoch, sample id, purpose, counter). There is no generator state,
so rank, world size, worker, batch size and the step at which a run resumes cannot change it.
The mixing function is splitmix64's finalizer (Steele, Lea & Flood, OOPSLA 2014).
"""

import zlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * _MIX1
    x = (x ^ (x >> np.uint64(27))) * _MIX2
    return x ^ (x >> np.uint64(31))


def hash64(*words: ArrayLike | str) -> NDArray[np.uint64]:
    """uint64 hash of the words, broadcast against each other; of a str (the purpose) its crc32 is used."""
    h = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for word in words:
            w = zlib.crc32(word.encode()) if isinstance(word, str) else word
            h = _mix((h + _GOLDEN) ^ np.asarray(w).astype(np.uint64))
    return np.asarray(h)


def uniform(*words: ArrayLike | str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Numbers in [0, 1), 53 random bits each: [*words' broadcast shape, *shape]."""
    key = hash64(*words)
    counter = np.arange(int(np.prod(shape)), dtype=np.uint64).reshape(shape)
    h = hash64(key.reshape(key.shape + (1,) * len(shape)), counter)
    return (h >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(index: ArrayLike, size: ArrayLike, key: ArrayLike, rounds: int = 6) -> NDArray[np.int64]:
    """Image of `index` under the key's permutation of range(size); all three broadcast.

    A Feistel network over Z_a x Z_a, a = ceil(sqrt(size)), repeated until the result is inside the range (cycle walking).
    The permutation is never listed: O(1) memory for any number of samples.
    """
    index, size, key = np.broadcast_arrays(
        np.asarray(index, np.int64), np.asarray(size, np.int64), np.asarray(key, np.uint64)
    )
    side = np.ceil(np.sqrt(size.astype(np.float64))).astype(np.uint64)
    out = index.astype(np.uint64)
    todo = np.ones(out.shape, bool)
    while todo.any():
        x, a, k = out[todo], side[todo], key[todo]
        left, right = x // a, x % a
        for r in range(rounds):
            left, right = right, (left + hash64(k, r, right) % a) % a
        out[todo] = left * a + right
        todo[todo] = out[todo] >= size[todo].astype(np.uint64)
    return out.astype(np.int64)
