"The small functions of the benchmarks, without the measurements"
import json, os
from pathlib import Path

import pytest, torch
from sagan import cli, runs

folder = Path(__file__).resolve().parent.parent/'benchmarks'


@pytest.fixture
def candidates(monkeypatch):
    "The script, as a module"
    monkeypatch.syspath_prepend(str(folder))
    import candidates
    return candidates


def test_algorithms_are_counted(candidates):
    "What oneDNN prints: headers, and a line for each call"
    call = 'onednn_verbose,v1,primitive,exec,cpu,convolution,brgconv:avx512_core,forward_training,src,,,,1'
    reorder = call.replace('convolution', 'reorder')
    text = '\n'.join(['onednn_verbose,v1,info,cpu,isa:AVX2', call, call, reorder])
    row = dict(algorithm='brgconv:avx512_core', direction='forward_training')
    assert candidates.count_primitives(text) == [
        dict(primitive='convolution', **row, calls=2), dict(primitive='reorder', **row, calls=1)]


def test_outputs_of_all_convolutions_are_counted(candidates):
    "Those that are merged with a change of size are among them"
    plain, weights, outputs = candidates.find_shapes()
    assert 0 < sum(plain.values()) < sum(outputs.values()) <= sum(weights.values())


def test_dividing_outputs_is_a_quotient_of_weights(candidates):
    "Both ways run in either dtype"
    W = torch.randn(4, 3, 3, 3, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16):
        assert len(candidates.compare_quotients(W, dtype)) == 2
        assert candidates.divide_outputs((2, 4, 8, 8), dtype) >= 0
    assert W.grad is None


class Left(BaseException):
    "Instead of the end of the process"


def test_the_start_of_a_training_is_watched(tmp_path, monkeypatch, capsys):
    "In this process, where PyTorch is loaded: the stations in order, and the end before the first step"
    monkeypatch.syspath_prepend(str(folder))
    import startup
    def leave(status): raise Left
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, '_exit', leave)
    monkeypatch.setattr(cli, 'loading', cli.loading)  # both are put back
    monkeypatch.setattr(runs, 'fit_run', runs.fit_run)
    with pytest.raises(Left): startup.watch_training()
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('["')]
    assert [what for what, _ in found] == [f'sagan-train to {end}' for end in (
        'its first word', 'the end of its imports', 'its first step')]
    assert 0 < found[0][1] <= found[1][1] < found[2][1]
    assert not list((tmp_path/'runs').rglob('states/*'))
