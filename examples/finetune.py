#!/usr/bin/env python3
"""Fine-tune an Evo-ViT model, or any Vision Transformer of timm made evolving, on a folder of images.

    python examples/finetune.py --data-dir flowers --model evo_deit_small --pretrained
    python examples/finetune.py --data-dir flowers --model vit_small_patch16_224.augreg_in21k_ft_in1k --pretrained
    python examples/finetune.py --data-dir flowers --model NAME --model-kwargs KEY=VALUE --checkpoint FILE

The folder has one folder per class below `train` and below `validation`. A checkpoint needs the --model and the
--model-kwargs that it was trained with. After every epoch in which top-1 rises, --output receives `checkpoint.pth`, for
`--checkpoint` of timm's scripts, and the folder `model`, for `timm.create_model('local-dir:OUTPUT/model',
pretrained=True)` or the Hugging Face Hub.
"""
import argparse
from pathlib import Path

import timm
import torch
from timm.data import create_dataset, create_loader, resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ParseKwargs
from torch import nn
from tqdm import tqdm

from timm_evovit import AssistedLoss, evolve
from timm_evovit.tools.load import load_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--data-dir', type=Path, required=True, help='folder with train/CLASS/* and validation/CLASS/*')
parser.add_argument(
    '--model', default='evo_deit_small', help='evo_*, or Vision Transformer, which is evolved (default: %(default)s)')
start = parser.add_mutually_exclusive_group()
start.add_argument('--pretrained', action='store_true', help="start from the model's pretrained weights")
start.add_argument('--checkpoint', metavar='FILE', help="start from weights, such as those of timm's train.py")
parser.add_argument('--use-ema', action='store_true', help="the checkpoint's moving average of the weights")
parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, help='further arguments of the model')
parser.add_argument('--crop-pct', type=float, help="for validation, the model's own by default")
parser.add_argument('--img-size', type=int, help="the model's own by default")
parser.add_argument(
    '--keep-ratio', type=float, help="ratio of slow tokens to patches (default: the model's own, 0.6 if it is evolved)")
parser.add_argument('--epochs', type=int, default=30)
parser.add_argument('--batch-size', type=int, default=64)
parser.add_argument('--lr', type=float, default=5e-5)
parser.add_argument('--weight-decay', type=float, default=0.05)
parser.add_argument(
    '--layer-decay', type=float, default=0.75, help='factor on the learning rate from one block to the one below')
parser.add_argument('--amp', action='store_true', help='autocast to bfloat16')
parser.add_argument('--workers', type=int, default=4)
parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
parser.add_argument('--output', type=Path, default=Path('output/finetune'))


def main():
    args = parser.parse_args()
    for option, least in ('epochs', 1), ('batch_size', 1), ('workers', 0), ('lr', 0), ('weight_decay', 0):
        if not vars(args)[option] >= least:  # or it is no number
            parser.error(f"--{option.replace('_', '-')} must be {least} or more, got {vars(args)[option]}")
    for folder in (args.data_dir / 'train', args.data_dir / 'validation'):
        if not folder.is_dir():
            parser.error(f'--data-dir {args.data_dir}: there is no folder {folder}')
    datasets = [
        create_dataset('', root=args.data_dir, split=split, is_training=split == 'train')
        for split in ('train', 'validation')]
    classes = sorted(datasets[0].reader.class_to_idx, key=datasets[0].reader.class_to_idx.get)
    if classes == ['']:
        parser.error(f'--data-dir {args.data_dir}: there must be a folder of pictures per class below train')
    if list(datasets[1].reader.class_to_idx) != list(datasets[0].reader.class_to_idx):
        parser.error(f'--data-dir {args.data_dir}: train and validation must have the same classes')
    if len(datasets[0]) < args.batch_size:
        parser.error(f'--batch-size {args.batch_size} is more than the {len(datasets[0])} images for training')

    size = (args.img_size, args.img_size) if args.img_size else None
    kwargs = args.model_kwargs
    if not args.checkpoint:  # timm fits the weights to the classes and the size
        overlay = {'pretrained_cfg_overlay': {'input_size': (3, *size)}} if size else {}
        kwargs = {'num_classes': len(classes), **overlay, **kwargs}
    try:
        data = {'crop_pct': args.crop_pct} if args.crop_pct else None
        model = load_model(args.model, args.pretrained, args.checkpoint, args.use_ema, data, **kwargs)
        if size and size != model.pretrained_cfg['input_size'][1:]:  # of a checkpoint or a saved folder
            if not hasattr(model, 'set_input_size'):
                raise ValueError(f'--img-size must be left out: {args.model} takes the size that it was saved with')
            model.set_input_size(size)
            model.pretrained_cfg['input_size'] = (model.in_chans, *size)
        model = model if hasattr(model, 'set_keep_ratio') else evolve(model)
        if args.keep_ratio is not None:
            model.set_keep_ratio(args.keep_ratio)
        model.to(args.device)
        args.output.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError, TypeError, ValueError) as e:
        parser.error(str(e))
    if not args.pretrained and not args.checkpoint:
        print('The weights are random; --pretrained or --checkpoint give others.')
    if model.num_classes != len(classes):
        model.reset_classifier(len(classes))
        model.to(args.device)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    if getattr(model, 'assisted_cls', False):  # the paper's loss: mean of the losses of the patches and the class token
        model.set_assisted_training()
        criterion = AssistedLoss(criterion)

    data = resolve_model_data_config(model)
    for dataset in datasets:
        dataset.input_img_mode = 'RGB' if data['input_size'][0] == 3 else 'L'
    loader_args = dict(
        input_size=data['input_size'], mean=data['mean'], std=data['std'], interpolation=data['interpolation'],
        batch_size=args.batch_size, num_workers=args.workers, persistent_workers=args.workers > 0,
        use_prefetcher=False)
    train = create_loader(
        datasets[0], is_training=True, auto_augment='rand-m7-mstd0.5-inc1', re_prob=0.25, **loader_args)
    validation = create_loader(datasets[1], crop_pct=data['crop_pct'], **loader_args)
    optimizer = create_optimizer_v2(
        model, opt='adamw', lr=args.lr, weight_decay=args.weight_decay, layer_decay=args.layer_decay)
    updates = len(train)
    scheduler, _ = create_scheduler_v2(
        optimizer, num_epochs=args.epochs, warmup_epochs=min(3, args.epochs - 1), warmup_lr=1e-6, min_lr=1e-6,
        step_on_epochs=False, updates_per_epoch=updates)
    amp = torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.amp)

    best = -1.
    for epoch in range(args.epochs):
        model.train()
        for i, (images, target) in enumerate(tqdm(train, f'epoch {epoch}', disable=None)):
            scheduler.step_update(epoch * updates + i)
            with amp:
                loss = criterion(model(images.to(args.device)), target.to(args.device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        with torch.inference_mode(), amp:
            right = sum((model(x.to(args.device)).argmax(dim=1).cpu() == y).sum().item() for x, y in validation)
        top1 = 100 * right / len(datasets[1])
        print(f'epoch {epoch}: loss {loss.item():.3f}, top-1 {top1:.2f} %')
        if top1 > best:
            best = top1
            torch.save({'arch': args.model, 'epoch': epoch, 'state_dict': model.state_dict()},
                       args.output / 'checkpoint.pth')
            timm.models.save_for_hf(
                model, args.output / 'model', model_config={'label_names': classes},
                model_args=model.model_args, safe_serialization=True)
    print(f'best top-1 {best:.2f} %, saved to {args.output}')


if __name__ == '__main__':
    main()
