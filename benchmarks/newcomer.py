#!/usr/bin/env python3
"""Run `.ci/run`, which is the README's commands for a newcomer in a new environment, and record what they print.

    python benchmarks/newcomer.py --output benchmarks/results/newcomer.json
"""
import argparse
import subprocess
import sys
from pathlib import Path
from typing import List, Optional

import harness

RUN = Path(__file__).parent.parent / '.ci' / 'run'


def main(argv: Optional[List[str]] = None) -> harness.Report:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, metavar='JSON', help='result file')
    args = parser.parse_args(argv)
    process = subprocess.Popen([RUN], stdout=subprocess.PIPE, text=True)
    lines = []
    for line in process.stdout:
        print(line, end='', flush=True)
        lines.append(line.rstrip())
    if process.wait():
        raise SystemExit(f'.ci/run failed, exit status {process.returncode}')
    header = next(i for i, line in enumerate(lines) if line.startswith('model ') and 'top-1 %' in line)
    # only now: the tests that .ci/run runs compare the documentation with the results that are there
    report = harness.Report('newcomer', args.output, argv=sys.argv[1:] if argv is None else argv)
    report.add({'command': 'python examples/quickstart.py', 'output': '\n'.join(lines[header:header + 4])},
               {'command': 'pytest', 'output': lines[-1].strip('= ')})
    return report


if __name__ == '__main__':
    main()
