"What the storage page does not show: failures while writing, stopped makers of a cache, ImageNet's size"
import errno, hashlib, json, os, re, shutil, signal, subprocess, sys, time, warnings
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest, torch
from machines import link, posix
from forked import leave_nothing_running, PROCESSES, STARTED
from PIL import Image
from safetensors.torch import save_file
from sagan.data import folder
from sagan.storage import (
    atomic_write, cache_folder, check_output, file_lock, MappedImages, open_append, Prefetcher, read_json,
    temporary_folder, write_json)

FORK = get_context('fork' if os.name == 'posix' else 'spawn')
try: import resource
except ImportError: resource = None  # Windows


def paint(path, color, size=(50, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, color).save(path)


@pytest.fixture
def photos(tmp_path):
    "A folder of two classes, of nine images"
    for i in range(9): paint(tmp_path/'photos'/('sky' if i > 3 else 'grass')/f'{i}.jpg', (120, 180, 25*i))
    return tmp_path/'photos'


@pytest.fixture
def cached(photos, capsys):
    "Opens `photos` through a cache: the images, and what was printed on the way"
    def open_folder(size=32, **kwargs):
        capsys.readouterr()
        images = folder(photos, size, max_gb=0, cache=photos.parent/'cache', **kwargs)
        return images, capsys.readouterr().out
    return open_folder


# Files and locks

def test_a_failure_leaves_the_old_file(tmp_path):
    (tmp_path/'a.txt').write_text('one', encoding='utf-8')
    with pytest.raises(RuntimeError), atomic_write(tmp_path/'a.txt') as f:
        f.write_text('tw', encoding='utf-8')
        raise RuntimeError('power cut')
    assert (tmp_path/'a.txt').read_text(encoding='utf-8') == 'one' and os.listdir(tmp_path) == ['a.txt']


@posix
def test_permissions(tmp_path):
    "A library that makes its file unreadable for others does not decide about the result"
    (tmp_path/'plain').touch()
    with atomic_write(tmp_path/'b.txt') as f:
        f.unlink()
        os.close(os.open(f, os.O_CREAT, 0o600))
    assert (tmp_path/'b.txt').stat().st_mode == (tmp_path/'plain').stat().st_mode


@pytest.mark.parametrize('path, reason', [('.', 'it is a folder'), ('b/c.txt', 'there is no folder')])
def test_places_where_nothing_can_be_written(tmp_path, path, reason):
    with pytest.raises(OSError, match=f'cannot be written: {reason}'), atomic_write(tmp_path/path): pass


def test_nothing_is_written_through_a_link(tmp_path):
    "Neither an output, nor a log, nor a lock: the file that the link names keeps its bytes, the link stays"
    own, run = tmp_path/'own.txt', tmp_path/'run'
    own.write_text('mine', encoding='utf-8')
    run.mkdir()
    for name, to in (('a.txt', own), ('b.txt', tmp_path/'missing'), ('.lock', own)): link(run/name, to)
    def lock(path):
        with file_lock(path.parent): pass
    def output(path): write_json(path, 1)
    for write, name in ((output, 'a.txt'), (output, 'b.txt'), (open_append, 'a.txt'), (lock, '.lock')):
        with pytest.raises(OSError, match=f'{name} cannot be written: it is a link to .*name the file'):
            write(run/name)
    assert own.read_bytes() == b'mine' and sorted(os.listdir(run)) == ['.lock', 'a.txt', 'b.txt']
    assert (run/'a.txt').is_symlink() and not (tmp_path/'missing').exists()


@pytest.mark.parametrize('name', ['.lock', 'a.txt'])
@posix
def test_a_pipe_is_not_opened(tmp_path, name):
    "To open it would wait for a reader without end"
    os.mkfifo(tmp_path/name)
    def write(): open_append(tmp_path/name) if name == 'a.txt' else file_lock(tmp_path).__enter__()
    for use in (write, lambda: check_output(tmp_path/name), lambda: write_json(tmp_path/name, 1)):
        with pytest.raises(OSError, match='it is a device or a pipe, not a file'): use()
    with pytest.raises(ValueError, match='is not a file'): read_json(tmp_path/name)
    assert os.listdir(tmp_path) == [name] and (tmp_path/name).is_fifo()


def test_a_folder_may_be_a_link(tmp_path):
    (tmp_path/'disk').mkdir()
    link(tmp_path/'run', tmp_path/'disk')
    with file_lock(tmp_path/'run'): write_json(tmp_path/'run'/'a.json', 1)
    assert read_json(tmp_path/'disk'/'a.json') == 1 and (tmp_path/'run').is_symlink()


@posix
def test_no_name_is_too_long_to_be_written(tmp_path):
    for name in ('x'*255, '\N{GREEK SMALL LETTER GAMMA}'*127):
        write_json(tmp_path/name, 1)
        assert read_json(tmp_path/name) == 1
    with pytest.raises(OSError, match='cannot be written: File name too long'):
        write_json(tmp_path/('x'*256), 1)


def die_writing(path):
    with atomic_write(path) as f:
        f.write_text('half', encoding='utf-8')
        os.kill(os.getpid(), signal.SIGKILL)


def left_by_a_kill(path):
    "What a process leaves that is killed while it writes a file"
    killed = FORK.Process(target=die_writing, args=(path,))
    killed.start()
    killed.join()
    left, = path.parent.glob(f'.{path.name}.*.new')
    assert killed.exitcode == -signal.SIGKILL and (left/path.name).read_text(encoding='utf-8') == 'half'
    return left


@posix
def test_the_next_to_write_removes_what_a_killed_process_left(tmp_path):
    """What is still being written stays, and so do files of other programs

    A lock cleans all that is below, and what earlier versions left, too."""
    deep, others = tmp_path/'samples', [tmp_path/'.notes.2024.new', tmp_path/'.mine.new']
    deep.mkdir()
    for f in others: f.touch()
    left = left_by_a_kill(tmp_path/'a.txt')
    shutil.copytree(left, deep/left.name)
    shutil.copytree(left, tmp_path/left.name.replace('a.txt', 'taken'))  # a second one
    (tmp_path/'.link.0123456789abcdef.new').symlink_to(deep)
    with temporary_folder(tmp_path/'live') as live, atomic_write(tmp_path/'b.txt') as new:
        new.touch()
        assert sorted(d.name for d in tmp_path.iterdir() if d.is_dir()) == sorted(
            ['.link.0123456789abcdef.new', live.name, new.parent.name, 'samples'])
        assert (deep/left.name).exists() and all(f.exists() for f in others)
        with file_lock(tmp_path): assert live.exists() and new.exists() and not (deep/left.name).exists()
    assert sorted(os.listdir(tmp_path)) == [
        '.link.0123456789abcdef.new', '.lock', '.mine.new', 'b.txt', 'samples']


def write_again_and_again(folder, name):
    for k in range(200):
        write_json(folder/name, k)
        with file_lock(folder, wait=True): pass


@posix
def test_many_write_into_one_folder(tmp_path):
    "Nobody takes another's unfinished file for a leftover"
    names = ['0.json', '1.json', '2.json']
    crowd = [FORK.Process(target=write_again_and_again, args=(tmp_path, n)) for n in names]
    for p in crowd: p.start()
    for p in crowd: p.join()
    assert [p.exitcode for p in crowd] == [0]*3
    assert sorted(os.listdir(tmp_path)) == ['.lock', *names]


def hold(folder, held):
    with file_lock(folder):
        held.set()
        time.sleep(99)


@posix
def test_a_lock_dies_with_its_owner(tmp_path):
    held = FORK.Event()
    owner = FORK.Process(target=hold, args=(tmp_path, held))
    owner.start()
    try:
        assert held.wait(60)
        with pytest.raises(BlockingIOError, match='in use by another process'), file_lock(tmp_path): pass
    finally: owner.kill()
    owner.join()
    with file_lock(tmp_path): pass


@pytest.mark.parametrize('write', [
    lambda file: file.write_bytes(bytes(9000)), lambda file: torch.save(torch.zeros(9000), file),
    lambda file: save_file(dict(a=torch.zeros(9000)), file),
    lambda file: Image.effect_noise((200, 200), 99).save(file, format='png')])
@posix
def test_a_file_that_does_not_fit(tmp_path, write):
    "One sentence from every library, the old file, and nothing beside it; files may have 3,000 bytes here"
    (tmp_path/'a').write_text('old', encoding='utf-8')
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limit[1]))
    try:
        with pytest.raises(OSError, match=r'/a cannot be written: .* \([0-9.]+ MB are free in .*\)$'):
            with atomic_write(tmp_path/'a') as new: write(new)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (tmp_path/'a').read_text(encoding='utf-8') == 'old' and os.listdir(tmp_path) == ['a']


def test_a_folder_where_nothing_may_be_made(tmp_path, monkeypatch):
    "In a sentence; root may write everywhere, so the system's refusal is played"
    (tmp_path/'a').write_text('old', encoding='utf-8')
    def refuse(path, mode=0): raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    monkeypatch.setattr(Path, 'mkdir', refuse)
    place = re.escape(str(tmp_path/'a'))
    with pytest.raises(PermissionError, match=f'^{place} cannot be written: Permission denied$'):
        write_json(tmp_path/'a', 1)


# Images in a file

def test_prefetched_images_are_those_asked_for(tmp_path):
    "Whatever was expected, and in which order"
    x = torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (tmp_path/'bytes').write_bytes(x.numpy().tobytes())
    g = torch.Generator().manual_seed(1)
    for images in (x, MappedImages(tmp_path/'bytes', 32)):
        with Prefetcher(images) as prefetcher:
            ahead = None
            for k in range(20):
                i = ahead if ahead is not None and k % 3 else torch.randint(50, (k % 5 + 1,), generator=g)
                ahead = torch.randint(50, (3,), generator=g) if k % 4 else None
                assert torch.equal(prefetcher.take(i, ahead), x[i])


PROBE = '''
import sys, torch
from pathlib import Path
from sagan.data import Images, MemoryLoader
from sagan.storage import MappedImages
def own():  # MB
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(l.split()[1]) for l in lines if l.startswith('RssAnon'))/1e3
before, n, most = own(), 1_281_167, 0
images = Images(MappedImages(sys.argv[1], 128), torch.zeros(n, dtype=torch.int64), [], 'index')
train, held_out = images.split(.04)
for x, y in MemoryLoader(train, 64, steps=500, flip=True): most = max(most, own())
print(len(images), len(held_out), round(most - before))
'''


@pytest.mark.skipif(sys.platform != 'linux', reason='asks /proc for the memory')
def test_own_memory_at_the_size_of_imagenet(tmp_path):
    """A process draws 500 batches of 64 images of 128 pixels (1.6 GB) from a file of ImageNet's length

    Its own memory (`RssAnon`, what the operating system cannot take back) grows by the labels, the index of
    the file, those of both parts of the split and the order of a pass, about 10 MB each, and by a few batches
    of float32, 13 MB each. The file is empty and takes no room on the disk."""
    with open(tmp_path/'huge', 'wb') as f: f.truncate(1_281_167*3*128**2)
    done = subprocess.run([sys.executable, '-c', PROBE, str(tmp_path/'huge')], capture_output=True, text=True,
                          check=True)
    n, held_out, grown = map(int, done.stdout.split()[-3:])
    assert (n, held_out) == (1_281_167, 51_247)
    assert grown < 250


# The decoded cache

def test_the_cache_gives_the_same_images(photos, cached, monkeypatch):
    "It is found again where nothing can be written"
    in_memory, (first, message) = folder(photos, 32), cached()
    assert 'decoded once' in message
    assert torch.equal(first.x[:], in_memory.x) and torch.equal(first.y, in_memory.y)
    assert (first.classes, first.name) == (in_memory.classes, in_memory.name)
    def refuse(*_, **__): raise PermissionError
    for name in ('mkdir', 'touch'): monkeypatch.setattr(Path, name, refuse)
    again, message = cached()
    assert torch.equal(again.x[:], in_memory.x) and message == ''


@pytest.mark.parametrize('decoded, used', [
    ('central square, Pillow bicubic', False),  # before pixels were what a viewer shows
    ('central square, Pillow bicubic, 16 bits to 8, transparent parts white', True)])
def test_a_cache_of_an_earlier_version(photos, cached, decoded, used):
    "Its files, their names and the digests in them are a format, spelled out here; pixels tell the version"
    names = sorted(f'{p.parent.name}/{p.name}' for p in photos.glob('*/*.jpg'))
    stats = [(n, (photos/n).stat()) for n in names]
    sources = ''.join(f'{n}\0{s.st_size}\0{s.st_mtime_ns}\n' for n, s in stats).encode()
    x = torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sample = x[np.linspace(0, 8, 64).astype(int)].numpy().tobytes()
    def digest(data, n=16): return hashlib.sha256(data).hexdigest()[:n]
    at = photos.parent/'cache'/f'photos-32px-{digest(os.fsencode(photos.resolve()), 8)}'
    at.mkdir(parents=True)
    (at/'images').write_bytes(x.numpy().tobytes())
    about = {'number of files': 9, 'size': 32, 'interpolation': decoded,
             'digest of names, sizes and times': digest(sources), 'sample': digest(sample), 'bad': {}}
    (at/'about.json').write_text(json.dumps(about), encoding='utf-8')
    images, message = cached()
    assert ('rebuilt because its interpolation was' not in message) == used
    assert torch.equal(images.x[:], x if used else folder(photos, 32).x)
    assert cache_folder(photos, 32, photos.parent/'cache') == at


def test_default_place(photos, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', '/somewhere')
    assert cache_folder(photos, 64).parent == Path('/somewhere/sagan')
    monkeypatch.delenv('XDG_CACHE_HOME')
    assert cache_folder(photos, 64).parent == Path.home()/'.cache'/'sagan'


@pytest.mark.parametrize('about', ['{"number of files": 9', '[1]', '{}', '{"bad": 3}'])
def test_a_damaged_description(photos, cached, about):
    cached()
    (cache_folder(photos, 32, photos.parent/'cache')/'about.json').write_text(about, encoding='utf-8')
    images, message = cached()
    assert 'rebuilt because about.json is damaged' in message
    assert torch.equal(images.x[:], folder(photos, 32).x)


def test_files_that_cannot_be_read(photos, cached):
    "They are treated as in memory, and tried again at each start, also with their old size and time"
    whole, half = (photos/'sky'/'5.jpg').read_bytes(), photos/'sky'/'half.jpg'
    in_memory = folder(photos, 32)
    half.write_bytes(whole[:200] + bytes(len(whole) - 200))
    old_time = half.stat().st_mtime_ns
    with pytest.raises(ValueError, match='half.jpg'): cached()
    for _ in range(2):  # named each time
        with pytest.warns(UserWarning, match='half.jpg'): images, message = cached(skip_bad=True)
        assert torch.equal(images.x[:], in_memory.x) and message == ''
    half.write_bytes(whole)
    os.utime(half, ns=(old_time, old_time))
    images, message = cached()
    assert 'rebuilt because sky/half.jpg can be read now' in message
    assert len(images) == 10 and cached()[1] == ''


def test_no_file_can_be_read(tmp_path):
    (tmp_path/'photos').mkdir()
    for i in range(3): (tmp_path/'photos'/f'{i}.png').touch()
    for _ in range(2):
        with pytest.raises(ValueError, match='3 of 3 files'):
            folder(tmp_path/'photos', 32, skip_bad=True, max_gb=0, cache=tmp_path/'cache')


def test_no_room(photos, cached, monkeypatch):
    "Said before a single image is read"
    monkeypatch.setattr(shutil, 'disk_usage', lambda at: SimpleNamespace(free=9000))
    with pytest.raises(OSError, match='9 images at 32 px need 0.0 GB in .*, where 0.0 GB are free'): cached()


@posix
def test_a_disk_that_fills(photos, cached):
    "No half-made cache is left when writing stops, here because the file may not grow further"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limit[1]))  # bytes that a file may have
    try:
        with pytest.raises(OSError, match=r'failed \(.*/images cannot be written: File too large \(.* MB '
                                          r'are free in .*\)\); its files were removed'):
            cached()
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert os.listdir(cache_folder(photos, 32, photos.parent/'cache')) == ['.lock']
    assert torch.equal(cached()[0].x[:], folder(photos, 32).x)


def test_a_place_that_cannot_be_a_folder(photos, tmp_path):
    (tmp_path/'file').touch()
    with pytest.raises(OSError, match=r'cannot be written \(.+\); name another one as cache'):
        folder(photos, 32, max_gb=0, cache=tmp_path/'file'/'cache')


N = 3000


def open_folder(images, cache, output):
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 1)
    print('OPEN', len(folder(images, 32, max_gb=0, cache=cache)), flush=True)


def start(images, cache):
    "A process that opens a folder through a cache, and prints into `output`, a file beside it"
    output = cache/f'output{len(STARTED)}'
    p = PROCESSES.Process(target=open_folder, args=(images, cache, output))
    p.output = output
    STARTED.append(p)
    p.start()
    return p


def ended(p):
    "What it has printed"
    p.join(300)
    return p.output.read_text(encoding='utf-8')


def wait_for_cache(cache):
    "Wait until a cache is being written; the temporary folder"
    end = time.monotonic() + 300
    while time.monotonic() < end:
        for f in cache.glob('*/.images.*.new'):
            if (f/'images').exists() and (f/'images').stat().st_size: return f
        time.sleep(.005)
    raise AssertionError('no cache was begun')


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    "A folder that takes a while to decode"
    path = tmp_path_factory.mktemp('images')
    for i in range(N): Image.new('RGB', (120, 100), (i % 256, i//256, 0)).save(path/f'{i:05}.jpg')
    return path


@pytest.mark.parametrize('how', [getattr(signal, 'SIGKILL', 9), signal.SIGINT])
@posix
def test_a_stopped_maker_leaves_nothing_that_is_believed(images, tmp_path, how):
    maker = start(images, tmp_path)
    left = wait_for_cache(tmp_path)
    os.kill(maker.pid, how)
    assert 'OPEN' not in ended(maker) and maker.exitcode != 0
    assert left.exists() == (how == signal.SIGKILL)
    assert sorted(p.name for p in left.parent.iterdir() if p != left) == ['.lock']
    cached = folder(images, 32, max_gb=0, cache=tmp_path)
    assert torch.equal(cached.x[:], folder(images, 32).x)
    assert sorted(p.name for p in left.parent.iterdir()) == ['.lock', 'about.json', 'images']


@posix
def test_the_second_process_waits_for_the_first(images, tmp_path):
    first = start(images, tmp_path)
    wait_for_cache(tmp_path)
    os.kill(first.pid, signal.SIGSTOP)  # it stays in the middle while the second starts
    second = start(images, tmp_path)
    while not second.output.exists() or b'waiting for another process' not in second.output.read_bytes():
        assert second.is_alive()
        time.sleep(.01)
    os.kill(first.pid, signal.SIGCONT)
    outs = ended(first), ended(second)
    assert [f'OPEN {N}' in o for o in outs] == [True, True]
    assert ['decoded once' in o for o in outs] == [True, False]
    assert torch.equal(folder(images, 32, max_gb=0, cache=tmp_path).x[:], folder(images, 32).x)
