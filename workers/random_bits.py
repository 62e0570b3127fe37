"""Random numbers that depend on nothing but who asks: Philox4x32-10, a counter-based generator.

J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw: Parallel Random Numbers: As Easy as 1, 2, 3 (SC'11), section 3.3.
A token's number is a function of (seed, choice index, output index), so a replayed, preempted or moved request draws the
same tokens, whatever else is in the batch. No state, no torch. Called by `workers.sampling`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)
_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)


def philox4x32(counter: NDArray[np.uint64], key: NDArray[np.uint64], *, rounds: int = 10) -> NDArray[np.uint64]:
    """counter [4, n] and key [2, n], 32-bit words in 64-bit integers, to n blocks of four random words [4, n]."""
    even, odd = counter[0::2], counter[1::2]
    for _ in range(rounds):
        # The words swap places: the high half of one product meets the odd word of the other pair.
        product = (_MULTIPLIERS * even)[::-1]
        even = (product >> _WORD) ^ odd ^ key
        odd = product & _LOW
        key = (key + _WEYL) & _LOW
    return np.stack([even[0], odd[0], even[1], odd[1]])


def uniforms(seeds: list[int], choice_indices: list[int], output_indices: list[int]) -> NDArray[np.float64]:
    """One number in [0, 1) with 53 random bits for each (64-bit seed, choice index, output index)."""
    seed = np.array(seeds, dtype=np.uint64)
    key = np.stack([seed & _LOW, seed >> _WORD])
    counter = np.zeros((4, len(seeds)), dtype=np.uint64)
    counter[0] = output_indices
    counter[1] = choice_indices
    words = philox4x32(counter, key)
    high, low = words[0] >> np.uint64(5), words[1] >> np.uint64(6)
    result: NDArray[np.float64] = (high * np.uint64(1 << 26) + low).astype(np.float64) / float(1 << 53)
    return result
