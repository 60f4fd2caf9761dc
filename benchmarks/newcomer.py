#!/usr/bin/env python3
"""Run the commands that the README gives a newcomer, and record the last lines that they print.

    python benchmarks/newcomer.py --output benchmarks/results/newcomer.json
"""
import argparse
import shlex
import subprocess
import sys
from pathlib import Path
from typing import List, Optional

import harness

COMMANDS = {'python examples/quickstart.py': 4, 'pytest': 1}  # number of lines


def main(argv: Optional[List[str]] = None) -> harness.Report:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, metavar='JSON', help='result file')
    args = parser.parse_args(argv)
    report = harness.Report('newcomer', args.output, argv=sys.argv[1:] if argv is None else argv)
    for command, count in COMMANDS.items():
        program, *words = shlex.split(command)
        words = [sys.executable, *(words if program == 'python' else ['-m', program, *words])]
        done = subprocess.run(words, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f'{command} failed, exit status {done.returncode}:\n{done.stdout}')
        lines = done.stdout.strip().splitlines()[-count:]
        report.add({'command': command, 'output': '\n'.join(lines).strip('= ')})
        print(f'$ {command}', *lines, sep='\n', flush=True)
    return report


if __name__ == '__main__':
    main()
