"Which tests take what not every machine has"
import os, sys

import pytest

posix = pytest.mark.skipif(os.name != 'posix', reason='takes pipes, forks, limits or signals')
linux = pytest.mark.skipif(sys.platform != 'linux', reason='takes /proc')
