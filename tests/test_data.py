"What the data page cannot hold: a cache whose maker is killed or interrupted, and two processes that need the same one"
import os, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from PIL import Image
from sagan.data import folder

CODE = '''
import sys
from sagan.data import folder
images = folder(sys.argv[1], 32, max_gb=0, cache=sys.argv[2])
print('OPEN', len(images), flush=True)
'''
N = 3000

def start(images, cache):
    return subprocess.Popen([sys.executable, '-c', CODE, str(images), str(cache)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def being_made(cache):
    "Wait until a cache is being written; the temporary file"
    end = time.monotonic() + 300
    while time.monotonic() < end:
        for f in cache.glob('*/.images.*.new'):
            if f.stat().st_size: return f
        time.sleep(.005)
    raise AssertionError('no cache was begun')

@pytest.fixture(scope='module')
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp('images')
    for i in range(N): Image.new('RGB', (120, 100), (i % 256, i//256, 0)).save(path/f'{i:05}.jpg')
    return path

@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_maker_leaves_nothing_that_is_believed(images, tmp_path, how):
    maker = start(images, tmp_path)
    try:
        left = being_made(tmp_path)
        maker.send_signal(how)
        out, _ = maker.communicate(timeout=300)
    finally: maker.kill()
    assert maker.returncode != 0 and 'OPEN' not in out
    assert left.exists() == (how == signal.SIGKILL) and sorted(p.name for p in left.parent.iterdir() if p != left) == ['.lock']
    cached = folder(images, 32, max_gb=0, cache=tmp_path)
    assert torch.equal(cached.x[:], folder(images, 32).x)
    assert sorted(p.name for p in left.parent.iterdir()) == ['.lock', 'about.json', 'images']

def test_the_second_process_waits_for_the_first(images, tmp_path):
    first = start(images, tmp_path)
    try:
        being_made(tmp_path)
        os.kill(first.pid, signal.SIGSTOP)  # it stays in the middle while the second starts
        second = start(images, tmp_path)
        try:
            assert second.stdout.readline().startswith('waiting for another process')
            os.kill(first.pid, signal.SIGCONT)
            outs = first.communicate(timeout=300)[0], second.communicate(timeout=300)[0]
        finally: second.kill()
    finally: first.kill()
    assert [f'OPEN {N}' in o for o in outs] == [True, True] and ['decoded once' in o for o in outs] == [True, False]
    assert torch.equal(folder(images, 32, max_gb=0, cache=tmp_path).x[:], folder(images, 32).x)
