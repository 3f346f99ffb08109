"What other machines lack is taken away: locks, renaming onto open files, letters, signals, mallopt"
import ast, ctypes, errno, os, runpy, signal, subprocess, sys, threading
from pathlib import Path
from types import SimpleNamespace

import pytest, torch
from sagan import __main__ as main, cli, kernels, names, options, recording, reports, storage
from sagan.checkpoints import read_state
from sagan.checks import check_memory, check_training_memory, free_memory, TooLarge
from sagan.config import Config, preset
from sagan.names import quote_path
from sagan.sampling import class_folders
from sagan.storage import (
    atomic_write, cached_images, file_lock, MappedImages, new_folder, read_json, write_json)

root = Path(__file__).resolve().parent.parent


class Locks:
    "`msvcrt`, played by flock: who does not get a lock at once is refused"
    LK_NBLCK = 2
    def locking(self, number, mode, n):
        assert (mode, n) == (self.LK_NBLCK, 1) and os.lseek(number, 0, os.SEEK_CUR) == 0
        try: self.fcntl.flock(number, self.fcntl.LOCK_EX | self.fcntl.LOCK_NB)
        except BlockingIOError: raise PermissionError(errno.EACCES, 'Permission denied') from None


@pytest.fixture
def windows(monkeypatch):
    "Storage as on Windows; on Windows itself nothing is changed"
    if storage.fcntl:
        Locks.fcntl = storage.fcntl
        monkeypatch.setattr(storage, 'fcntl', None)
        monkeypatch.setattr(storage, 'msvcrt', Locks())
        monkeypatch.setattr(storage, '_WINDOWS', True)
    monkeypatch.setattr(storage.time, 'sleep', lambda seconds: None)


@pytest.fixture
def folders_cannot_be_opened(monkeypatch):
    opened = os.open
    def refuse(path, *args, **kw):
        if os.path.isdir(path): raise PermissionError(errno.EACCES, 'Permission denied', str(path))
        return opened(path, *args, **kw)
    monkeypatch.setattr(os, 'open', refuse)


def test_locks_of_windows(windows, tmp_path, capsys):
    "One owner at a time; another one is refused, or waits; what a killed process left is removed"
    left = tmp_path/'.a.txt.0123456789abcdef.new'
    left.mkdir()
    (left/'.lock').touch()
    with file_lock(tmp_path):
        assert not left.exists()
        with pytest.raises(BlockingIOError, match='in use by another process'), file_lock(tmp_path): pass
        with atomic_write(tmp_path/'a.txt') as new:
            with storage.temporary_folder(tmp_path/'b.txt'): assert new.exists()  # its maker lives
            new.write_text('one', encoding='utf-8')
        done = threading.Event()
        def wait():
            with file_lock(tmp_path, wait=True): done.set()
        thread = threading.Thread(target=wait)
        thread.start()
        while 'waiting for another process' not in capsys.readouterr().out: pass
        assert not done.is_set()
    thread.join(60)
    assert done.is_set() and sorted(os.listdir(tmp_path)) == ['.lock', 'a.txt']


def test_a_folder_cannot_be_opened_to_sync_it(windows, folders_cannot_be_opened, tmp_path):
    write_json(tmp_path/'a.json', 1)
    with new_folder(tmp_path/'made') as new: write_json(new/'b.json', 2)
    assert [read_json(tmp_path/f) for f in ('a.json', 'made/b.json')] == [1, 2]


@pytest.mark.parametrize('refusals', [3, 99])
def test_a_file_that_is_open_elsewhere_is_replaced_later(windows, tmp_path, monkeypatch, refusals):
    "As soon as a viewer has closed it; if that never happens, a sentence, and the old file"
    write_json(tmp_path/'a.json', 'old')
    replace, calls = os.replace, []
    def refuse(new, path):
        calls.append(path)
        if len(calls) <= refusals: raise PermissionError(errno.EACCES, 'Access is denied', str(new))
        replace(new, path)
    monkeypatch.setattr(os, 'replace', refuse)
    if refusals < 10: write_json(tmp_path/'a.json', 'new')
    else:
        with pytest.raises(PermissionError, match='a.json cannot be written: Access is denied; is it open'):
            write_json(tmp_path/'a.json', 'new')
    assert read_json(tmp_path/'a.json') == ('new' if refusals < 10 else 'old')
    assert os.listdir(tmp_path) == ['a.json']


def test_elsewhere_a_refusal_is_final(tmp_path, monkeypatch):
    calls = []
    def refuse(new, path):
        calls.append(path)
        raise PermissionError(errno.EACCES, 'Permission denied', str(new))
    monkeypatch.setattr(storage, '_WINDOWS', False)
    monkeypatch.setattr(os, 'replace', refuse)
    with pytest.raises(PermissionError, match='cannot be written: Permission denied$'):
        write_json(tmp_path/'a.json', 1)
    assert len(calls) == 1


@pytest.fixture
def open_files(monkeypatch):
    "Names of files that are open, and so cannot be removed"
    unlink, kept = Path.unlink, set()
    def refuse(self, missing_ok=False):
        if self.name in kept and self.exists():
            raise PermissionError(errno.EACCES, 'Access is denied', str(self))
        unlink(self, missing_ok)
    monkeypatch.setattr(Path, 'unlink', refuse)
    return kept


def test_a_cache_that_is_rebuilt_while_its_file_is_mapped(windows, open_files, tmp_path, capsys):
    "The new bytes get another name; images of the old file stay as they were; later it is removed"
    (tmp_path/'photos').mkdir()
    def images(value, size):
        photo = tmp_path/'photos'/'a.png'
        if not photo.exists() or photo.stat().st_size != size: photo.write_bytes(bytes(size))
        def decode(names, put):
            for _ in names: put(torch.full((3, 32, 32), value, dtype=torch.uint8))
            return {}
        return cached_images(tmp_path/'photos', ['a.png'], 32, 'none', decode, tmp_path/'cache')[0]
    first = images(1, 10)
    old = MappedImages(first, 32)
    open_files.add('images')
    second = images(2, 20)
    assert first.name == 'images' and second.name.startswith('images-') and images(9, 20) == second
    assert [MappedImages(f, 32)[:].unique().tolist() for f in (first, second)] == [[1], [2]]
    assert old[:].unique().tolist() == [1]
    open_files.clear()
    assert images(3, 30) == first and sorted(os.listdir(first.parent)) == ['.lock', 'about.json', 'images']


def test_old_states_that_are_open_are_removed_later(open_files, tmp_path):
    (tmp_path/'states').mkdir()
    files = [tmp_path/'states'/f'step-{i:07}.pt' for i in range(4)]
    for f in files: f.touch()
    open_files.add(files[0].name)
    recording._remove_old_states(tmp_path, 2, None)
    assert [f.exists() for f in files] == [True, False, True, True]
    open_files.clear()
    recording._remove_old_states(tmp_path, 2, None)
    assert [f.exists() for f in files] == [False, False, True, True]


def test_help_is_written_in_letters_that_every_console_has():
    for name in main.COMMANDS:
        options.make_parser(getattr(cli, f'sagan_{name}')).format_help().encode('cp1252')
    main.HELP.encode('ascii')


def test_drive_letters_in_a_configuration(tmp_path):
    "A run that comes from Windows is read like any other"
    write_json(tmp_path/'config.json', dict(data=r'C:\Users\me\photos'))
    assert Config(data=read_json(tmp_path/'config.json')['data']).data == r'C:\Users\me\photos'
    assert names.file_name('walk', '.png', point=r'C:\a:b') == 'walk-pointC__a_b.png'


def test_ctrl_break(monkeypatch):
    "Windows sends it where Linux sends SIGTERM"
    played = getattr(signal, 'SIGBREAK', None) or signal.SIGUSR1
    monkeypatch.setattr(signal, 'SIGBREAK', played, raising=False)
    before, writer = signal.getsignal(played), recording.RunWriter(Path('run'))
    writer.measuring = False
    with recording.stop_on_interrupt(writer): signal.raise_signal(played)
    assert writer.stop == played.name and signal.getsignal(played) == before


def test_without_glibc(monkeypatch):
    def refuse(name): raise OSError(f'{name}: cannot open shared object file')
    monkeypatch.setattr(ctypes, 'CDLL', refuse)
    assert kernels.keep_freed_memory() is None


@pytest.fixture
def no_proc(monkeypatch):
    "Neither /proc nor Windows' functions; `sysconf` as on a Mac of 8 GiB"
    def missing(self, **kw): raise FileNotFoundError(self)
    monkeypatch.setattr(Path, 'read_text', missing)
    monkeypatch.delattr(ctypes, 'windll', raising=False)
    known = dict(SC_PHYS_PAGES=2**19, SC_PAGE_SIZE=2**14)
    monkeypatch.setattr(os, 'sysconf', known.__getitem__, raising=False)
    return known


def test_memory_of_a_mac(no_proc):
    "What exceeds the memory of the machine is refused, with any limit of the process"
    assert free_memory('cpu') == 2**33
    with pytest.raises(TooLarge, match='needs at least 9.0 GB of memory, but only 8.6 GB are free on cpu'):
        check_memory(9*10**9, 'a picture', '--n')
    check_memory(8*10**9, 'a picture', '--n')
    with pytest.raises(TooLarge): check_training_memory(preset('official'), 1_000_000)


class MemoryStatus(ctypes.Structure):
    "MEMORYSTATUSEX, as Microsoft documents it"
    _fields_ = [('length', ctypes.c_uint32), ('load', ctypes.c_uint32)] + [
        (name, ctypes.c_uint64) for name in ('total', 'free', 'total_page_file', 'free_page_file',
                                             'total_virtual', 'free_virtual', 'extended')]


@pytest.mark.parametrize('works', [True, False])
def test_memory_of_windows(no_proc, monkeypatch, works):
    "What a process may still allocate, in memory and in the page file; unknown if the call fails"
    def ask(status):
        answer = ctypes.cast(status, ctypes.POINTER(MemoryStatus)).contents
        assert answer.length == ctypes.sizeof(MemoryStatus) == 64
        answer.total, answer.free, answer.total_page_file, answer.free_page_file = 8, 2, 10, 3*10**9
        return works
    kernel = SimpleNamespace(GlobalMemoryStatusEx=ask)
    monkeypatch.setattr(ctypes, 'windll', SimpleNamespace(kernel32=kernel), raising=False)
    assert free_memory('cpu') == (3*10**9 if works else float('inf'))


@pytest.mark.parametrize('limit, free', [('4000', 4000 - 3500 + 700), ('max', 2**33)])
def test_memory_of_a_container(no_proc, monkeypatch, limit, free):
    "What is left under its limit; the system gives up cached files"
    stat = 'active_file 5\ninactive_file 700\n'
    known = {'memory.max': limit, 'memory.current': '3500', 'memory.stat': stat}
    def read(self, **kw):
        if self.parent != Path('/sys/fs/cgroup'): raise FileNotFoundError(self)
        return known[self.name]
    monkeypatch.setattr(Path, 'read_text', read)
    assert free_memory('cpu') == free


def test_memory_of_an_unknown_system(no_proc, monkeypatch):
    def unknown(name): raise ValueError('unrecognized configuration name')
    monkeypatch.setattr(os, 'sysconf', unknown)
    assert free_memory('cpu') == float('inf')


@pytest.mark.parametrize('message', [
    'MPS backend out of memory (MPS allocated: 9 GB)',
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
    'DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes'])
def test_full_memory_is_no_damage(tmp_path, monkeypatch, message):
    "A state that does not fit is not taken for a damaged one, after which an older one would be used"
    def fail(*_, **__): raise RuntimeError(message)
    torch.save({}, tmp_path/'state.pt')
    monkeypatch.setattr(torch, 'load', fail)
    with pytest.raises(RuntimeError, match='allocate'): read_state(tmp_path/'state.pt')


@pytest.mark.parametrize('system, wish, value', [
    ('darwin', None, '1'), ('darwin', '0', '0'), ('linux', None, None), ('win32', None, None)])
def test_operations_that_mps_lacks_run_on_the_cpu(monkeypatch, system, wish, value):
    "PyTorch is told by `import sagan`, which does not load PyTorch; a wish of the user's stays"
    monkeypatch.setenv('PYTORCH_ENABLE_MPS_FALLBACK', '')  # restored at the end
    monkeypatch.delenv('PYTORCH_ENABLE_MPS_FALLBACK')
    if wish: monkeypatch.setenv('PYTORCH_ENABLE_MPS_FALLBACK', wish)
    monkeypatch.setattr(sys, 'platform', system)
    monkeypatch.delitem(sys.modules, 'torch')
    runpy.run_path(str(root/'sagan'/'__init__.py'))
    assert os.environ.get('PYTORCH_ENABLE_MPS_FALLBACK') == value and 'torch' not in sys.modules


def test_folders_of_classes_that_windows_reserves():
    reserved = ['con', 'Nul.txt', 'a.', 'b ', 'COM1 .x', 'lpt²', '...']
    assert class_folders(reserved) == ['0-con', '1-Nul.txt', '2-a', '3-b', '4-COM1 .x', '5-lpt²', '6-']
    allowed = ['a', 'com', 'lpt10', 'console', 'a.con', '1-b']
    assert class_folders(allowed) == allowed
    assert class_folders(['1-a', 'a.']) == ['0-1-a', '1-a']


@pytest.mark.parametrize('name, windows, shown', [
    ('digits', True, 'digits'), ('my run', True, '"my run"'), ("it's", True, '"it\'s"'),
    ('digits', False, 'digits'), ('my run', False, "'my run'"), ('$HOME', False, "'$HOME'")])
def test_names_in_commands(name, windows, shown):
    "A report shows a command that the shells of its machine understand"
    assert quote_path(name, windows) == shown


def test_a_server_that_is_left_alone_removes_its_folder(tmp_path):
    "On Windows, too, where a process that a signal ends does nothing more"
    (tmp_path/'waits.py').write_bytes(b'import time\nprint("begun", flush=True)\ntime.sleep(60)\n')
    folder = tmp_path/'served'
    folder.mkdir()
    (folder/'explorer.ipynb').touch()
    code = reports._SERVER.replace("os.name == 'posix'", 'False')
    assert code != reports._SERVER
    command = [sys.executable, '-c', code, 'waits', str(folder/'explorer.ipynb')]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path) as server:
        assert server.stdout.readline().strip() == b'begun' and folder.exists()
        server.stdin.close()
        assert server.wait(30) == 1 and not folder.exists()


MISSING = {'fcntl', 'resource', 'pwd', 'grp', 'termios', 'tty', 'pty', 'posix', 'syslog', 'msvcrt', 'winreg'}


def at_once(tree):
    "Modules that are imported when a file is, whatever the machine"
    for node in tree.body:
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        if isinstance(node, ast.ImportFrom): yield node.module


@pytest.mark.parametrize('folder', ['sagan', 'tools', 'benchmarks', 'tests'])
def test_no_file_takes_what_some_machines_lack(folder):
    "Such modules are imported within `try`, or where they are used"
    for file in sorted((root/folder).glob('*.py')):
        taken = MISSING & set(at_once(ast.parse(file.read_text(encoding='utf-8'))))
        assert not taken, f'{file.name} imports {taken}'
