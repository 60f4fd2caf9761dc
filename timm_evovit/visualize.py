"""Which tokens were informative: masks, pictures."""
import glob
import math
import os
from pathlib import Path
from typing import Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from torch import nn
from torch.nn import functional as F

from .training import evaluating

__all__ = ['InformativeTokens', 'draw', 'find_images', 'informative_tokens', 'open_image', 'sheet', 'visualize']

PANEL = 224  # pixels, the height of each panel; a larger input keeps its size
GAP = 8


class InformativeTokens(NamedTuple):
    """One token selection, on the grid of patches."""
    block: int  # the first block that runs on the informative tokens only
    mask: torch.Tensor  # (B, H, W) bool, True where a patch is informative
    attention: torch.Tensor  # (B, H, W) global class attention that decided


def check_evolves(model: nn.Module) -> None:
    """
    Raises:
        TypeError: The model does not evolve tokens.
    """
    if not hasattr(model, 'forward_selections'):
        raise TypeError(f'{type(model).__name__} is not a model that evolves tokens, such as evo_deit_small; '
                        f'timm_evovit.evolve makes one of a Vision Transformer.')


@torch.no_grad()
def informative_tokens(model: nn.Module, images: torch.Tensor) -> List[InformativeTokens]:
    """Find out which patches a model calls informative.

    Args:
        model: Evolving model. Used in evaluation mode and left as it was.
        images: (B, in_chans, H, W), transformed as the model wants them.

    Returns:
        One entry per token selection, in order.

    Raises:
        TypeError: The model does not evolve tokens.
    """
    check_evolves(model)
    found = []
    with evaluating(model):
        for selection, (H, W) in model.forward_selections(images):
            mask = torch.zeros_like(selection.attention, dtype=torch.bool).scatter(1, selection.kept, True)
            found.append(InformativeTokens(
                selection.block, mask.unflatten(1, (H, W)), selection.attention.unflatten(1, (H, W))))
    return found


def find_images(
        names: Iterable[Union[str, os.PathLike]],
        leave_out: Optional[Union[str, os.PathLike]] = None,
) -> List[Path]:
    """Files named directly, by a pattern, or by the folder that they are in, at any depth.

    Args:
        names: Files, folders and glob patterns. A name that is none of them is taken for a file, to be missed when it
            is opened.
        leave_out: Folder in which no folder or pattern finds anything, that of earlier drawings.

    Raises:
        FileNotFoundError: A folder holds no image.
    """
    drawings = None if leave_out is None else Path(leave_out).resolve()
    extensions = {e for e, name in Image.registered_extensions().items() if name in Image.OPEN}
    paths: List[Path] = []
    for name in names:
        path, found = Path(name), []
        if path.is_dir():
            found = sorted(p for p in path.rglob('*') if p.suffix.lower() in extensions)
        elif not path.exists():
            found = sorted(map(Path, glob.glob(str(name), recursive=True)))
        found = [p for p in found if p.is_file() and drawings not in p.resolve().parents]
        if path.is_dir() and not found:
            raise FileNotFoundError(f'{name}: no image there; give image files, folders of them or a pattern.')
        paths += found or [path]
    return list(dict.fromkeys(paths))


def open_image(path: Union[str, os.PathLike], mode: str = 'RGB') -> Image.Image:
    """Read a picture of any mode, upright, with white behind what is transparent.

    Args:
        path: File.
        mode: 'RGB' or 'L'.

    Raises:
        OSError: Not an image, or a damaged one.
    """
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode == 'F' or image.mode.startswith('I'):  # PIL would clip more than 8 bits instead of scaling
            values = np.asarray(image, dtype=np.float64)
            low, high = 0., 65535.
            if not image.mode.startswith('I;16'):  # no range is agreed on for these
                values = np.where(np.isfinite(values), values, np.nan)
                values = np.nan_to_num(values, nan=np.nanmin(values))
                low, high = values.min(), values.max()
            image = Image.fromarray(((values - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8))
        if 'A' in image.getbands() or 'transparency' in image.info:
            image = image.convert('RGBA')
            image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
        return image.convert(mode)


def _trim(image: Image.Image) -> Image.Image:
    """The middle of a picture that is longer than it could be seen: transforms scale its short side to the input size."""
    (width, height), side = image.size, 4 * min(image.size)
    left, top = max(width - side, 0) // 2, max(height - side, 0) // 2
    return image.crop((left, top, left + min(width, side), top + min(height, side)))


def _upsample(grid: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
    """(H, W) on the patch grid to (1, height, width) pixels."""
    return F.interpolate(grid[None, None].float(), size, mode='nearest')[0]


def _to_image(pixels: torch.Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] to a picture as high as a panel, or higher."""
    image = Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())
    if image.height < PANEL:
        width = max(round(image.width * PANEL / image.height), 1)
        image = image.resize((width, PANEL), Image.Resampling.NEAREST)
    return image


def draw(
        pixels: torch.Tensor,
        tokens: Sequence[InformativeTokens],
        attention: bool = False,
        caption: str = '',
) -> Image.Image:
    """Draw a picture and, for each selection, the picture with uninformative patches faded.

    Args:
        pixels: What the model saw, (3, H, W) in [0, 1].
        tokens: Selections of this one image, masks and attention (h, w).
        attention: Add the global class attention behind each selection as a heat map.
        caption: Line below.
    """
    size = pixels.shape[-2:]
    panels = [('picture', pixels)]
    for t in tokens:
        mask = _upsample(t.mask, size)
        panels.append((f'informative from block {t.block}', pixels * mask + (0.2 * pixels + 0.5) * (1 - mask)))
        if attention:
            low, high = t.attention.aminmax()
            heat = _upsample((t.attention - low) / (high - low).clamp_min(1e-12), size)
            colours = torch.cat([(3 * heat - i).clamp(0, 1) for i in range(3)])  # black, red, yellow, white
            panels.append((f'attention before block {t.block}', 0.25 * pixels + 0.75 * colours))
    images = [(label, _to_image(p)) for label, p in panels]
    font = ImageFont.load_default(13)
    width = max(sum(image.width + GAP for _, image in images) + GAP, math.ceil(font.getlength(caption)) + 2 * GAP)
    height = images[0][1].height + 2 * GAP + 18 * (2 if caption else 1)
    out = Image.new('RGB', (width, height), 'white')
    pen = ImageDraw.Draw(out)
    x = GAP
    for label, image in images:
        out.paste(image, (x, GAP + 18))
        pen.text((x, GAP), label, fill='black', font=font)
        x += image.width + GAP
    if caption:
        pen.text((GAP, height - 18 - GAP // 2), caption, fill='black', font=font)
    return out


def sheet(images: Sequence[Image.Image]) -> Image.Image:
    """Contact sheet: pictures one below the other."""
    out = Image.new('RGB', (max(i.width for i in images), sum(i.height for i in images)), 'white')
    y = 0
    for image in images:
        out.paste(image, (0, y))
        y += image.height
    return out


def _top5(logits: torch.Tensor, labels: ImageNetInfo) -> str:
    probabilities, classes = logits.float().softmax(dim=-1).topk(5)
    return '   '.join(
        f'{labels.index_to_description(c).split(",")[0]} {p:.1%}'
        for c, p in zip(classes.tolist(), probabilities.tolist()))


@torch.no_grad()
def visualize(
        model: nn.Module,
        paths: Iterable[Union[str, os.PathLike]],
        attention: bool = False,
        classes: bool = True,
) -> Iterator[Tuple[Path, Union[Image.Image, OSError]]]:
    """Draw what a model looks at in each of some image files.

    Below stand the name of the file and the five most probable classes if there are a thousand, which are taken for
    ImageNet's.

    Args:
        model: Evolving model of timm.
        paths: Image files.
        attention: Draw the class attention as well.
        classes: Name the classes.

    Yields:
        File and drawing, or the error where a file cannot be read.

    Raises:
        TypeError: The model does not evolve tokens.
    """
    check_evolves(model)
    data = resolve_model_data_config(model)
    img_size = getattr(model, 'img_size', None) or model.patch_embed.img_size or data['input_size'][1:]
    data['input_size'] = (model.in_chans, *img_size)
    if model.in_chans == 1:
        data.update({k: (sum(data[k]) / len(data[k]),) for k in ('mean', 'std')})
    transform = create_transform(**data)
    mean, std = (torch.tensor(data[k]).view(-1, 1, 1) for k in ('mean', 'std'))
    weight = next(model.parameters())
    labels = ImageNetInfo() if classes and model.num_classes == 1000 else None
    for path in map(Path, paths):
        try:
            image = _trim(open_image(path, 'L' if model.in_chans == 1 else 'RGB'))
        except Exception as e:  # decoders raise errors of every kind
            yield path, e if isinstance(e, OSError) else OSError(str(e))
            continue
        x = transform(image)
        batch = x.unsqueeze(0).to(weight.device, weight.dtype)
        tokens = [
            InformativeTokens(t.block, t.mask[0].cpu(), t.attention[0].float().cpu())
            for t in informative_tokens(model, batch)
        ]
        caption = path.name
        if labels is not None:
            with evaluating(model):
                caption += '   ' + _top5(model(batch)[0], labels)
        yield path, draw((x * std + mean).clamp(0, 1).expand(3, -1, -1), tokens, attention, caption)
