"""Draw which patches a model calls informative, or which share a slow token."""
import glob
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from timm.data import create_transform, resolve_model_data_config
from timm.data.readers.reader_image_folder import find_images_and_targets
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode, Resize
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from ..informative import InformativeTokens, informative_tokens

PANEL, GAP, LINE = 224, 8, 18  # pixels: smallest height of a panel, space between panels, height of a line of text


def find_images(names: Iterable[str], output: Path) -> List[Path]:
    """Find images by file, folder (at any depth) or glob pattern, except in the folder `output` of the drawings."""
    extensions = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    paths: List[Path] = []
    for name in names:
        if Path(name).is_dir():
            files = [path for path, _ in find_images_and_targets(name, extensions)[0]]
        else:
            files = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))
        found = [p for p in map(Path, files) if p.is_file() and output.resolve() not in (
            p.parent.resolve(), p.resolve().parent)]
        if not found:
            raise FileNotFoundError(f'{name}: no image found; files in the output folder {output} are left out.')
        paths += found
    return list(dict.fromkeys(paths))


def data_config(model: Any, args: Optional[Dict[str, Any]] = None) -> Dict[str, Any]:
    """timm's data configuration of a model as it is built; `args` are options of timm's scripts that replace it."""
    data = resolve_model_data_config(model, args)
    sized = model if hasattr(model, 'img_size') else getattr(model, 'patch_embed', None)
    data['input_size'] = (model.in_chans, *(getattr(sized, 'img_size', None) or data['input_size'][1:]))
    if model.in_chans == 1:
        data.update({k: (sum(data[k]) / len(data[k]),) for k in ('mean', 'std')})
    return data


def draw(pixels: torch.Tensor, tokens: Sequence[InformativeTokens], attention: bool, caption: str) -> Image.Image:
    """Draw pixels (3, H, W) in [0, 1] and, for each stage of this one image, its informative patches or its groups.

    Other patches are faded, a group has its mean colour and a line around it. `attention` adds the class attention.
    """
    height, width = (round(n * max(PANEL / pixels.shape[1], 1)) for n in pixels.shape[1:])
    enlarge = Resize((height, width), InterpolationMode.NEAREST_EXACT)
    pixels = enlarge(pixels)
    panels = {'picture': pixels}
    for t in tokens:
        informative = enlarge(t.mask)
        if t.attention is not None:
            panels[f'informative from block {t.block}'] = torch.where(informative, pixels, 0.2 * pixels + 0.5)
        else:
            group = enlarge(t.groups)[0]
            sums = pixels.new_zeros(3, int(group.max()) + 1).index_add(1, group.flatten(), pixels.flatten(1))
            means = (sums / group.flatten().bincount())[:, group]
            lines = F.pad(group, [0, 1, 0, 1], value=-1)
            edge = (lines[:-1, :-1] != lines[1:, :-1]) | (lines[:-1, :-1] != lines[:-1, 1:])
            panels[f'groups from block {t.block}'] = torch.where(informative, pixels, means).masked_fill(edge, 1.)
        if attention and t.attention is not None:
            heat = enlarge(t.attention - t.attention.min())
            heat /= heat.max().clamp_min(1e-12)
            colours = torch.cat([(3 * heat - i).clamp(0, 1) for i in range(3)])  # black, red, yellow, white
            panels[f'attention before block {t.block}'] = 0.25 * pixels + 0.75 * colours

    font = ImageFont.load_default(13)
    strip = make_grid(list(panels.values()), nrow=len(panels), padding=GAP, pad_value=1.)
    right = max(0, round(font.getlength(caption)) + 2 * GAP - strip.shape[-1])
    out = to_pil_image(F.pad(strip, [0, right, LINE, LINE], value=1.))
    pen = ImageDraw.Draw(out)
    for i, label in enumerate(panels):
        pen.text((GAP + i * (width + GAP), GAP), label, fill='black', font=font)
    pen.text((GAP, out.height - LINE - GAP // 2), caption, fill='black', font=font)
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
        tokens = informative_tokens(model, x.unsqueeze(0).to(weight.dtype))
        pixels = (x * std + mean).clamp(0, 1).expand(3, -1, -1)
        yield path, draw(pixels, tokens, attention, str(Path(*path.parts[-2:])))
