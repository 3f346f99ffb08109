"Which tests take what not every machine has"
import os, sys

import pytest

posix = pytest.mark.skipif(os.name != 'posix', reason='takes pipes, forks, limits or signals')
linux = pytest.mark.skipif(sys.platform != 'linux', reason='takes /proc')


def link(path, to):
    "Make a symbolic link, or skip the test: Windows allows links to developers and administrators alone"
    try: os.symlink(to, path)
    except OSError as e: pytest.skip(f'makes links ({e.strerror})')
