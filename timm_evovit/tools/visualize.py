"""Draw the slow tokens that a model makes of pictures."""
import glob
from pathlib import Path
from typing import Any, Iterable, Iterator, List, Sequence, Tuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from timm.data import create_transform
from timm.data.readers.reader_image_folder import find_images_and_targets
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode, Resize
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from ..slow_tokens import SlowTokens, find_slow_tokens
from .load import data_config

PANEL, GAP, LINE = 224, 8, 18  # pixels: smallest height of a panel, space between panels, height of a line of text


def find_images(name: str, output: Path) -> List[Path]:
    """Find images by file, folder (at any depth) or glob pattern, except in the folder `output` of the drawings."""
    if Path(name).is_dir():
        extensions = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}
        files = [path for path, _ in find_images_and_targets(name, extensions)[0]]
    else:
        files = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))
    return [p for p in map(Path, files) if p.is_file() and output.resolve() not in (
        p.parent.resolve(), p.resolve().parent)]


def tint(heat: torch.Tensor, grey: Any) -> torch.Tensor:
    """Blue for 0, red for 0.5, yellow for 1, (3, H, W) of (1, H, W), as light or dark as the picture below."""
    return 0.6 * grey + 0.4 * torch.cat([2 * heat, 2 * heat - 1, 1 - 2 * heat]).clamp(0.2, 1)


def draw(pixels: torch.Tensor, tokens: Sequence[SlowTokens], attention: bool, caption: str) -> Image.Image:
    """Draw pixels (3, H, W) in [0, 1] and, for each stage of this one image, the tokens that its blocks run on.

    Each has a line around it, and a group its mean colour. Patches that were not selected are blue. `attention` adds
    the class attention, coloured by its rank: values differ too much, most of all after a stage.
    """
    scale = max(PANEL / min(pixels.shape[1:]), 1)
    height, width = (round(n * scale) for n in pixels.shape[1:])
    enlarge = Resize((height, width), InterpolationMode.NEAREST_EXACT)
    pixels = enlarge(pixels)
    grey, white = pixels.mean(dim=0, keepdim=True), pixels.new_ones(3, GAP, width)
    panels = [('picture', pixels, white, [''])]  # title, picture, scale and words below it
    for t in tokens:
        group = enlarge(t.groups)[0]
        if t.attention is None:
            sums = pixels.new_zeros(3, int(group.max()) + 1).index_add(1, group.flatten(), pixels.flatten(1))
            others = (sums / group.flatten().bincount())[:, group]
            count, words = f'{t.groups.unique().numel()} of {t.groups.numel()} tokens', 'a group: its mean colour'
        else:
            others = tint(torch.zeros_like(grey), grey)
            count, words = f'{t.mask.sum()} of {t.mask.numel()} patches', 'blue: not selected'
            if attention:
                values, rank = t.attention.unique(return_inverse=True)
                heat, bar = tint(enlarge(rank / max(len(values) - 1, 1)), grey), tint(white[:1].cumsum(2) / width, 0.5)
                ticks = [f'{100 * values[i]:.3g} %' for i in (0, len(values) // 2, -1)]
                panels.append((f'attention before block {t.block}, by rank', heat, bar, ticks))
        lines = F.pad(group, [0, 1, 0, 1], value=-1)
        edge = (lines[:-1, :-1] != lines[1:, :-1]) | (lines[:-1, :-1] != lines[:-1, 1:])
        drawn = torch.where(enlarge(t.mask), pixels, others).masked_fill(edge, 1.)
        panels.append((f'from block {t.block}: {count}', drawn, white, [words]))

    font = ImageFont.load_default(13)
    strip = make_grid([torch.cat([p, white[:, :2], s], dim=1) for _, p, s, _ in panels], len(panels), GAP, pad_value=1.)
    right = max(0, round(font.getlength(caption)) + 2 * GAP - strip.shape[-1])
    out = to_pil_image(F.pad(strip, [0, right, LINE, 2 * LINE - GAP], value=1.))
    pen = ImageDraw.Draw(out)
    for i, (title, _, _, below) in enumerate(panels):
        x = GAP + i * (width + GAP)
        pen.text((x, GAP), title, fill='black', font=font)
        for word, part, anchor in zip(below, (0., 0.5, 1.), ('ls', 'ms', 'rs')):
            pen.text((x + part * width, out.height - LINE - GAP // 2), word, fill='black', font=font, anchor=anchor)
    pen.text((GAP, out.height - LINE), caption, fill='black', font=font)
    return out


def sheet(images: Sequence[Image.Image]) -> Image.Image:
    """Contact sheet: pictures one below the other."""
    width = max(image.width for image in images)
    wide = [np.asarray(ImageOps.expand(image, (0, 0, width - image.width, 0), 'white')) for image in images]
    return Image.fromarray(np.vstack(wide))


@torch.no_grad()
def visualize(model: Any, paths: Iterable[Path], attention: bool = False) -> Iterator[Tuple[Path, Any]]:
    """Draw what an evolving model looks at in image files, and yield each file with its drawing or with the error."""
    data = data_config(model)
    transform = create_transform(**data)
    weight = next(model.parameters())
    mean, std = (torch.tensor(data[k], device=weight.device).view(-1, 1, 1) for k in ('mean', 'std'))
    for path in paths:
        try:
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file).convert('L' if model.in_chans == 1 else 'RGB')
            x = transform(image).to(weight.device)
        except Exception as e:  # decoders raise errors of every kind
            yield path, e
            continue
        tokens = find_slow_tokens(model, x.unsqueeze(0).to(weight.dtype))
        pixels = (x * std + mean).clamp(0, 1).expand(3, -1, -1)
        yield path, draw(pixels, tokens, attention, str(Path(*path.parts[-2:])))
