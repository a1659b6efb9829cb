"Folders as microscopes and projects write them, small, with planes whose grey values say what they show."

import io
import json
import uuid
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import tifffile
from PIL import Image

WELLS = {"A01": 1, "A02": 2, "B01": 3}  # fields of each well; the first has one, which a guess must not take for all
TREATMENTS = ["DMSO", "taxol", "nocodazole"]
RAMP = np.arange(64, dtype=np.uint16).reshape(8, 8)


def plane(well, field=1, channel=1, z=1, t=1):
    "Grey values (8, 8) that tell where a plane belongs; wells count from 0"
    return (100 + 1000 * well + 100 * field + 10 * channel + 2 * z + t + RAMP).astype(np.uint16)


def sites():
    "(number of the well, its name, row, column, field) of all six"
    for i, (well, n) in enumerate(WELLS.items()):
        for field in range(1, n + 1): yield i, well, "ABCDEFGH".index(well[0]) + 1, int(well[1:]), field


def write_tiff(path, pixels, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, pixels, **kwargs)


def write_csv(path, columns, sep=","):
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(columns).to_csv(path, index=False, sep=sep)


def plate_map(root): write_csv(root / "wells.csv", dict(well=list(WELLS), treatment=TREATMENTS))


def guid(*key): return str(uuid.uuid5(uuid.NAMESPACE_URL, repr(key))).upper()


def harmony(root):
    "Two plates with their own times, stacks of three, an index each"
    names = {1: "HOECHST 33342", 2: "Alexa 568"}
    plates = {"BR00121482": "2021-03-29T16_51_44", "BR00121483": "2021-03-29T19_02_10"}
    for n, (barcode, time) in enumerate(plates.items()):
        folder, entries = root / f"{barcode}__{time}-Measurement 1/Images", []
        for i, _, row, column, f in sites():
            for c, z in np.ndindex(2, 3):
                name = f"r{row:02}c{column:02}f{f:02}p{z + 1:02}-ch{c + 1}sk1fk1fl1.tiff"
                write_tiff(folder / name, plane(i + len(WELLS) * n, f, c + 1, z + 1))
                entries.append(f"<Image><URL>{name}</URL><ChannelID>{c + 1}</ChannelID>"
                               f"<ChannelName>{names[c + 1]}</ChannelName></Image>")
        head = '<?xml version="1.0" encoding="utf-8"?><Data xmlns="http://www.perkinelmer.com/PEHH/HarmonyV5">'
        (folder / "Index.idx.xml").write_text(f"{head}<Images>{''.join(entries)}</Images></Data>")
    write_csv(root / "wells.csv", dict(plate=[b for b in plates for _ in WELLS], well=list(WELLS) * 2,
                                       treatment=TREATMENTS * 2))


def imagexpress(root):
    "Names with GUIDs, a thumbnail next to each image, two times"
    for i, well, _, _, f in sites():
        for c, t in np.ndindex(2, 2):
            for small in ("", "_thumb"):
                name = f"MyScreen_{well}_s{f}_w{c + 1}{small}{guid(well, f, c, t, small)}.tif"
                pixels = plane(i, f, c + 1, 1, t + 1)
                write_tiff(root / f"2023-02-21/1334/TimePoint_{t + 1}/{name}",
                           pixels[::4, ::4].copy() if small else pixels)
    plate_map(root)


def cellvoyager(root, plates=("AssayPlate_Greiner_#655090",)):
    "A # in the name of the plate, an action for each channel"
    for n, plate in enumerate(plates):
        for i, well, _, _, f in sites():
            for c in (1, 2):
                write_tiff(root / f"{plate}/{plate}_{well}_T0001F{f:03}L01A{c:02}Z01C{c:02}.tif",
                           plane(i + len(WELLS) * n, f, c))
    write_csv(root / "wells.csv", dict(plate=[p for p in plates for _ in WELLS], well=list(WELLS) * len(plates),
                                       treatment=TREATMENTS * len(plates)))


def incell(root):
    for i, well, _, _, f in sites():
        for c, light in ((1, "390 - Blue"), (2, "473 - Green")):
            write_tiff(root / f"{well[0]} - {well[1:]}(fld {f} wv {light}).tif", plane(i, f, c))
    plate_map(root)


def gen5(root):
    for i, well, _, column, f in sites():
        for c, name in ((1, "DAPI"), (2, "GFP")):
            write_tiff(root / f"{well[0]}{column}_01_{c}_{f}_{name}_001.tif", plane(i, f, c))
    plate_map(root)


def _stack(i, f, axes="CZ"):
    x = np.stack([np.stack([plane(i, f, c, z) for z in (1, 2, 3)]) for c in (1, 2)])
    return x if axes == "CZ" else x.transpose(1, 0, 2, 3).copy()


def ome_tiff(root):
    for i, well, _, _, f in sites():
        write_tiff(root / f"{well}_f{f}.ome.tiff", _stack(i, f),
                   metadata={"axes": "CZYX", "Channel": {"Name": ["DAPI", "GFP"]}})
    plate_map(root)


def imagej(root):
    for i, well, _, _, f in sites():
        write_tiff(root / f"{well}_f{f}.tif", _stack(i, f, "ZC"), imagej=True, metadata={"axes": "ZCYX"})
    plate_map(root)


def ome_set(root):
    "Two files of one plane per site, each with the header of both"
    for i, well, _, _, f in sites():
        names = [f"{well}_f{f}_{c}.ome.tiff" for c in ("DAPI", "GFP")]
        data = "".join(f'<TiffData IFD="0" FirstC="{c}" PlaneCount="1"><UUID FileName="{n}">urn:uuid:{guid(n)}</UUID>'
                       "</TiffData>" for c, n in enumerate(names))
        channels = "".join(f'<Channel ID="Channel:0:{c}" SamplesPerPixel="1"/>' for c in (0, 1))
        for c, name in enumerate(names):
            header = ('<?xml version="1.0" encoding="UTF-8"?>'
                      f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:{guid(name)}">'
                      '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint16" '
                      f'SizeX="8" SizeY="8" SizeC="2" SizeZ="1" SizeT="1">{channels}{data}</Pixels></Image></OME>')
            write_tiff(root / name, plane(i, f, c + 1), metadata=None, description=header)
    plate_map(root)


def ome_zarr(root, version, plates=("BR00121482",)):
    "Plates of OME-Zarr with zarr-python; fields count from 0"
    import zarr

    kind = 2 if version == "0.4" else 3
    root.mkdir(parents=True, exist_ok=True)
    put = lambda g, **said: g.attrs.update(said if kind == 2 else {"ome": {"version": version, **said}})
    rows, columns = (sorted({p(w) for w in WELLS}) for p in (lambda w: w[0], lambda w: int(w[1:])))
    wells = [dict(path=f"{w[0]}/{int(w[1:])}", rowIndex=rows.index(w[0]), columnIndex=columns.index(int(w[1:])))
             for w in WELLS]
    for n, name in enumerate(plates):
        group = zarr.open_group(str(root / f"plate{n or ''}.ome.zarr"), mode="w", zarr_format=kind)
        put(group, plate=dict(rows=[dict(name=r) for r in rows], columns=[dict(name=str(c)) for c in columns],
                              name=name, wells=wells))
        for path, k in zip((w["path"] for w in wells), WELLS.values()):
            put(group.require_group(path), well=dict(images=[dict(path=str(f)) for f in range(k)]))
        for i, well, _, _, f in sites():
            _zarr_image(group.require_group(f"{well[0]}/{int(well[1:])}/{f - 1}"),
                        _stack(i + len(WELLS) * n, f), kind, put)
    write_csv(root / "wells.csv", dict(plate=[p for p in plates for _ in WELLS], well=list(WELLS) * len(plates),
                                       treatment=TREATMENTS * len(plates)))


def _zarr_image(image, pixels, kind, put):
    layout = dict(chunk_key_encoding=dict(name="v2",
                                          separator="/")) if kind == 2 else dict(dimension_names=list("czyx"))
    axes = [dict(name=a, type="channel" if a == "c" else "space") for a in "czyx"]
    scale = [dict(path="0", coordinateTransformations=[dict(type="scale", scale=[1.0] * 4)])]
    image.create_array("0", shape=pixels.shape, chunks=(1, 1, *pixels.shape[2:]), dtype="uint16",
                       **layout)[:] = pixels
    put(image, multiscales=[dict(axes=axes, datasets=scale)],
        omero=dict(channels=[dict(label=c) for c in ("DAPI", "GFP")]))


def load_data(root):
    "A row per site; the names of the files say nothing"
    rows = []
    for i, well, _, _, f in sites():
        row = dict(Metadata_Plate="BR00121482", Metadata_Well=well, Metadata_Site=f,
                   Metadata_broad_sample=TREATMENTS[i])
        for c, channel in ((1, "OrigDNA"), (2, "OrigER")):
            name = f"{guid(well, f, channel)}.tiff"
            write_tiff(root / "images" / name, plane(i, f, c))
            row |= {f"FileName_{channel}": name, f"PathName_{channel}": "images"}
        rows.append(row)
    write_csv(root / "load_data.csv", rows)


def jump(root):
    "Two plates of one map, compounds in a second table, DMSO without the name of a sample"
    barcodes = ("BR00116991", "BR00116992")
    for n, barcode in enumerate(barcodes):
        for i, _, row, column, f in sites():
            for c in (1, 2):
                name = f"r{row:02}c{column:02}f{f:02}p01-ch{c}sk1fk1fl1.tiff"
                write_tiff(root / f"images/{barcode}__2020-11-05T19_51_35-Measurement1/Images/{name}",
                           plane(i + len(WELLS) * n, f, c))
    samples = ["", "BRD-K23363278-001-02-1", "BRD-A86665761-001-01-1"]
    of_well = [samples[TREATMENTS.index(t) % 3] for t in TREATMENTS]
    title = "JUMP-Target-1_compound"
    write_csv(root / "metadata/barcode_platemap.csv", dict(Assay_Plate_Barcode=barcodes,
                                                           Plate_Map_Name=[f"{title}_platemap"] * 2))
    write_csv(root / f"metadata/platemap/{title}_platemap.txt",
              dict(well_position=list(WELLS), broad_sample=of_well, solvent="DMSO"), "\t")
    write_csv(root / f"metadata/{title}_metadata.tsv", dict(
        broad_sample=samples, pert_iname=["DMSO", "CYT-997", "gabapentin-enacarbil"], pert_type=["control", "control",
                                                                                                 "trt"],
        control_type=["negcon", "poscon_diverse", ""]), "\t")


def rxrx19a(root):
    "Wells of a plate of 1,536, four sites, five channels of 8 bits, a row per site in the table"
    rows, wells = [], ("B02", "AA02", "AF47")
    conditions, treatments, doses = ("Mock", "Active SARS-CoV-2", "Active SARS-CoV-2"), ("", "Remdesivir",
                                                                                         "GS-441524"), ("", 1.0, 3.0)
    folder = root / "images/HRCE-1/Plate1"
    folder.mkdir(parents=True)
    for i, well in enumerate(wells):
        for site in range(1, 5):
            for c in range(1, 6):
                pixels = (30 * i + 10 * site + c + RAMP // 4).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{well}_s{site}_w{c}.png")
            rows.append(dict(
                site_id=f"HRCE-1_1_{well}_{site}", well_id=f"HRCE-1_1_{well}", cell_type="HRCE", experiment="HRCE-1",
                plate=1, well=well, site=site, disease_condition=conditions[i], treatment=treatments[i],
                treatment_conc=doses[i], SMILES=""))
    write_csv(root / "metadata.csv", rows)


def rxrx3_core(root):
    "Images of 8 bits in rows of two Parquet files, a row per channel; the table of wells next to them"
    wells = ["B02", "AA02", "AF47"]
    rows = [(f"gene-00{n}/Plate1/{well}_s1_{c}", i + 3 * n, c) for n in (1, 2) for i, well in enumerate(wells)
            for c in (1, 2)]
    (root / "data").mkdir(parents=True)
    for k, part in enumerate((rows[:5], rows[5:])):
        cells = []
        for _, well, c in part:
            file = io.BytesIO()
            Image.fromarray((10 * well + c + RAMP // 4).astype(np.uint8)).save(file, "PNG")
            cells.append(dict(bytes=file.getvalue(), path=None))
        pq.write_table(pa.table({"__key__": [name for name, *_ in part], "jp2": cells}),
                       root / f"data/train-0000{k}-of-00002.parquet", row_group_size=2)
    pd.DataFrame(dict(well_id=["gene-001_1_B02"], feature_0=[.5])).to_parquet(root / "OpenPhenom_embeddings.parquet")
    write_csv(root / "metadata_rxrx3_core.csv", dict(
        well_id=[f"gene-00{n}_1_{w}" for n in (1, 2) for w in wells], plate=1, address=wells * 2,
        experiment_name=np.repeat(["gene-001", "gene-002"], 3),
        gene=["EMPTY_control", "TP53", "MTOR"] * 2, treatment=["EMPTY_control", "TP53_guide_1", "MTOR_guide_2"] * 2,
        concentration=["", "", "2.5"] * 2, perturbation_type="CRISPR", cell_type="HUVEC"))


def hostile_zarr(root, path):
    "A plate whose description leads elsewhere"
    plate = root / "plate.zarr"
    plate.mkdir(parents=True)
    (plate / ".zattrs").write_text(json.dumps(dict(plate=dict(wells=[dict(path=path)]))))


INPUTS = dict(harmony=harmony, imagexpress=imagexpress, cellvoyager=cellvoyager, incell=incell, gen5=gen5,
              ome_tiff=ome_tiff, imagej=imagej,
              ome_set=ome_set, ome_zarr_04=lambda root: ome_zarr(root, "0.4"), ome_zarr_05=lambda root: ome_zarr(root,
                                                                                                                 "0.5"),
              load_data=load_data, jump=jump, rxrx19a=rxrx19a, rxrx3_core=rxrx3_core)


def make(name, root):
    "Write one of the inputs to a folder, and give the folder"
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    INPUTS[name](root)
    return root
