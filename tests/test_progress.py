"What is drawn on a terminal: it fits, whatever the width, and leaves nothing behind"
import io, signal, sys
from types import SimpleNamespace
import pytest
from sagan import progress
from sagan.progress import format_time, progress_line, ProgressLine
from sagan.recording import stop_on_interrupt
from sagan.runs import train_run

FIELDS = 'D  1.93', 'G  0.13', 'γG16 -0.342', 'γD16 +0.131', '320 img/s'

class Terminal(io.StringIO):
    encoding = 'utf-8'
    def isatty(self): return True

@pytest.fixture
def screen(monkeypatch):
    "A terminal of `screen.width` columns as standard error, on which the clock stands still"
    screen, clock = Terminal(), [0.]
    screen.width, screen.clock = 80, clock
    monkeypatch.delenv('RANK', raising=False)
    monkeypatch.setattr(progress, 'sys', SimpleNamespace(stderr=screen))
    monkeypatch.setattr(progress, '_columns', lambda stream: screen.width)
    monkeypatch.setattr(progress, 'perf_counter', lambda: clock[0])
    return screen

def shown(text):
    "The rows that a terminal of endless width shows after this text"
    rows = []
    for row in text.split('\n'):
        seen = ''
        for part in row.split('\r'): seen = part + seen[len(part):]
        rows.append(seen.rstrip())
    return rows

@pytest.mark.parametrize('width, fields, bar', [
    (20, 0, False), (33, 0, False), (40, 0, True), (60, 2, True), (80, 3, True), (120, 5, True),
    (200, 5, True)])
def test_fits(width, fields, bar):
    "Fields go first, from the last to the first, then the bar; the ^C of an interrupt still fits behind"
    line = progress_line(666, 1800, 20, width, FIELDS)
    assert len(line) <= width - 3 and line.startswith(' 37% ')
    assert [f in line for f in FIELDS] == [i < fields for i in range(5)]
    assert ('█' in line) == bar and line.count('█') + line.count('░') in (0, *range(8, 41))
    if bar: assert '666/1,800' in line and '0:20 left' in line

@pytest.mark.parametrize('done', [0, 1, 999, 1000])
def test_counts(done):
    line = progress_line(done, 1000, None, 80)
    assert f'{done:,}/1,000' in line and line.count('█') == done*40//1000 and 'left' not in line

@pytest.mark.parametrize('width', range(1, 200, 7))
def test_every_width(width):
    "Numbers as long as they get, in windows as narrow as they get"
    assert len(progress_line(123_456, 1_000_000, 1e6, width, FIELDS)) <= max(0, width - 3)

def test_times():
    assert [format_time(t) for t in (0, 59.6, 61, 3599.4, 3600, 400_000)] == [
        '0:00', '1:00', '1:01', '59:59', '1:00:00', '111:06:40']

def test_one_line_that_changes(screen):
    "Drawn ten times a second at most; text goes above it, and in the end nothing is left"
    with ProgressLine(100) as line:
        for i in range(1, 51):
            screen.clock[0] += .03
            line.update(i, FIELDS[:1])
        drawn = screen.getvalue()
        assert drawn.count('\r') == 12 and '\n' not in drawn
        row, = shown(drawn)
        assert row.startswith(' 48% ') and row.endswith(' 48/100   0:02 left  D  1.93')
        line.say('a warning')
        assert shown(screen.getvalue()) == ['']
    assert shown(screen.getvalue()) == ['']

def test_time_left_counts_from_where_it_went_on(screen):
    line = ProgressLine(100, done=50)
    screen.clock[0] = 10.
    line.update(75)
    assert '0:10 left' in screen.getvalue()

def test_resized(screen):
    "What no longer fits stays as it is, and a line that fits begins below"
    line = ProgressLine(100)
    for width, done in ((80, 10), (40, 20), (40, 30), (120, 40)):
        screen.width = width
        screen.clock[0] += 1
        line.update(done, FIELDS)
    rows = shown(screen.getvalue())
    assert len(rows) == 2 and rows[0].startswith(' 10%') and rows[1].startswith(' 40%')
    assert len(rows[1]) <= 117 and len(rows[0]) <= 77

def test_interrupted(screen):
    "The ^C that a terminal shows behind the line goes with it"
    line = ProgressLine(100)
    screen.clock[0] = 1.
    line.update(10)
    screen.write('^C')
    line.clear()
    assert shown(screen.getvalue()) == [''] and not line.line

def test_plain_letters(screen):
    "A terminal without blocks and Greek letters"
    screen.encoding = 'ascii'
    line = ProgressLine(100)
    screen.clock[0] = 1.
    line.update(50, ['γG16 0.1'])
    assert screen.getvalue().isascii() and '#-' in screen.getvalue() and 'gamma G16 0.1' in screen.getvalue()

def test_in_a_file(screen, monkeypatch):
    "No bar, no carriage return: a line a minute; other processes say nothing"
    log = io.StringIO()
    monkeypatch.setattr(progress, 'sys', SimpleNamespace(stderr=log))
    def steps():
        for i in range(300):
            screen.clock[0] += 1
            yield i
    assert sum(progress.progress(steps(), 'reading images', 300)) == sum(range(300))
    assert log.getvalue().splitlines() == [
        f'reading images: {60*n} of 300, {5 - n}:00 left' for n in range(1, 6)]
    monkeypatch.setenv('RANK', '1')
    list(progress.progress(steps(), 'reading images', 300))
    assert len(log.getvalue().splitlines()) == 5

def test_decoding_many_pictures_leaves_a_log_alone(tmp_path, monkeypatch):
    "Thousands of images in less than a minute: not a word in a file"
    from PIL import Image
    from sagan.images import decode_images
    Image.new('RGB', (2, 2)).save(tmp_path/'a.png')
    log, read = io.StringIO(), []
    monkeypatch.setattr('sys.stderr', log)
    monkeypatch.setattr('sys.stdout', log)
    decode_images(tmp_path, ['a.png']*1100, 32, read.append)
    assert len(read) == 1100 and log.getvalue() == ''

def test_no_terminal_any_more(monkeypatch):
    "A closed stream, or none, is not a reason to stop"
    for stream in (None, io.StringIO()):
        if stream: stream.close()
        monkeypatch.setattr('sys.stderr', stream)
        line = ProgressLine(10, 'x')
        line.shown = -1e9
        line.update(5)
        line.clear()

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "What a terminal of 80 columns got from a tiny training"
    screen = Terminal()
    with pytest.MonkeyPatch.context() as m:
        for name in ('stdout', 'stderr'): m.setattr(sys, name, screen)
        m.setattr(progress, '_columns', lambda stream: 80)
        m.setattr(ProgressLine, 'due', lambda self: True)
        tiny = dict(preset='tiny', steps=5, batch=4, g_width=2, d_width=4, n_classes=0, device='cpu')
        train_run(out=tmp_path_factory.mktemp('progress')/'run', **tiny)
    return screen.getvalue()

def test_a_training_draws_one_line(trained):
    "No epochs, no scrolling, and the last line says what to open"
    row, = [row for row in trained.split('\n') if '\r' in row]
    first, *draws, done = [d for d in row.split('\r') if d.strip()]
    assert 'Epoch' not in trained and trained.endswith(f'{done}\n') and 'left  D ' in first
    assert all(len(d) <= 77 for d in [first, *draws])
    assert [d[:5] for d in [first, *draws]] == [f'{i:3}% ' for i in (20, 40, 60, 80, 100)]
    assert 'open ' in done and 'report.html' in done

def test_ctrl_c_leaves_a_clean_line(screen):
    "The line goes, with the ^C of the terminal, before the message"
    writer, line = SimpleNamespace(stop=False, measuring=False), ProgressLine(100)
    screen.clock[0] = 1.
    line.update(10, FIELDS)
    screen.write('^C')
    with pytest.MonkeyPatch.context() as m, stop_on_interrupt(writer, line):
        m.setattr(sys, 'stderr', screen)
        signal.raise_signal(signal.SIGINT)
    assert writer.stop == 'SIGINT'
    assert shown(screen.getvalue()) == ['stopping after this step (press Ctrl-C again to stop at once)', '']
