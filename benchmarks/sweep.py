#!/usr/bin/env python3
"""Run `timm-evovit sweep` and record what it has measured, with what it was measured on.

    python benchmarks/sweep.py local-dir:output/quickstart/deit_tiny_patch16_224 --pretrained \\
        --data-dir output/quickstart/digits --output benchmarks/results/sweep-deit.json
"""
import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import List, Optional

import harness

from timm_evovit.tools import cli


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, required=True, metavar='JSON', help='result file')
    parser.add_argument('--device', default='cpu')
    args, others = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if status := cli.main(['sweep', *others, '--device', args.device, '--output', folder]):
            raise SystemExit(status)
        found = json.loads(Path(folder, 'sweep.json').read_text())
    command = harness.command('sweep', sys.argv[1:] if argv is None else argv)
    harness.write(args.output, {'benchmark': 'sweep', **harness.made_with(args.device), 'command': command, **found})


if __name__ == '__main__':
    main()
