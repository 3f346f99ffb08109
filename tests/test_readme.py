"The quick start of README.md, run as it is printed"
import os, re, subprocess, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent

def test_quick_start_runs_as_printed(tmp_path):
    code = '\n'.join(re.findall(r'^```python\n(.*?)^```', (root/'README.md').read_text(), re.S | re.M))
    assert 0 < len([l for l in code.splitlines() if l.strip()]) <= 20
    (tmp_path/'quick.py').write_text(code)
    done = subprocess.run([sys.executable, 'quick.py'], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, 'MPLBACKEND': 'agg'})
    assert done.returncode == 0, done.stderr
