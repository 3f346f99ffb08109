"""How fast the attention explorer is, in headless Chromium

From a movement of the mouse to the painted canvas: images of 128 pixels, 32x32 queries, 16x16 keys, three
kept points. Painted means that the point's map is drawn and a pixel has been read back from both canvases,
so that no work is left; the screen's own delay is not included. The first pair of times begins when the
browser hands the event over, and the second at the event's own time stamp.

The last three columns are processor time of the page's main thread for one movement, including all painting.
They do not depend on how busy the machine is.

The next rows are for the page without a kernel of the package's model, also in processor time: from opening
the file to the first picture; from the first click on "Next" to its picture, before the browser has compiled
anything; the same for later clicks; and for a click on "Hide where it looks".

The last row is the time from a click on "Next" to the painted picture in Voila, to the kernel and back.

    python benchmarks/explorer.py"""
import json, os, shutil, socket, subprocess, sys, tempfile, time, torch
from pathlib import Path
from playwright.sync_api import sync_playwright
from sagan.attention import AttentionMap
from sagan.runs import load_run, shipped
from sagan.reports import NOTEBOOK
from sagan.explorer import explore, view
from sagan.widget import AttentionExplorer

S, N = 128, 400
PROBE = """() => {
    const canvas = document.querySelector('canvas[role=application]'), root = canvas.closest('.sagan')
    const shown = () => String(root.attention()?.point)
    let event = null, handed = 0, before = '', where = ''
    window.times = []
    const begin = e => {
        const at = `${e.clientX} ${e.clientY}`
        if (at !== where) [event, handed, before, where] = [e.timeStamp, performance.now(), shown(), at] }
    const end = () => {
        if (event === null || shown() === before) return
        const canvases = root.querySelectorAll('.panels figure > canvas')
        for (const c of canvases) c.getContext('2d').getImageData(0, 0, 1, 1)
        times.push([performance.now() - handed, performance.now() - event])
        event = null }
    for (const kind of ['pointerrawupdate', 'pointermove']) {
        window.addEventListener(kind, begin, true) // before the explorer hears of it
        // after it has, and after the frame that it may have asked for
        window.addEventListener(kind, () => { end(), requestAnimationFrame(end) }) }
}"""

def explorer():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 32*32, 16, generator=g), torch.randn(1, 16*16, 16, generator=g)
    m = AttentionMap('', q, k, (32, 32), (16, 16), (S, S))
    x = torch.rand(1, 3, S, S, generator=g)*2 - 1
    return AttentionExplorer(*view(x, {'G 32x32': m}, [('', 0)]))

CLICK = """() => new Promise(done => {
    const canvas = document.querySelector('canvas[role=application]')
    const before = canvas.ariaLabel, start = performance.now()
    const end = () => { canvas.getContext('2d').getImageData(0, 0, 1, 1), done(performance.now() - start) }
    new MutationObserver((_, o) => {
        if (canvas.ariaLabel === before) return
        o.disconnect()
        requestAnimationFrame(end) }
    ).observe(canvas, { attributes: true })
    const buttons = [...document.querySelectorAll('button')]
    buttons.find(b => b.textContent === 'Next').click() })"""

def clock(page):
    "A function that gives the milliseconds of the main thread so far: of the script, and of all tasks"
    client = page.context.new_cdp_session(page)
    client.send('Performance.enable', dict(timeDomain='threadTicks'))
    def used():
        known = {m['name']: 1000*m['value'] for m in client.send('Performance.getMetrics')['metrics']}
        return known['ScriptDuration'], known['TaskDuration']
    return used

PAINTED = 'new Promise(d => requestAnimationFrame(() => requestAnimationFrame(d)))'

def computing(page, box, n=140):
    "Milliseconds of the main thread for each of n movements: of the script, and of all tasks"
    used = clock(page)
    for i in range(n):
        before = used()
        right, down = (i*37 % 101 + .5)/102, (i*53 % 103 + .5)/104
        page.mouse.move(box['x'] + box['width']*right, box['y'] + box['height']*down)
        page.evaluate(PAINTED)
        yield [b - a for a, b in zip(before, used())]

def drawing(browser, folder, n=30):
    "Milliseconds of the main thread until the first picture, and for each click on a button"
    explore(load_run(shipped('twins'))).save(f'{folder}/live.html')
    page = browser.new_page(viewport=dict(width=1200, height=900))
    used = clock(page)
    def taken(do, *args):
        before = used()[1]
        do(*args)
        page.evaluate(PAINTED)
        return used()[1] - before
    yield 'opening the page', [taken(page.goto, Path(f'{folder}/live.html').as_uri())]
    for words, name, times in (('first picture', 'Next', 1), ('later pictures', 'Next', n),
                               ('hiding', 'Hide where it looks', 1)):
        button = page.get_by_role('button', name=name)
        yield words, sorted(taken(button.evaluate, 'b => b.click()') for _ in range(times))
    page.close()

def generating(browser, folder):
    "Milliseconds from each of 30 clicks to the picture"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    source = NOTEBOOK.format(run=str(shipped('twins')), device='cpu', images=None)
    cell = dict(cell_type='code', execution_count=None, metadata={}, outputs=[], source=source)
    notebook = dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=4)
    Path(f'{folder}/e.ipynb').write_text(json.dumps(notebook), encoding='utf-8')
    command = [sys.executable, '-m', 'voila', 'e.ipynb', '--no-browser', f'--port={port}']
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    voila = subprocess.Popen(command, cwd=folder, **quiet)
    try:
        for _ in range(240):
            try:
                socket.create_connection(('127.0.0.1', port), 1).close()
                break
            except OSError: time.sleep(.25)
        page = browser.new_page()
        page.goto(f'http://127.0.0.1:{port}', timeout=90_000)
        page.wait_for_selector('canvas[role=application]', timeout=90_000)
        return sorted(page.evaluate(CLICK) for _ in range(30))
    finally:
        voila.terminate()
        voila.wait()

if __name__ == '__main__':
    e = explorer()
    e.pins = [[20, 30], [90, 100], [64, 10]]
    with tempfile.TemporaryDirectory() as d, sync_playwright() as p:
        e.save(f'{d}/e.html')
        browser = p.chromium.launch(executable_path=shutil.which('chromium'), args=['--no-sandbox'])
        print(f'Chromium {browser.version}, {N} movements\n\n| window | canvas | from handed over: p50, ms | '
              'p95, ms | from the event: p50, ms | p95, ms | script: p50, ms | all: p50, ms | p95, ms |\n'
              '|---|---|---|---|---|---|---|---|---|')
        for width, dpr in ((1200, 1), (1200, 2), (390, 3)):
            page = browser.new_page(viewport=dict(width=width, height=900), device_scale_factor=dpr)
            page.goto(Path(f'{d}/e.html').as_uri())
            page.wait_for_selector('canvas[role=application]')
            canvas = page.locator('canvas[role=application]')
            box = canvas.bounding_box()
            # before the probe, whose reading back is work, too
            script, tasks = [sorted(t) for t in zip(*computing(page, box))]
            page.evaluate(PROBE)
            for i in range(N):
                right, down = (i*37 % 101 + .5)/102, (i*53 % 103 + .5)/104
                page.mouse.move(box['x'] + box['width']*right, box['y'] + box['height']*down)
            columns = [sorted(t) for t in zip(*page.evaluate('times')[10:])]
            print(f"| {width} px, {dpr}x | {canvas.evaluate('c => c.width')} px |", ' | '.join(
                f'{t[len(t)//2]:.1f} | {t[int(.95*len(t))]:.1f}' for t in columns),
                f'| {script[70]:.1f} | {tasks[70]:.1f} | {tasks[133]:.1f} |')
            page.close()
        print('\nwithout a kernel, 1200 px, 1x:')
        for words, times in drawing(browser, d):
            print(f'{words}: p50 {times[len(times)//2]:.0f} ms, worst of {len(times)} {times[-1]:.0f} ms')
        times = generating(browser, d)
        print(f'\nfrom a click on Next to the picture, {os.cpu_count()} cores: p50 {times[15]:.0f} ms, worst '
              f'of 30 {times[-1]:.0f} ms')
        browser.close()
