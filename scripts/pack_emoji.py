"""Packs the emoji images and names of the npm package `emoji-datasource-google` for `hasten.reference`.

    npm pack emoji-datasource-google && tar xzf emoji-datasource-google-*.tgz
    python scripts/pack_emoji.py package src/hasten/reference/data

Writes `emoji.webp`, one lossless RGBA sheet of 64 x 64 px tiles, 64 a row, and `emoji.json`, one entry a tile in the
same order. Images: Noto Emoji, Apache-2.0. Names: emoji-data by Cal Henderson, MIT.
"""

import json
import sys
from pathlib import Path

from PIL import Image

TONES = {"1F3FB": "light", "1F3FC": "medium light", "1F3FD": "medium", "1F3FE": "medium dark", "1F3FF": "dark"}
SIDE, COLUMNS = 64, 64


def main(package: Path, out: Path) -> None:
    entries, tiles = [], []
    for e in sorted(json.loads((package / "emoji.json").read_text()), key=lambda e: e["sort_order"]):
        words = {"name": e["name"].lower(), "short": e["short_names"], "kind": e["subcategory"]}
        variants = {"": e["image"]} | {k: v["image"] for k, v in e.get("skin_variations", {}).items()}
        for tone, image in variants.items():
            entries.append(words | {"tone": " and ".join(TONES[t] for t in tone.split("-") if t)})
            tiles.append(Image.open(package / "img/google/64" / image).convert("RGBA"))
    sheet = Image.new("RGBA", (SIDE * COLUMNS, SIDE * -(-len(tiles) // COLUMNS)))
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % COLUMNS * SIDE, i // COLUMNS * SIDE))
    out.mkdir(parents=True, exist_ok=True)
    sheet.save(out / "emoji.webp", lossless=True, quality=100, method=6, exact=False)
    lines = ",\n".join(json.dumps(e, ensure_ascii=False, separators=(",", ":")) for e in entries)
    (out / "emoji.json").write_text(f"[\n{lines}\n]\n")
    print(f"{len(tiles)} tiles, {(out / 'emoji.webp').stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
