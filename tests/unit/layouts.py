"""MS-COCO and CUB in miniature: the public layouts, with generated pictures."""

import json
from pathlib import Path

from data_pipeline.images.crops import encode_png
from data_pipeline.sources.drawn.shapes import draw_scene, render


def picture(number: int, pixels: int = 40) -> bytes:
    """A picture in the file format of both sets."""
    return encode_png(render(draw_scene(0, number), pixels, 0, number))


def write_coco(folder: Path, pictures: int, year: str = "2014") -> Path:
    """annotations/captions_val*.json with two captions a picture, and val*/."""
    prefix = "COCO_val2014_" if year == "2014" else ""
    images = [{"id": 7 * i, "file_name": f"{prefix}{7 * i:012d}.jpg"} for i in range(pictures)]
    (folder / f"val{year}").mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    notes = []
    for i, image in enumerate(images):
        (folder / f"val{year}" / str(image["file_name"])).write_bytes(picture(i))
        for j, text in enumerate((f"{draw_scene(0, i)} number {i} .\n", f"A Second {i}")):
            notes.append({"image_id": image["id"], "id": 2 * i + j, "caption": text})
    body = {"info": {}, "images": images, "licenses": [], "annotations": notes}
    (folder / "annotations" / f"captions_val{year}.json").write_text(json.dumps(body))
    return folder


def write_cub(folder: Path, classes: int = 4, pictures: int = 3) -> Path:
    """CUB_200_2011 and text_c10; the first picture of each class is a test picture."""
    root = folder / "CUB_200_2011"
    lines, flags = [], []
    for kind in range(classes):
        for i in range(pictures):
            number = kind * pictures + i
            name = f"{kind + 1:03d}.Bird_{kind}/Bird_{i:04d}_{number}"
            path = root / "images" / f"{name}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(number))
            text = folder / "text_c10" / f"{name}.txt"
            text.parent.mkdir(parents=True, exist_ok=True)
            rows = [f"this bird {number} has mark {j} ." for j in range(9)]
            text.write_text("\n".join(["a plain bird", *rows]) + "\n\n")
            lines.append(f"{number + 1} {name}.jpg")
            flags.append(f"{number + 1} {int(i > 0)}")
    (root / "images.txt").write_text("\n".join(lines) + "\n")
    (root / "train_test_split.txt").write_text("\n".join(flags) + "\n")
    return folder
