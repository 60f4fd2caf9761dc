"""README and docs: links, files and options that they name exist, and their Python code and commands run.

A comment in front of a block of Python says if it is not run, and why, or what is replaced in it:

    <!-- not run: REASON -->
    <!-- run: OLD => NEW; OLD => NEW -->
"""
import argparse
import os
import re
import shlex
import shutil
from configparser import ConfigParser

import pytest
import timm
import torch
from PIL import Image
from programs import EXAMPLES, ROOT, TIMM_REPO, needs_timm_repo, run, write_digits
from timm.utils import ParseKwargs

from timm_evovit.tools.cli import _parser

PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]
BLOCK = re.compile(r'(?:<!-- (not run|run): ([^>\n]*(?:=>[^>\n]*)*) -->\n)?^( *)```(\w+)\n(.*?)^ *```$', re.DOTALL | re.MULTILINE)
NOT_RUN = {  # beginning of a command, or a part of it: why it is not run here
    r'(pip|git|python3|\.|mv|tar|cd|sed|export)( |$)': 'sets up a machine',
    r'(ruff|mypy|pytest|TIMM_REPO=)': 'tests and checks',
    r'.*(/data/imagenet|--dataset-download)': 'needs data that is downloaded',
    r'hf upload': 'uploads to the Hub',
    r'timm-evovit convert \S+ --output': 'downloads from Google Drive',
    r'.*benchmarks/accuracy': 'takes hours; test_benchmarks.py has it in small',
    r'.*benchmarks/report': 'test_benchmarks.py compares what it makes with the pages',
    r'.*(--suite|benchmarks/service)': 'takes long; test_benchmarks.py has it in small',
}
IN_SMALL = {  # part of a command: arguments that take the place of those before, to run it in seconds
    'examples/quickstart.py': '--epochs 1',
    'examples/dense_features.py': '--steps 1 --batch-size 2',
    'examples/export_onnx.py': '--num-pictures 2 --batch-size 1',
    'export_onnx.py evo_deit': '--model-kwargs depth=6',
    'export_onnx.py evo_vit': '--model-kwargs base=vit_tiny_patch16_224 depth=2',
    'examples/finetune.py': '--epochs 1 --batch-size 16 --workers 0',
    'benchmarks/speed.py': '-b 1 --img-size 64 --rounds 1 --warmup 0 --seconds 0',
    'timm-evovit sweep': '-b 2 --rounds 1 --limit 8 --workers 0 --keep-ratio 0.5',
    'train.py': '--epochs 1 -b 16 -j 1 --device cpu --experiment RUN',
    'validate.py': '-j 1 --device cpu',
}
every_page = pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)


def blocks(page, language):
    """Mark ('run', 'not run' or ''), its words and the code of each block."""
    return [(mark, words, re.sub(f'^{indent}', '', code, flags=re.MULTILINE))
            for mark, words, indent, found, code in BLOCK.findall(page.read_text()) if found == language]


def prose(page):
    return BLOCK.sub('', page.read_text())


def commands(page):
    """Commands in blocks of shell, each as a list of words."""
    for *_, code in blocks(page, 'bash'):
        for line in re.split('\n|&&', code.replace('\\\n', ' ')):
            if words := shlex.split(re.sub(r'\$\(.*\)', 'VALUE', line), comments=True):
                yield words


def anchors(page):
    """Anchors of the headings, as GitHub makes them."""
    headings = re.findall(r'^#+ (.*)$', prose(page), re.MULTILINE)
    return {re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in headings}


@every_page
def test_links_and_files(page):
    """Links lead somewhere, and files of the repository that are named anywhere exist."""
    for target in re.findall(r'\[[^]]*\]\(([^)\s]+)\)', prose(page)):
        file, _, anchor = target.partition('#')
        path = page.parent / file if file else page
        assert '://' in target or path.exists() and (not anchor or anchor in anchors(path)), target
    named = set(re.findall(
        r'(?<![\w/])(?:benchmarks|docs|examples|tests|timm_evovit)/[\w/.-]*\.(?:md|py|txt|yaml)\b', page.read_text()))
    named.discard('tests/test_models.py')  # timm's
    assert not [name for name in named if not (ROOT / name).is_file()]


@pytest.mark.slow
@every_page
def test_python_runs(page, tmp_path):
    """The blocks of a page one after the other, in one process. The others compile."""
    program = ''
    for mark, words, code in blocks(page, 'python'):
        for old, new in re.findall(r'([^;]*?) => ?([^;]*)', words) if mark == 'run' else ():
            assert old.strip() in code, f'{page.name}: {old!r} is not in the block'
            code = code.replace(old.strip(), new.strip())
        compile(code, page.name, 'exec')
        program += '' if mark == 'not run' else code + '\n'
    (tmp_path / 'page.py').write_text(program)
    run(tmp_path / 'page.py', cwd=tmp_path)


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
    """A folder with what the commands of the pages need, and nothing else of the repository."""
    folder = tmp_path_factory.mktemp('checkout')
    for name in ('examples', 'benchmarks'):
        (folder / name).symlink_to(ROOT / name)
    (folder / 'pytorch-image-models').symlink_to(TIMM_REPO)
    write_digits(folder / 'flowers', per_class=5)
    shutil.copytree(folder / 'flowers' / 'validation', folder / 'flowers' / 'test')
    for name, suffix, count in (('photos', 'jpg', 8), ('pictures', 'png', 40)):  # without classes
        (folder / name).mkdir()
        for i, path in enumerate(sorted(folder.glob('flowers/train/*/*.png'))[:count]):
            Image.open(path).save(folder / name / f'{i}.{suffix}')
    timm.models.save_for_hf(
        timm.create_model('vit_tiny_patch16_224', depth=2, num_classes=102), folder / 'my_vit', model_args=dict(depth=2))
    weights = timm.create_model('evo_deit_small').state_dict()
    torch.save({'model': weights}, folder / 'checkpoint.pth')
    return folder


def arguments_in_small(words):
    """A command as a program and arguments, without weights from the Hub."""
    line = ' '.join(words)
    if '--pretrained' in words and 'local-dir:' not in line:
        words = [word for word in words if word != '--pretrained']
    added = [word for part, more in IN_SMALL.items() if part in line for word in more.split()]
    main = 'import sys; from timm_evovit.tools.cli import main; sys.exit(main())'
    program = {'python': [], 'timm-evovit': ['-c', main]}[words[0]]
    return [*program, *words[1:], *added]


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
        if '--checkpoint output/train/RUN' in line and not timms:
            checkpoint = checkout / words[words.index('--checkpoint') + 1]
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            name = words[words.index('--model') + 1] if '--model' in words else words[2]
            kwargs = argparse.ArgumentParser(allow_abbrev=False)
            kwargs.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs)
            kwargs = kwargs.parse_known_args(words)[0].model_kwargs
            torch.save({'state_dict': timm.create_model(name, num_classes=10, **kwargs).state_dict()}, checkpoint)
        run(*arguments_in_small(words), cwd=checkout)
    if left_out:
        pytest.skip(f"{left_out} commands need timm's scripts, set TIMM_REPO to a checkout; the others passed")


@every_page
def test_commands_of_the_package(page):
    """timm-evovit and pip take what the page gives them."""
    setup = ConfigParser()
    setup.read(ROOT / 'setup.cfg')
    for words in commands(page):
        if words[0] == 'timm-evovit':
            _parser().parse_args(words[1:])
        for extra in re.findall(r"\.\[([\w,]+)\]", ' '.join(words)) if words[:2] == ['pip', 'install'] else ():
            assert set(extra.split(',')) <= set(setup['options.extras_require']), extra


@pytest.mark.parametrize('timms', [False, pytest.param(True, marks=needs_timm_repo)], ids=['ours', 'timm'])
@every_page
def test_options_of_programs(page, timms):
    """Of ours and of timm's scripts, of commands too that are not run here."""
    for words in commands(page):
        line = ' '.join(words)
        found = re.search(r'(?:train|validate)\.py' if timms else r'(?:benchmarks|examples)/\w+\.py', line)
        if found and re.match('python|torchrun', line) and timms != (' examples/' in line or ' benchmarks/' in line):
            shared = [] if timms else [ROOT / 'benchmarks' / name for name in ('harness.py', 'speed.py')]  # parsers
            sources = [(TIMM_REPO if timms else ROOT) / found[0], *shared]
            known = {option for path in sources for option in re.findall(r"'(--?[a-z][\w-]*)'", path.read_text())}
            assert {*re.findall(r' (--?[a-z][\w-]*)', line[found.end():])} <= known, line
