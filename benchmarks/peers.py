"""Prints the tables of peers.md from a measurement: `python benchmarks/peers.py RESULTS.json`

peers.md says what the runs of RESULTS.json are. Each has the seconds of its steps, and for each step
how many cores other processes kept busy."""
import json, statistics, sys
from collections import defaultdict
from pathlib import Path

OURS = dict(ours='ours', before='ours before')
NAMES = dict(biggan='BigGAN-PyTorch', studiogan='StudioGAN', voletiv='voletiv') | OURS
QUIET = 0.1  # cores that other processes may use during a step that counts

def describe(run):
    "What distinguishes a row from the others of its size"
    name = NAMES[run['who']]
    if run['who'] in OURS: return f"{name}, {run['form']}{', compiled' if run['compiled'] else ''}"
    parts = [name, f"attention at {run['attention']}" if run['attention'] else 'no attention']
    if run['d_width'] != run['width']: parts.append(f"D_ch {run['d_width']}")
    return ', '.join(parts)

def collect(runs):
    "One row per network and settings, with the median of the quiet steps of each round"
    groups = defaultdict(list)
    for run in runs:
        if 'failed' not in run: groups[run['px'], describe(run), run['how']].append(run)
    rows = []
    for (px, name, how), group in groups.items():
        steps = [[t for t, other in zip(r['seconds'], r['other_cpu']) if other <= QUIET] for r in group]
        rounds = [statistics.median(s) for s in steps if s]
        if not rounds: continue
        gflop = next((r['gflop'] for r in group if r.get('gflop')), None)
        memory = statistics.median(r['memory_gb'] for r in group)
        rows.append(dict(px=px, name=name, how=how, ours=group[0]['who'] in OURS, rounds=rounds,
                         middle=statistics.median(rounds), batch=group[0]['batch'], gflop=gflop,
                         memory=memory))
    return rows

def table(head, lines):
    "Markdown"
    return '\n'.join(f"| {' | '.join(map(str, l))} |" for l in [head, ['---']*len(head), *lines])

def ours(rows, px, how):
    "Our row of the form that the other implementations have"
    return next((r for r in rows if (r['px'], r['name'], r['how']) == (px, 'ours, released', how)), None)

def ratios(rows, hows, against):
    "Each other implementation's seconds and ours: those of `against(how)`"
    for r in rows:
        if r['ours'] or r['how'] not in hows: continue
        cells = [r['px'], r['name'], r['how'], f"{r['middle']:.2f}"]
        for how in against(r['how']):
            mine = ours(rows, r['px'], how)
            cells += [f"{mine['middle']:.2f}", f"{r['middle']/mine['middle']:.2f}"] if mine else ['', '']
        yield cells

def report(results):
    "Both comparisons and all rows"
    rows = sorted(collect(results['runs']), key=lambda r: (-r['px'], r['ours'], r['name'], r['how']))
    tuned = ratios(rows, ('float32', 'bfloat16'), lambda how: [how])
    shipped = ratios(rows, ('shipped',), lambda how: ['float32', 'bfloat16'])
    def line(r):
        gflop = f"{r['gflop']:.0f}" if r['gflop'] else ''
        rounds = ', '.join(f'{t:.2f}' for t in sorted(r['rounds']))
        speed = f"{r['batch']/r['middle']:.1f}"
        return [r['px'], r['name'], r['how'], rounds, speed, gflop, f"{r['memory']:.1f}"]
    head = ['pixels', 'implementation', 'settings', 'seconds']
    dates = sorted(r['at'] for r in results['runs'])
    commits = ', '.join(sorted({r['commit'] for r in results['runs']}))
    return '\n\n'.join([
        f"{results['cpu']}, {results['threads']} threads, PyTorch {results['runs'][0]['torch']}, "
        f'{dates[0]} to {dates[-1]} UTC, commit {commits}; the median of the rounds counts.',
        '**Equally tuned**', table([*head, 'ours', 'times ours'], tuned),
        '**As shipped**', table([*head, 'ours, float32', 'times', 'ours, bfloat16', 'times'], shipped),
        '**All rows**', table([*head[:3], 'seconds of each round', 'images/s', 'GFLOP', 'memory, GB'],
                              map(line, rows))])

if __name__ == '__main__':
    if len(sys.argv) != 2: sys.exit(__doc__)
    print(report(json.loads(Path(sys.argv[1]).read_text(encoding='utf-8'))))
