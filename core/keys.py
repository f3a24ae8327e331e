"""Keyed randomness: every draw comes from (seed, epoch, id, purpose), never from global state."""

import hashlib

import numpy as np

KeyPart = str | int


def key_int(*parts: KeyPart) -> int:
    """Hash the parts of a key into one integer.

    Units: 63 bits, so that it fits torch's and numpy's signed seeds.
    """
    text = "/".join([f"{type(part).__name__[0]}:{part}" for part in parts])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def keyed_rng(*parts: KeyPart) -> np.random.Generator:
    """Open a numpy generator that depends on the key alone."""
    return np.random.Generator(np.random.Philox(key_int(*parts)))


def key_fraction(*parts: KeyPart) -> float:
    """Map a key to a number in [0, 1); used to split data sets."""
    return key_int(*parts) / 2.0**63
