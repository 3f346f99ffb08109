"Names are data: whatever classes are called, and wherever output leads, a training ends with its report"
import io, os, re, subprocess, sys, warnings
from pathlib import Path

import numpy as np, pytest, torch
from PIL import Image
from sagan.cli import sagan_train
from sagan.data import image_dls, Images
from sagan.names import (
    class_numbers, encodable, figure_label, file_name, listed, prepare_output, readable, say, split_classes)
from sagan.pages import report_html
from sagan.reports import seeded_latents, suggest_out, UnstoredScores
from sagan.runs import attend_run, evaluate_run, explore_run, load_run, resume_run, shipped, train_run
from sagan.sampling import describe_samples, draw_rows, sample_picture, sample_run, sampled_classes
from sagan.visualization import class_rows

linux = pytest.mark.skipif(sys.platform != 'linux', reason='Linux allows any bytes in the name of a file')
NAMES = ['$5_$10', '$_$', r'a^b_{c}\d', 'salt, pepper', '"quoted\' & co', '<script>alert(1)<', 'new\nline',
         'tab\tand\x1b[31mred', '😀', '日本語', 'שלום', 'abc\u202egpj', ' ', '\u200b', 'x'*250, 'Cat', 'cat',
         'cafe\u0301', 'café', os.fsdecode(b'caf\xe9'), '__main__', '3', 'None', '-n',
         '%s {0} {run!r}', '&lt;']


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run of two steps on a folder of such classes, in a folder whose name is not UTF-8"
    tmp = tmp_path_factory.mktemp('names')/os.fsdecode(b'd\xe9j\xe0 $_$ \n')
    data = tmp/os.fsdecode(b'ph\xf6tos')
    x = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    for c in NAMES:
        (data/c).mkdir(parents=True)
        for i in range(2): Image.fromarray(x[i]).save(data/c/f'{i}.png')
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        return train_run(data, tmp/'run', 'tiny', steps=2, g_width=2, d_width=4, batch=4, device='cpu',
                         tell=lambda text: None)


@linux
def test_whatever_classes_are_called(run, tmp_path):
    "The report, every picture and page is there; names are text in it, in UTF-8"
    assert sorted(run.classes) == sorted(encodable(c) for c in NAMES) and r'caf\xe9' in run.classes
    page = (run.folder/'report.html').read_text(encoding='utf-8')
    assert '<script>alert' not in page and '&lt;script&gt;alert' in page and '\x1b' not in page
    wide, high = Image.open(sample_run(run, n=1)).size
    assert wide > 36 and high == 20*34 + 2  # names before the images
    assert Image.open(sample_run(run, n=1, classes=list(run.classes))).height == 26*34 + 2
    assert len({sample_run(run, n=1, classes=c) for c in run.classes}) == len(NAMES)
    assert all(attend_run(run, label=c, n=1).exists() for c in ('$_$', 'x'*250, os.fsdecode(b'caf\xe9')))
    text = explore_run(run, images=run.cfg.data, out=tmp_path/'page.html').read_text(encoding='utf-8')
    assert '<script>alert' not in text
    assert run.folder.name == 'run' and load_run(run.folder).classes == run.classes
    assert resume_run(run.folder, steps=3, tell=lambda text: None).step == 3


@linux
def test_scores_and_a_shared_folder(run, tmp_path):
    "And the card of a shared model keeps names out of its Markdown"
    sharing = pytest.importorskip('sagan.sharing')
    odd = dict(step=2, evaluator='$_$ \x1b', reference='<script>')
    scores = dict(fid=1., samples=60, inception_score=1., kid=0., diversity=1.) | odd
    r = load_run(run.folder)
    model = sharing.PretrainedSAGAN(r.model, r.classes, r.step, r.records, dict(eval=scores))
    model.save_pretrained(tmp_path/'shared')
    card = (tmp_path/'shared/README.md').read_text(encoding='utf-8').split('---')[2]
    assert '<script>' not in card and '$_$' not in card and '\x1b' not in card
    assert sharing.PretrainedSAGAN.from_pretrained(tmp_path/'shared').classes == run.classes


def test_ways_to_show_a_name():
    shown = [readable(n) for n in NAMES]
    assert not any(re.search('[\x00-\x1f\x7f-\x9f\u202e\u200b\ud800-\udfff]', s) for s in shown)
    assert all(0 < len(s.encode()) and len(s) <= 60 for s in shown) and len(set(shown)) == len(NAMES)
    assert [encodable(n) for n in ('\ud800', 'caf\udce9', 'café')] == [r'\ud800', r'caf\xe9', 'café']
    assert readable('👩\u200d🔬') == '👩\u200d🔬'  # joiners stay
    assert [len(readable('x'*n, 10)) for n in (9, 10, 11, 300)] == [9, 10, 10, 10]
    assert listed([]) == 'none' and listed([str(i) for i in range(1000)], 2) == '0, 1 and 998 more'


def test_file_names():
    "Of at most 200 bytes, without what a file system does not allow; two questions are two names"
    files = [file_name('samples', '.png', classes=n) for n in [*NAMES, '日'*300, '日'*299, '../up', 'a:b*c']]
    assert len(set(files)) == len(files) and all(len(f.encode()) <= 200 for f in files)
    assert not any(re.search(r'[<>:"/\\|?*\x00-\x1f]', f) for f in files)


@pytest.mark.filterwarnings('error')
def test_figures_draw_any_name():
    "Without a formula, and without a warning for each letter that the font lacks"
    page = report_html('$_$ \ud800', '<b>', [('\x1b', class_rows(torch.zeros(len(NAMES), 3, 4, 4), NAMES))],
                       {'<i>': '\udce9'})
    assert page.encode() and '<b>' not in page and '<i>' not in page and '\x1b' not in page
    assert [figure_label(n) for n in ('$5_$10', 'cat')] == [r'\$5_\$10', 'cat']


def test_show_batch():
    "fastai's titles are Matplotlib's, too"
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    x = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    dls = image_dls(Images(x, torch.arange(8) % 2, ['$_$', '$5_$10'], 'made'), 4)
    dls.show_batch()
    plt.gcf().canvas.draw()
    plt.close('all')


# Classes by name or number

def test_classes_with_commas():
    names = ['cat', 'salt, pepper', 'a,b', r'caf\xe9', '1']
    def found(text): return class_numbers(names, split_classes(text, names))
    assert [found(t) for t in ('salt, pepper', 'a,b', '2,cat', 'cat, 2', 'caf\udce9', '1')] == [
        [1], [2], [2, 0], [0, 2], [3], [4]]
    with pytest.raises(ValueError, match="there is no class ''; the classes are 0 .cat., "): found('')
    with pytest.raises(ValueError, match='are 0 .c., .* and 950 more'): class_numbers(['c']*1000, 'dog')


def test_composed_and_decomposed_letters():
    "A Mac may store é as two characters: either finds the name, and where both are names, each finds its own"
    two, one = 'cafe\u0301', 'caf\u00e9'
    for name in (one, two):
        for text in (one, two):
            assert class_numbers(['x', name], split_classes(f'x,{text}', ['x', name])) == [0, 1]
    assert [class_numbers([one, two], t) for t in (one, two)] == [[0], [1]]


# One seed, one picture

@pytest.mark.parametrize('z_dim', [1, 8, 20, 128])
def test_latents_do_not_depend_on_their_number(z_dim):
    z = seeded_latents(9, z_dim, 5)
    assert all(torch.equal(seeded_latents(n, z_dim, 5), z[:n]) for n in (1, 2, 8))
    assert torch.equal(torch.randn(1, z_dim, generator=torch.Generator().manual_seed(5)), z[:1])
    assert not torch.equal(seeded_latents(9, z_dim, 6), z)


def test_one_seed_one_picture(tmp_path):
    "Image i of a class is the same in every picture, to the bit; without classes, too"
    r = load_run(shipped('digits'))
    def pixels(n=8, **how):
        picture = np.asarray(Image.open(sample_run(r, n, out=tmp_path/'a.png', seed=3, **how)))
        return picture[:, -(n*34 + 2):]  # without names
    whole = pixels()
    assert (pixels(classes='3') == whole[3*34:4*34 + 2]).all()
    assert (pixels(classes=[5, 3], n=4)[34:] == whole[3*34:4*34 + 2, :4*34 + 2]).all()
    assert (pixels(classes=3, n=11)[:, :8*34 + 2] == whole[3*34:4*34 + 2]).all()
    assert (pixels(classes=[0]) == pixels(classes=[0, 1])[:36]).all()
    G = r.model.ema
    before = G.training
    one = draw_rows(G.train(), [7], 2)
    assert G.training and torch.equal(one, draw_rows(G.eval(), [1, 7], 9)[1:, :2])
    G.train(before)


def test_pictures_that_can_be_opened(tmp_path):
    "At most 4096 x 8192 pixels; a long row continues on the next line; 20 classes of many"
    assert sampled_classes([str(i) for i in range(20)]) == list(range(20))
    many = sampled_classes([str(i) for i in range(1000)])
    assert len(many) == 20 and (many[0], many[-1]) == (0, 999)
    assert sampled_classes(['a']*1000, range(30)) == list(range(30))
    said = describe_samples([f'c{i}' for i in range(1000)])
    assert said.startswith('160 images, 8 for each of c0, c52, ') and '980 others' in said
    assert len(said) < 300 and describe_samples([], None, 1) == '1 image'
    G = load_run(shipped('twins')).model.ema
    assert sample_picture(G, [0], 121).size == (120*34 + 2, 2*34 + 2)
    for labels, n in (([0], 10**6), (list(range(4))*100, 1)):
        with pytest.raises(ValueError, match='do not fit into a picture of 4096x8192 pixels'):
            sample_picture(G, labels, n)


# Places that cannot be written

def test_scores_survive_a_folder_that_cannot_be_written(tmp_path, capsys):
    "They are with the error, and the command shows them; another folder can be named"
    from sagan.cli import sagan_eval
    (tmp_path/'digits-eval-n20.json').mkdir()  # in the way
    (tmp_path/'out').mkdir()
    with pytest.MonkeyPatch.context() as m:
        m.chdir(tmp_path)
        for name in ('make_evaluator', 'real_statistics'): m.setattr(f'sagan.runs.{name}', lambda *_: None)
        m.setattr('sagan.runs.measure_generator', lambda *_: dict(fid=1.5))
        with pytest.raises(SystemExit) as e: sagan_eval('digits', n=20, device='cpu')
        out, err = capsys.readouterr()
        assert e.value.code == 1 and 'FID ' in out and '--out' in err and 'eval-n20.json' in err
        with pytest.raises(FileNotFoundError, match='no folder nowhere'):
            evaluate_run('digits', out='nowhere')
    with pytest.raises(UnstoredScores, match='a.json cannot be written .Read-only') as e:
        with suggest_out('a.json', dict(fid=1.)): raise OSError(30, 'Read-only file system')
    assert e.value.scores == dict(fid=1.)
    with pytest.raises(OSError, match=r'--out \(out=\)'): sample_run('digits', 1, 3, out=tmp_path)


# Output

def test_say_never_fails():
    latin = io.TextIOWrapper(io.BytesIO(), 'latin-1')
    say('γ \x1b[31m caf\udce9 ü', latin)
    assert latin.buffer.getvalue() == rb'\u03b3 \x1b[31m caf\xe9 '+ b'\xfc\n'
    latin.close()
    say('closed', latin)


@pytest.mark.skipif(sys.platform != 'linux', reason='takes /dev/full')
@pytest.mark.parametrize('how', ['>&-', '2>&-', '>&- 2>&- <&-', '| head -0', '2>&1 | head -0', '> /dev/full'])
def test_output_that_leads_nowhere(tmp_path, how):
    "The program goes on, opens no file as its standard output, and ends without a traceback"
    code = ("import sys; from sagan.names import prepare_output, say; prepare_output()\n"
            "f = open('file', 'w'); say('γ'*10**6); say('error', sys.stderr); say('again'); f.write('whole')")
    command = f'"$0" -c "$1" {how}; echo ${{PIPESTATUS[0]}} > status'
    done = subprocess.run(['bash', '-c', command, sys.executable, code], cwd=tmp_path, capture_output=True)
    assert (tmp_path/'status').read_bytes() == b'0\n' and (tmp_path/'file').read_bytes() == b'whole'
    assert b'Traceback' not in done.stderr and b'Exception' not in done.stderr


def test_prepared_output_shows_any_letter(monkeypatch):
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(io.BytesIO(), 'cp1252'))
    monkeypatch.setattr(sys, 'stderr', None)
    prepare_output()
    print('γ', flush=True)
    print('nothing', file=sys.stderr)
    assert sys.stdout.buffer.getvalue().strip() == rb'\u03b3'


def test_a_command_warns_in_a_sentence(tmp_path, capsys):
    "Neither the file nor the line of code that gave a warning, nor afterwards any change of Python's own"
    (tmp_path/'data').mkdir()
    for i in range(8): Image.new('RGB', (32, 32), (i, 0, 0)).save(tmp_path/f'data/{i}.png')
    (tmp_path/'data/notes.txt').write_text('', encoding='utf-8')
    before = warnings.formatwarning
    with warnings.catch_warnings():
        warnings.simplefilter('default')
        # what the interpreter does; pytest collects warnings otherwise
        warnings.showwarning = lambda m, c, f, l, *_: sys.stderr.write(warnings.formatwarning(m, c, f, l))
        with pytest.raises(SystemExit):
            sagan_train(str(tmp_path/'data'), str(tmp_path/'run'), preset='tiny', batch=9)
    shown = capsys.readouterr().err.splitlines()
    assert [l for l in shown if 'notes.txt' in l and l.startswith('warning: ')]
    assert not any('.py:' in l for l in shown) and warnings.formatwarning is before
