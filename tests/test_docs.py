"""README and docs: links, files and options that they name exist, and their Python code and commands run.

A comment in front of a block of Python says if it is not run, and why, or what is replaced in it:

    <!-- not run: REASON -->
    <!-- run: OLD => NEW; OLD => NEW -->
"""
import ast
import os
import re
import shlex
import shutil
from configparser import ConfigParser
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
from PIL import Image
from programs import EXAMPLES, ROOT, TIMM_REPO, needs_timm_repo, run, write_digits

from timm_evovit.tools.cli import _parser

PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]
BLOCK = re.compile(r'(?:<!-- (not run|run): ([^>\n]*(?:=>[^>\n]*)*) -->\n)?^( *)```(\w+)\n(.*?)^ *```$', re.DOTALL | re.MULTILINE)
NOT_RUN = {  # beginning of a command, or a part of it: why it is not run here
    r'(pip|git|python3|\.|mv|tar|cd|sed|export)( |$)': 'sets up a machine',
    r'(ruff|mypy|pytest|TIMM_REPO=)': 'tests and checks',
    r'.*/data/imagenet': 'needs ImageNet',
    r'hf upload': 'uploads to the Hub',
    r'timm-evovit convert \S+ --output': 'downloads from Google Drive',
    r'.*benchmarks/accuracy': 'takes hours; test_accuracy_program.py has it in small',
    r'.*benchmarks/report': 'test_benchmarks.py compares what it makes with the pages',
    r'.*--suite': 'takes an hour; test_benchmarks.py has it in small',
}
IN_SMALL = {  # part of a command: arguments that take the place of those before, to run it in seconds
    'examples/quickstart.py': '--epochs 1',
    'examples/dense_features.py': '--steps 1 --batch-size 2',
    'examples/finetune.py': '--epochs 1 --batch-size 16 --workers 0',
    'benchmarks/speed.py': '-b 1 --img-size 64 --rounds 1 --warmup 0 --seconds 0',
    'timm-evovit sweep': '-b 2 --rounds 1 --limit 8 --workers 0 --keep-ratio 0.5',
    'train.py': '--epochs 1 -b 16 -j 1 --device cpu --experiment RUN',
    'validate.py': '-j 1 --device cpu',
}
every_page = pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)


class Block(NamedTuple):
    mark: str  # 'run', 'not run' or ''
    words: str
    language: str
    code: str


def blocks(page, language):
    found = [Block(mark or '', words or '', lang, re.sub(f'^{indent}', '', code, flags=re.MULTILINE))
             for mark, words, indent, lang, code in BLOCK.findall(page.read_text())]
    return [block for block in found if block.language == language]


def prose(page):
    return BLOCK.sub('', page.read_text())


def commands(page):
    """Commands in blocks of shell, each as a list of words."""
    for block in blocks(page, 'bash'):
        for line in block.code.replace('\\\n', ' ').splitlines():
            words = shlex.split(re.sub(r'\$\(.*\)', 'VALUE', line), comments=True)
            while words:
                end = words.index('&&') if '&&' in words else len(words)
                yield words[:end]
                words = words[end + 1:]


def anchors(page):
    """Anchors of the headings, as GitHub makes them."""
    headings = re.findall(r'^#+ (.*)$', prose(page), re.MULTILINE)
    return {re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in headings}


def test_the_readme_is_short():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 150


def test_every_page_is_reached_from_the_readme():
    text = (ROOT / 'README.md').read_text()
    missing = [page.name for page in PAGES[1:] if page.name != 'package_index.md' and page.name not in text]
    assert not missing


@every_page
def test_links(page):
    for target in re.findall(r'\[[^]]*\]\(([^)\s]+)\)', prose(page)):
        if '://' in target:
            continue
        file, _, anchor = target.partition('#')
        path = page.parent / file if file else page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), target


@every_page
def test_files(page):
    """Files of the repository that are named anywhere exist, but for results and pictures of them."""
    named = set(re.findall(
        r'(?<![\w/])(?:benchmarks|docs|examples|tests|timm_evovit)/[\w/.-]*\.(?:md|py|txt|yaml)\b', page.read_text()))
    named.discard('tests/test_models.py')  # timm's
    assert not [name for name in named if not (ROOT / name).is_file()]


@every_page
def test_python_compiles(page):
    for block in blocks(page, 'python'):
        ast.parse(block.code)
        assert block.mark != 'not run' or block.words


@pytest.mark.slow
@every_page
def test_python_runs(page, tmp_path):
    """The blocks of a page one after the other, in one process."""
    program = ''
    for block in blocks(page, 'python'):
        code = block.code
        if block.mark == 'not run':
            continue
        for change in filter(None, block.words.split('; ')):
            old, _, new = change.partition('=>')
            old, new = old.strip(), new.strip()
            assert old in code, f'{page.name}: {old!r} is not in the block'
            code = code.replace(old, new)
        program += code + '\n'
    if program:
        (tmp_path / 'page.py').write_text(program)
        run(tmp_path / 'page.py', cwd=tmp_path)


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
    """A folder with what the commands of the pages need, and nothing else of the repository."""
    folder = tmp_path_factory.mktemp('checkout')
    for name in ('examples', 'benchmarks'):
        (folder / name).symlink_to(ROOT / name)
    (folder / 'pytorch-image-models').symlink_to(TIMM_REPO)
    write_digits(folder / 'flowers', per_class=14)
    shutil.copytree(folder / 'flowers' / 'validation', folder / 'flowers' / 'test')
    (folder / 'photos').mkdir()
    for i, path in enumerate(sorted(folder.glob('flowers/test/*/*.png'))[:8]):
        Image.open(path).save(folder / 'photos' / f'{i}.jpg')
    weights = timm.create_model('evo_deit_small').state_dict()
    torch.save({'model': weights}, folder / 'checkpoint.pth')
    return folder


def arguments_in_small(words):
    """A command as a program and arguments, without weights from the Hub."""
    line = ' '.join(words)
    if '--pretrained' in words and 'local-dir:' not in line:
        words = [word for word in words if word != '--pretrained']
    added = [word for part, more in IN_SMALL.items() if part in line for word in more.split()]
    if words[0] == 'timm-evovit':
        main = 'import sys; from timm_evovit.tools.cli import main; sys.exit(main())'
        return ['-c', main, *words[1:], *added]
    assert words[0] == 'python', line
    return [*words[1:], *added]


def commands_to_run(page):
    return [words for words in commands(page) if not any(re.match(part, ' '.join(words)) for part in NOT_RUN)]


@pytest.mark.slow
@pytest.mark.parametrize('page', [p for p in PAGES if commands_to_run(p)], ids=lambda page: page.stem)
def test_commands_run(page, checkout):
    """One after the other, on little data."""
    shutil.rmtree(checkout / 'evo_deit_small', ignore_errors=True)  # convert does not write where another page has
    left_out = 0
    for words in commands_to_run(page):
        line = ' '.join(words)
        timms = 'pytorch-image-models/' in line
        if timms and 'TIMM_REPO' not in os.environ:
            left_out += 1
            continue
        if 'output/quickstart' in line and not (checkout / 'output' / 'quickstart').exists():
            run(EXAMPLES / 'quickstart.py', '--epochs', 1, cwd=checkout)
        checkpoint = checkout / 'output/train/RUN/model_best.pth.tar'
        if '--checkpoint output/train/RUN' in line and not timms:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            torch.save({'state_dict': timm.create_model('evo_deit_small', num_classes=10).state_dict()}, checkpoint)
        run(*arguments_in_small(words), cwd=checkout)
    if left_out:
        pytest.skip(f"{left_out} commands need timm's scripts, set TIMM_REPO to a checkout; the others passed")


def test_what_is_not_run_is_there():
    lines = [' '.join(words) for page in PAGES for words in commands(page)]
    assert not [part for part in NOT_RUN if not any(re.match(part, line) for line in lines)]
    assert not [part for part in IN_SMALL if not any(part in line for line in lines)]


@every_page
def test_commands_of_the_package(page):
    """timm-evovit and pip take what the page gives them."""
    setup = ConfigParser()
    setup.read(ROOT / 'setup.cfg')
    for words in commands(page):
        if words[0] == 'timm-evovit':
            _parser().parse_args(words[1:])
        elif words[:2] == ['pip', 'install']:
            for extra in re.findall(r'\.\[([\w,]+)\]', ' '.join(words)):
                assert set(extra.split(',')) <= set(setup['options.extras_require']), extra


@lru_cache(None)
def usage(script, command):
    """Help of a program, or of a command of it."""
    return run(script, *filter(None, [command]), '--help', cwd=ROOT)


def check_options(words, script):
    command = words[0] if words and not words[0].startswith('-') else None
    options = {word.partition('=')[0] for word in words if re.match(r'--?[a-z]', word)}
    options.discard('--config')  # train.py reads this one before the others, and its help does not name it
    text = usage(script, command if script.name == 'accuracy.py' else None)
    assert not [option for option in options if not re.search(rf'(?<![\w-]){option}(?![\w-])', text)], script.name


@pytest.mark.slow
@every_page
def test_options_of_our_programs(page):
    for words in commands(page):
        if words[0] == 'python' and words[1].startswith(('benchmarks/', 'examples/')):
            check_options(words[2:], ROOT / words[1])


@needs_timm_repo
@pytest.mark.slow
@every_page
def test_options_of_timms_scripts(page):
    for words in commands(page):
        script = next((i for i, word in enumerate(words) if word.endswith(('train.py', 'validate.py'))), None)
        if words[0] in ('python', 'torchrun') and script is not None:
            check_options(words[script + 1:], TIMM_REPO / Path(words[script]).name)
