"""Reports of a run, of several, and what opens the explorer

The last ends with it: the server, the notebook, and the server's own temporary files."""
import json, os, re, shutil, signal, socket, time
from dataclasses import replace
from html.parser import HTMLParser
from multiprocessing import get_context
from pathlib import Path

import pytest
from PIL import Image
from machines import linux
from sagan.comparison import report_runs, run_names
from sagan.config import preset
from sagan.diagnostics import few_passes
from sagan.reports import format_scores, open_notebook, run_frames, run_notes
from sagan.runs import load_run, report_run, train_run
from sagan.storage import read_json

VOID = {'br', 'hr', 'img', 'input', 'link', 'meta'}
SCORES = dict(
    fid=3.5, samples=60, inception_score=1.2, evaluator='small CNN (weights ab)', reference='digits')


class Whole(HTMLParser):
    "A page whose elements are closed in order, and whose names of elements are different"
    def __init__(self, page):
        super().__init__()
        self.open, self.ids, self.words = [], [], []
        self.feed(page)
        self.close()
        assert not self.open and len(set(self.ids)) == len(self.ids)
        self.text = ' '.join(''.join(self.words).split())
    def handle_starttag(self, tag, attrs):
        if tag not in VOID: self.open.append(tag)
        self.ids += [v for k, v in attrs if k == 'id']
    def handle_startendtag(self, tag, attrs): self.ids += [v for k, v in attrs if k == 'id']
    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_data(self, data):
        if self.open[-1:] not in (['style'], ['script']): self.words.append(data)


def files_of(folder): return {f: (f.stat().st_mtime_ns, f.stat().st_size) for f in folder.rglob('*')}


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run of four steps, with a grid of each; its log then gets scores, warnings and a change of rates"
    folder = tmp_path_factory.mktemp('report')/'cats & dogs'
    train_run(None, folder, 'tiny', steps=4, batch=8, z_dim=8, device='cpu',
              tell=lambda text: None)
    log = folder/'log.jsonl'
    *others, last = [json.loads(line) for line in log.read_text(encoding='utf-8').splitlines()]
    warned = dict(warnings=['D <b>wins</b>', *few_passes(1797, 4, 8).values()])
    made = [dict(last, step=s) | warned for s in (2, 3)]
    made[0] |= dict(changes=[dict(step=2, lr_g=[1e-3, 1e-4])], init_from=dict(run='digits', step=1800))
    made[0] |= SCORES
    records = [*others, *made, last | SCORES | dict(fid=2.25)]
    log.write_text(''.join(json.dumps(r) + '\n' for r in records), encoding='utf-8')
    return folder


def test_a_report_tells_the_run(run, tmp_path):
    "Figures, warnings, scores, and settings that differ; one file, which leaves a folder as it is"
    before = files_of(run)
    page = report_run(run, out=tmp_path/'page.html').read_text(encoding='utf-8')
    assert files_of(run) == before and len(page) < 3e6
    text = Whole(page).text
    for part in ('Images 1,797 10 classes', 'Steps 4 of 8 images', 'Passes over the data 0.0178',
                 'FID, lower is better 2.25 at step 4, 60 samples, by small CNN', 'see below',
                 'Warning at steps 2, 3: D <b>wins</b>', 'Warning: the run sees 32 images',
                 'This run is too short to show more', 'A bound is the value', 'lr_g from 0.001 to 0.0001',
                 'It began with the weights of digits at step 1800', 'Step 4, 0.0178 passes',
                 'Setting This run Preset tiny Meaning z_dim 8 128'):
        assert part.replace(' ', '') in text.replace(' ', ''), part
    assert '<div class="bad"><dt>Warnings</dt>' in page
    assert 'tells how much the network uses attention.' in text and 'running means' not in text   # of so few
    own = re.sub('srcdoc="[^"]*"', '', page)
    assert '\\n' not in text and re.search('in [0-9]+\u00a0s[.]', page)
    assert '://' not in own and page.count('<iframe') == 1 and own.count('class="shown"') == 1


def test_a_warning_of_few_passes_is_that_of_all_steps(run):
    "Also after a resume with more steps: with other figures, or not at all if they are enough"
    loaded = load_run(run)
    def said(steps):
        notes = run_notes(replace(loaded, cfg=loaded.cfg.change(steps=steps)))
        return [note for note in notes if 'the run sees' in note]
    assert said(4) and said(8)[0].startswith('Warning: the run sees 64 images, 0.04 of one pass')
    assert said(1124) == [] and len(said(1123)) == 1


def test_a_sign_that_comes_back_is_one_note(run):
    "With all its steps, and the figures of the last"
    records = [dict(step=s, warnings=[f'the diversity is {s/1000:.1%}']) for s in (20, 40)]
    note, = run_notes(replace(load_run(run), records=records))
    assert note == 'Warning at steps 20, 40: the diversity is 4.0%'


def test_random_features_are_not_taken_for_a_success():
    scores = dict(fid=.011, evaluator='untrained small CNN (random features) at seed 0')
    assert 'no success' in format_scores(scores).splitlines()[-1]
    assert 'no success' not in format_scores(scores | dict(evaluator='small CNN'))


def test_grids_of_a_training_name_their_classes(run):
    "On their left, which a report leaves out, as it has names of its own"
    with Image.open(run/'samples/step-0000004.png') as im:
        wide = im.width - 274
        names, grid = im.crop((0, 0, wide, 342)), im.crop((wide, 0, im.width, 342))
    rows = [names.crop((0, 34*i, names.width, 34*(i + 1))).convert('L').getextrema() for i in range(10)]
    assert all(low < 100 and high == 255 for low, high in rows)
    step, shown = run_frames(load_run(run))[-1]
    assert step == 4 and shown.size == (274, 342) and shown.tobytes() == grid.convert('RGB').tobytes()


def test_a_report_takes_what_sagan_eval_left(run, tmp_path):
    "And leaves out what is damaged: an evaluation, a grid"
    shutil.copytree(run, folder := tmp_path/'run')
    (folder/'eval.json').write_text(json.dumps(SCORES | dict(step=4, fid=1.125)), encoding='utf-8')
    Image.new('RGB', (9, 9), 'red').save(folder/'nearest.png')
    (folder/'eval-n9.json').write_text('{', encoding='utf-8')
    (folder/'samples/step-0000002.png').write_text('no picture', encoding='utf-8')
    with pytest.warns(UserWarning, match='is left out') as caught: file = report_run(folder)
    page = file.read_text(encoding='utf-8')
    assert len([w for w in caught if 'left out' in str(w.message)]) == 2
    for part in ('sagan-eval, step 4', '<td>1.12</td>', 'alt="Nearest training images"'): assert part in page
    assert page.count('alt="Samples "') == 4


def test_the_score_of_a_run_that_did_not_measure(run, tmp_path, monkeypatch):
    "The report names the command, and after that command, its score"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, folder := Path('runs/digits'))
    log = (folder/'log.jsonl').read_text(encoding='utf-8')
    (folder/'log.jsonl').write_text(re.sub('"fid": [^,}]+', '"fid": null', log), encoding='utf-8')
    def tile(folder, out=None):
        page = report_run(folder, out=out).read_text(encoding='utf-8')
        return re.search('<dt>(FID[^<]*|Score)</dt>.*?</div>', page, re.S)[0]
    assert f'sagan-eval {folder} measures one' in tile(folder)
    (folder/'eval.json').write_text(json.dumps(SCORES | dict(step=4, fid=1.125)), encoding='utf-8')
    assert '1.12' in tile(folder) and 'measures' not in tile(folder)
    assert 'sagan-eval digits measures one' in tile('digits') and Path('digits-attention.png').exists()


def test_runs_with_long_names_are_told_apart():
    names = run_names([Path(f'/x/{"a"*35}{i}{"b"*35}') for i in (1, 2)])
    assert len(set(names)) == 2 and all(len(n) < 70 for n in names)


def test_runs_side_by_side(run, tmp_path, monkeypatch):
    "What differs, samples at equal steps, and scores that cannot be compared"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, other := tmp_path/'other')
    config = read_json(other/'config.json')
    config['config'] |= dict(steps=5)
    (other/'config.json').write_text(json.dumps(config), encoding='utf-8')
    (other/'samples/step-0000003.png').unlink()
    log = (other/'log.jsonl').read_text(encoding='utf-8')
    (other/'log.jsonl').write_text(log.replace('"samples": 60', '"samples": 70'), encoding='utf-8')
    before = files_of(run), files_of(other)
    file = report_runs(run, other)
    assert file == Path('compare-cats & dogs-other.html') and (files_of(run), files_of(other)) == before
    page = file.read_text(encoding='utf-8')
    text = Whole(page).text
    assert 'Settingcats&dogsothersteps45All' in text.replace(' ', '')
    assert 'cannot be compared' in text and '://' not in page
    frames = json.loads(re.search("data-frames=\"([^\"]*)\"", page)[1].replace('&quot;', '"'))
    assert [step for step, _ in frames] == [0, 1, 2, 4] and page.count('alt="Samples other"') == 4
    with pytest.raises(ValueError, match='is given twice'): report_runs(run, other, run)
    with pytest.raises(ValueError, match='data is for'): report_runs(run, other, data='digits')
    with pytest.raises(OSError, match='--out'): report_runs(run, other, out=tmp_path/'none'/'page.html')


SERVER = """import os, pathlib, sys, tempfile, time
tempfile.mkdtemp()
pathlib.Path('new').write_text(f'{os.getpid()} {sys.argv[1]}')
pathlib.Path('new').rename('server')
time.sleep(300)
"""


def until(condition):
    "Wait for something"
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(.02)


@pytest.fixture
def command(tmp_path, monkeypatch):
    "`open_notebook` in a process of its own, with a program that only waits in place of the server"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    for module in ('voila', 'jupyterlab'): (tmp_path/f'{module}.py').write_text(SERVER, encoding='utf-8')
    (tmp_path/'temporary').mkdir()
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path/'temporary'))
    given = 'run', 'cpu', None, lambda text: None
    process = get_context('fork').Process(target=open_notebook, args=given)
    # as in a terminal, also where these tests run under nohup
    usual = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    process.start()
    signal.signal(signal.SIGHUP, usual)
    yield process
    process.kill()


@pytest.mark.parametrize('sig, status', [
    ('SIGTERM', 143), ('SIGHUP', 129), ('SIGINT', 0), ('SIGKILL', -9)])
@linux
def test_nothing_outlives_the_command_however_it_ends(command, tmp_path, sig, status):
    until((tmp_path/'server').exists)
    pid, notebook = (tmp_path/'server').read_text(encoding='utf-8').split()
    assert 'load_run' in read_json(notebook)['cells'][1]['source']
    os.kill(command.pid, signal.Signals[sig])
    command.join(30)
    assert command.exitcode == status
    until(lambda: not Path(f'/proc/{pid}').exists())
    until(lambda: not os.listdir(tmp_path/'temporary'))


def test_port_and_browser(tmp_path, monkeypatch):
    "Are handed to the server, and the address is told; a port that cannot be used is said at once"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    listed = "import pathlib, sys\npathlib.Path('arguments').write_text(' '.join(sys.argv[2:]))\n"
    for module in ('voila', 'jupyterlab'): (tmp_path/f'{module}.py').write_text(listed, encoding='utf-8')
    told = []
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
        with pytest.raises(ValueError, match=f'port {port} cannot be used here; name another one'):
            open_notebook('run', tell=told.append, port=port)
    for wrong in (0, 70000, '80'):
        with pytest.raises(ValueError, match='port'): open_notebook('run', tell=told.append, port=wrong)
    assert not told
    open_notebook('run', tell=told.append, port=port, browser=False)
    arguments = (tmp_path/'arguments').read_text(encoding='utf-8').split()
    assert f'--port={port}' in arguments and '--no-browser' in arguments
    # a page that is reloaded leaves no kernel: its request to stop it is accepted, and an idle one stops
    assert '--Voila.tornado_settings=disable_check_xsrf=1' in arguments
    assert '--MappingKernelManager.cull_idle_timeout=300' in arguments
    assert told == [f'the explorer opens at http://localhost:{port}; Ctrl-C ends it']
    open_notebook('run', tell=told.append)
    assert '--no-browser' not in (tmp_path/'arguments').read_text(encoding='utf-8')
