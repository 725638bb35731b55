"""How many grey levels the views of JPEGs differ by with data.jpeg_draft, and how far the JPEGs are reduced.

    python tests/benchmark/jpeg_draft.py DATA --size 224 --count 100

DATA is a folder or parquet files of photos. The first of them are written as JPEGs of quality 92 to a scratch folder,
and each is decoded in both ways for MAE's crops (mae-photos) and for the evaluation view. Beside the mean absolute
difference stands that of the same views from their own neighbours, moved by one pixel: what a small displacement costs.
"""

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from ssl_vit import data, views  # noqa: E402
from ssl_vit import recipe as recipes  # noqa: E402
from ssl_vit.data import decoding, pixels  # noqa: E402
from ssl_vit.randomness import Draw  # noqa: E402


class Watched:
    """A JPEG that keeps by how much it was reduced."""

    reduction = 1

    def __init__(self, file: Path):
        self.photo = decoding.open_photo(lambda _: pixels.look(str(file), str(file), None, None), pixels.Rules(3), 0)

    def decode(self, n: int) -> torch.Tensor:
        self.reduction = n
        return self.photo.decode(n)

    def as_photo(self) -> views.Photo:
        return views.Photo(self.photo.size, self.decode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--size", type=int, default=224, help="of the views, in pixels")
    parser.add_argument("--count", type=int, default=100, help="photos")
    args = parser.parse_args()
    torch.set_num_threads(1)
    images = data.load(recipes.Data(name=args.data, in_chans=3, cache_gb=0), "train")
    count, size = min(args.count, len(images)), (args.size, args.size)
    crop = views.crop_photos(views.resampled(views.crop_flip(size, 0.5), "bicubic"), Draw(0, 0, torch.arange(count)))
    kinds = {
        "crops of MAE": lambda i, photo: crop(i, photo)["image"][0],
        "evaluation": lambda i, photo: views.whole_photo(views.evaluation(size), photo),
    }
    reduced: dict[str, Counter[int]] = {name: Counter() for name in kinds}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(count):
            file = Path(folder) / f"{i}.jpg"
            Image.fromarray(images.photo(i).permute(1, 2, 0).numpy()).save(file, quality=92)
            for name, see in kinds.items():
                photo = Watched(file)
                draft, whole = see(i, photo.as_photo()).float(), see(i, Watched(file).decode(1)).float()
                reduced[name][photo.reduction] += 1
                if photo.reduction > 1:
                    moved = (whole[..., 1:] - whole[..., :-1]).abs().mean().item()
                    found[name].append(((draft - whole).abs().mean().item(), moved))
    print(f"| {images.name}, {args.size} px | reduced by (photos) | grey levels apart | moved by one pixel |")
    print("|---|---|---:|---:|")
    for name, ways in reduced.items():
        pairs = zip(*found[name] or [(0.0, 0.0)], strict=True)
        apart, moved = (f"{torch.tensor(values).mean():.2f}" for values in pairs)
        print(f"| {name} | {', '.join(f'{n} ({k})' for n, k in sorted(ways.items()))} | {apart} | {moved} |")


if __name__ == "__main__":
    main()
