"""Seeds of independent random streams."""

import hashlib


def derive(seed: int, *names: object) -> int:
    """A 63-bit seed for one purpose, so that a random stream does not depend on how much other streams have drawn."""
    text = "/".join(str(name) for name in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8], "big") >> 1
