"""The same bytes are compressed once per test session: a kernel holds the wheel of this library, which takes seconds
each time."""
import hashlib
import lzma
import os
from pathlib import Path

original = lzma.compress


def compress_once(folder):
    "Replaces `lzma.compress`, for `folder` to keep what it has given; returns what undoes it"
    def compress(data, *args, **kwargs):
        kept = Path(folder) / hashlib.sha256(repr((args, sorted(kwargs.items()))).encode() + bytes(data)).hexdigest()
        if kept.exists(): return kept.read_bytes()
        found, part = original(data, *args, **kwargs), kept.with_name(f"{kept.name}.{os.getpid()}")
        kept.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(found)
        part.replace(kept)
        return found

    lzma.compress = compress
    return lambda: setattr(lzma, "compress", original)
