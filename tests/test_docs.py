"""README and docs: links, files and options that they name exist, and their Python code runs.

A comment in front of a block of Python says if it is not run, and why, or what is replaced in it:

    <!-- not run: REASON -->
    <!-- run: OLD => NEW; OLD => NEW -->
"""
import ast
import re
import shlex
from configparser import ConfigParser
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pytest
from programs import ROOT, TIMM_REPO, needs_timm_repo, run

from timm_evovit.tools.cli import _parser

PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]
BLOCK = re.compile(r'(?:<!-- (not run|run): ([^>\n]*(?:=>[^>\n]*)*) -->\n)?^( *)```(\w+)\n(.*?)^ *```$', re.DOTALL | re.MULTILINE)
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
