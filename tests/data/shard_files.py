"""Shards as others write them, for tests."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def encoded(i, size=(12, 10)):
    """Image i as a PNG whose first pixel tells i; its width differs from one to the next."""
    out = io.BytesIO()
    Image.new("RGB", (size[0] + i % 5, size[1]), (i % 256, i // 256, 7)).save(out, "PNG")
    return out.getvalue()


def identity(image):
    """Which of the images this is, decoded."""
    assert image[2, 0, 0] == 7
    return int(image[0, 0, 0]) + 256 * int(image[1, 0, 0])


def add(tar, name, data):
    about = tarfile.TarInfo(name)
    about.size = len(data)
    tar.addfile(about, io.BytesIO(data))


def write_tar(path, indices, label=None, form=tarfile.GNU_FORMAT, prefix=""):
    """The WebDataset layout: key.cls, key.json, key.png; `label(i)` or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for i in indices:
            if label is not None:
                add(tar, f"{prefix}{i:06}.cls", str(label(i)).encode())
            add(tar, f"{prefix}{i:06}.json", json.dumps({"id": i}).encode())
            add(tar, f"{prefix}{i:06}.png", encoded(i))
    return path


FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": ["cat", "dog", "fox"], "_type": "ClassLabel"},
}


def table(indices, label=None, flat=False):
    """Columns as `datasets` has them: pairs of bytes and path, a ClassLabel; or plain bytes."""
    images = [encoded(i) for i in indices]
    if not flat:
        images = [{"bytes": image, "path": f"{i}.png"} for i, image in zip(indices, images, strict=True)]
    kind = pa.binary() if flat else pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"caption": pa.array([f"no. {i}" for i in indices]), "image": pa.array(images, kind)}
    if label is not None:
        columns["label"] = pa.array([label(i) for i in indices], pa.int64())
    about = {} if flat else {"huggingface": json.dumps({"info": {"features": FEATURES}})}
    return pa.table(columns).replace_schema_metadata(about)


def write_parquet(path, indices, group=4, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(indices, **options), path, row_group_size=group)
    return path


def write_arrow(path, indices, batch=4, random_access=False, **options):
    """A stream of record batches, or a file of random access."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = table(indices, **options)
    new = pa.ipc.new_file if random_access else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as sink, new(sink, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=batch)
    return path


def save_to_disk(folder, parts, **options):
    """A data set as `datasets.Dataset.save_to_disk` leaves it."""
    names = [f"data-{n:05}-of-{len(parts):05}.arrow" for n in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        write_arrow(folder / name, part, **options)
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name} for name in names], "_fingerprint": "0" * 16, "_split": None})
    )
    (folder / "dataset_info.json").write_text(json.dumps({"features": FEATURES}))
    return folder
