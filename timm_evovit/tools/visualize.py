"""Draw the slow tokens that a model makes of pictures."""
from pathlib import Path
from typing import Any, Iterable, Iterator, List, Sequence, Tuple

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from timm.data import create_transform
from timm.data.readers.reader_image_folder import find_images_and_targets
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode, Resize
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from ..base import check
from ..slow_tokens import SlowTokens, find_slow_tokens
from .load import data_config

PANEL, GAP, LINE = 224, 8, 18  # pixels: smallest height of a panel, space between panels, height of a line of text


def find_images(name: str, output: Path) -> List[Path]:
    """Find images by file or folder (at any depth), except in the folder `output` of the drawings."""
    check(output.resolve() != Path(name).resolve(), '--output', 'another folder than that of the images', name)
    files = [Path(name)]
    if files[0].is_dir():
        extensions = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}
        files = [Path(path) for path, _ in find_images_and_targets(name, extensions)[0]]
    found = [p for p in files if p.is_file() and output.resolve() not in (p.parent.resolve(), p.resolve().parent)]
    check(bool(found), 'IMAGE', 'an image file or a folder of images outside --output', name)
    return found


def draw(pixels: torch.Tensor, tokens: Sequence[SlowTokens], caption: str) -> Image.Image:
    """Draw pixels (3, H, W) in [0, 1] and, for each stage of this one image, the tokens that its blocks run on.

    Each has a line around it, and a group its mean colour. Patches that were not selected are blue.
    """
    scale = max(PANEL / min(pixels.shape[1:]), 1)
    height, width = (round(n * scale) for n in pixels.shape[1:])
    enlarge = Resize((height, width), InterpolationMode.NEAREST_EXACT)
    pixels = enlarge(pixels)
    panels = [('picture', pixels, '')]  # title, picture, words below it
    for t in tokens:
        group = enlarge(t.groups)[0]
        if t.attention is None:
            sums = pixels.new_zeros(3, int(group.max()) + 1).index_add(1, group.flatten(), pixels.flatten(1))
            others = (sums / group.flatten().bincount())[:, group]
            count, words = f'{t.groups.unique().numel()} of {t.groups.numel()} tokens', 'a group: its mean colour'
        else:
            others = 0.6 * pixels.mean(dim=0) + pixels.new_tensor([[[0.08]], [[0.08]], [[0.4]]])
            count, words = f'{t.mask.sum()} of {t.mask.numel()} patches', 'blue: not selected'
        lines = F.pad(group, [0, 1, 0, 1], value=-1)
        edge = (lines[:-1, :-1] != lines[1:, :-1]) | (lines[:-1, :-1] != lines[:-1, 1:])
        drawn = torch.where(enlarge(t.mask), pixels, others).masked_fill(edge, 1.)
        panels.append((f'from block {t.block}: {count}', drawn, words))

    font = ImageFont.load_default(13)
    strip = make_grid([picture for _, picture, _ in panels], len(panels), GAP, pad_value=1.)
    right = max(0, round(font.getlength(caption)) + 2 * GAP - strip.shape[-1])
    out = to_pil_image(F.pad(strip, [0, right, LINE, 2 * LINE], value=1.))
    pen = ImageDraw.Draw(out)
    for i, (title, _, words) in enumerate(panels):
        x = GAP + i * (width + GAP)
        pen.text((x, GAP), title, fill='black', font=font)
        pen.text((x, out.height - 2 * LINE), words, fill='black', font=font)
    pen.text((GAP, out.height - LINE), caption, fill='black', font=font)
    return out


@torch.no_grad()
def visualize(model: Any, paths: Iterable[Path]) -> Iterator[Tuple[Path, Any]]:
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
        yield path, draw(pixels, tokens, str(Path(*path.parts[-2:])))
