"A store of format zarr as version 0.1.0 packed it: one array in the folder `shards`, instead of plates of OME-Zarr."

import json
import shutil
from pathlib import Path

import pandas as pd
import xxhash

from rcic_fastai.data.store import Store, _digest


def pack_0_1_0(path, out):
    "Write a finished store of plates anew as one array; returns its folder"
    import zarr
    from zarr.codecs import Crc32cCodec, ZstdCodec

    store, out = Store(path), Path(out)
    out.mkdir(parents=True)
    for name in store.manifest["files"]: shutil.copy(Path(path) / name, out / name)
    pd.read_parquet(out / "sites.parquet").drop(columns="place").to_parquet(out / "sites.parquet", index=False)
    n, step = len(store), store.manifest["shard_sites"]
    array = zarr.create_array(
        out / "shards", shape=(n, *store.shape), shards=(min(step, -(-n // step) * step), *store.shape),
        chunks=(1, *store.shape), dtype="uint8", compressors=[ZstdCodec(level=1, checksum=False), Crc32cCodec()],
        fill_value=0, dimension_names=("site", "channel", "y", "x"))
    array[:] = store.read_batch(range(n)).numpy()
    manifest = {k: v for k, v in store.manifest.items() if k not in ("ome_zarr", "digest")}
    manifest["files"] = {**manifest["files"],
                         "sites.parquet": xxhash.xxh3_64_hexdigest((out / "sites.parquet").read_bytes())}
    (out / "manifest.json").write_text(json.dumps({**manifest, "digest": _digest(manifest)}))
    return out
