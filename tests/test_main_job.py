"The default run: `sagan-train` without arguments, measured by `sagan-eval` (about four minutes on two cores)"
import json, subprocess, sys
from pathlib import Path

BIN = Path(sys.executable).parent

def test_digits_are_recognised(tmp_path):
    for args in (['sagan-train'], ['sagan-eval', 'runs/digits']):
        command = [BIN/args[0], *args[1:]]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path/'runs/digits/eval.json').read_text())
    # of real digits that the classifier has not seen
    held_out = float(scores['evaluator'].split('% right')[0].split('(')[-1])
    assert scores['samples'] == 1000 and scores['accuracy'] >= .95 and held_out >= 97, scores
