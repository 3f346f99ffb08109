// The attention explorer: one module for notebooks, Voila and stand-alone pages.
//
// anywidget calls `render`; a stand-alone page starts itself at the end of this file. `model` holds the state, with
// get, set, save_changes and on. All that can be asked of a generator goes through it, too: label, seed, towards,
// far, gamma, hide, cut and uploads are set here. Header and data come back, the image as trained and its maps; and,
// where attention is changed, effect, changed and after: what it did in words and as a picture, and the changed image
// with its maps. Who draws, a kernel or, on a stand-alone page, the `drawer` of generator.js, makes no difference; a
// model without `drawing` is one that nobody draws for.

const CSS = `
.sagan { --ink: var(--jp-ui-font-color0, var(--vscode-editor-foreground, #1a1a1a));
  --paper: var(--jp-layout-color1, var(--vscode-editor-background, #fff));
  --line: var(--jp-border-color0, #767676); --soft: color-mix(in srgb, var(--ink) 9%, var(--paper)); --accent: #0072b2;
  --side: min(100%, max(16rem, 56vh)); color: var(--ink); background: var(--paper); padding: .25rem;
  font: 15px/1.45 system-ui, sans-serif; text-align: left }
@media (prefers-color-scheme: dark) {
  .sagan { --ink: var(--jp-ui-font-color0, var(--vscode-editor-foreground, #eee));
    --paper: var(--jp-layout-color1, var(--vscode-editor-background, #181818)); --line: var(--jp-border-color0, #8a8a8a) }
  body[data-voila=voila][data-jp-theme-light=true] { --jp-ui-font-color0: #eee; --jp-ui-font-color1: #ddd;
    --jp-content-font-color0: #eee; --jp-content-font-color1: #ddd; --jp-layout-color0: #181818;
    --jp-layout-color1: #181818; --jp-layout-color2: #2a2a2a; --jp-border-color0: #8a8a8a; background: #181818 } }
html[theme=dark] .sagan { --ink: #eee; --paper: #383838; --line: #999 }
.sagan[hidden], .sagan [hidden] { display: none !important }
.sagan .about { margin: 0 0 .35rem; max-width: 60rem }
.sagan .bar { display: flex; flex-wrap: wrap; align-items: center; gap: .4rem .9rem; margin: 0 0 .5rem }
.sagan label { display: flex; align-items: center; gap: .45rem; margin: 0 }
.sagan :is(select, button, input[type=number]) { font: inherit; color: inherit; background: var(--paper);
  border: 1px solid var(--line); border-radius: 4px; padding: .2rem .65rem; min-height: 2.25rem; margin: 0 }
.sagan select { max-width: 14rem } .sagan input[type=number] { width: 6.2rem; box-sizing: border-box }
.sagan input[type=range] { accent-color: var(--accent); width: 9rem; min-width: 5rem; margin: 0 }
.sagan input[type=checkbox] { accent-color: var(--accent); width: 1.15rem; height: 1.15rem; margin: 0 }
.sagan button { cursor: pointer } @media (hover: hover) { .sagan button:hover { background: var(--soft) } }
.sagan button:disabled { opacity: .5; cursor: default }
.sagan button[aria-pressed=true] { background: var(--accent); border-color: var(--accent); color: #fff }
.sagan .group { display: flex } .sagan .group button { border-radius: 0; margin-left: -1px }
.sagan .group button:first-of-type { border-radius: 4px 0 0 4px; margin-left: 0 }
.sagan .group button:last-of-type { border-radius: 0 4px 4px 0 }
.sagan :focus-visible { outline: 3px solid var(--accent); outline-offset: 2px }
.sagan .notice { display: flex; align-items: center; gap: .75rem; margin: 0 0 .25rem } .sagan .notice p { margin: 0; padding: .2rem 0 } .sagan .notice button { flex: none; min-width: 2.25rem }
.sagan .notice.tool p, .sagan .notice.error p { padding: .2rem .6rem; background: var(--soft); box-shadow: -4px 0 var(--accent) }
.sagan .notice.error p { box-shadow: -4px 0 #d55e00; outline: 2px solid #d55e00 }
.sagan.framed { --side: min(100%, 34rem) }
.sagan .content { display: flex; flex-direction: column; max-width: calc(var(--side) * 2 + 1.25rem) }
.sagan .content.causes { max-width: calc(var(--side) * 2.47 + 2.5rem) }
.sagan .panels { display: grid; gap: .75rem 1.25rem; grid-template-columns: repeat(2, minmax(0, 1fr)) }
.sagan .causes .panels { grid-template: auto 1fr / repeat(2, minmax(0, 1fr)) minmax(11.5rem, .47fr) }
.sagan .causes .effect { grid-area: 1 / 3 / 3 } .sagan .below { grid-column: 1 / 3; min-width: 0 }
.sagan .strips { display: flex; flex-wrap: wrap; gap: .75rem 2rem; margin-top: .25rem }
.sagan figure { margin: 0; min-width: 0 } .sagan figcaption { font-size: 14px; line-height: 1.35; margin: .2rem 0 }
.sagan h3 { font: 600 14px/1.4 system-ui, sans-serif; margin: 0 0 .2rem; color: inherit }
.sagan canvas { display: block; width: 100%; border-radius: 3px; background: #000 }
.sagan .pixels { image-rendering: pixelated }
.sagan .panels figure > canvas { touch-action: pan-y pinch-zoom; cursor: crosshair }
.sagan .effect canvas, .sagan .effect figure > canvas { cursor: inherit }
.sagan canvas.drag { touch-action: none !important; cursor: cell }
.sagan .under { padding-top: .4rem; font-size: 14px } .sagan .under label { width: 100% }
.sagan .under input { flex: 1 }
.sagan .scale { position: relative; height: 2.4rem; padding-top: .75rem; line-height: 1.2; font-size: 14px }
.sagan .scale i { position: absolute; inset: 0 0 auto; height: .75rem; border-radius: 2px }
.sagan .scale b { position: absolute; top: 0; width: 2px; height: .75rem; background: #fff; outline: 1px solid #000 }
.sagan .scale > span { position: absolute; top: .9rem; white-space: nowrap } .sagan .scale > span:last-of-type { right: 0; top: 2.05rem }
.sagan .scale > span.even { position: static; display: block; width: max-content; box-sizing: border-box; padding: .15rem 0 0 .3rem; border-left: 2px solid var(--ink) }
.sagan .scale > span.even.left { border: 0; border-right: 2px solid var(--ink); padding: .15rem .3rem 0 0; text-align: right }
.sagan .term { border-bottom: 2px dotted; cursor: help }
.sagan .term:is(:hover, :focus)::after { content: attr(data-meaning); position: absolute; z-index: 2; left: max(0px, min(var(--left, 0px), 100% - 24rem)); top: var(--top, 100%); max-width: min(100%, 24rem);
  width: max-content; box-sizing: border-box; padding: .35rem .6rem; border-radius: 4px; background: var(--ink); color: var(--paper);
  font-size: 14px; line-height: 1.35; text-align: left; white-space: normal }
.sagan .effect { display: flex; flex-direction: column; gap: .5rem } .sagan .effect .bar { margin: 0 }
.sagan .effect p { margin: 0; font-size: 14px; line-height: 1.35 } .sagan .effect .verdict { font-weight: 600 }
.sagan .pictures { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem; align-items: start } .sagan .pictures figure { grid-column: 1 / 3 }
.sagan .pictures button { padding: .3rem; line-height: 1.25 }
.sagan .status { position: relative; margin: 0 0 .5rem; min-height: 2.9em; font-size: 16px; font-variant-numeric: tabular-nums }
.sagan .more { margin: 0 0 .5rem } .sagan summary { cursor: pointer; padding: .35rem 0; font-weight: 600; width: max-content }
.sagan .more h3 { flex: 0 0 6.5rem; margin: 0 } .sagan .bar p { margin: 0; max-width: 60ch; font-size: 14px }
.sagan .strip { display: flex; flex-wrap: wrap; gap: .6rem }
.sagan .card { position: relative } .sagan .card > button:first-child { display: block; width: 7.2rem; padding: .3rem; text-align: left; line-height: 1.25; font-size: 13px; height: 100% }
.sagan .card canvas { margin-bottom: .2rem; aspect-ratio: 1 } .sagan .card .away { position: absolute; bottom: .3rem; right: .3rem; min-height: 1.6rem; padding: 0 .45rem; line-height: 1.5rem }
.sagan .pins .card span { display: block; padding-right: 1.7rem; min-height: 2rem }
.sagan dialog { color: var(--ink); background: var(--paper); border: 1px solid var(--line); border-radius: 6px; max-width: 34rem; padding: 1rem 1.25rem }
.sagan dialog::backdrop { background: #0008 } .sagan dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1rem; margin: .6rem 0 }
.sagan dt { font-weight: 600 } .sagan dd { margin: 0 } .sagan textarea { width: 100%; box-sizing: border-box; font: 13px/1.4 monospace; color: inherit; background: var(--soft); border: 1px solid var(--line) }
@media (max-width: 66rem) { .sagan .panels > figure h3 { min-height: 2.8em } }
@media (pointer: coarse), (max-width: 40rem) {
  .sagan :is(select, button, input[type=number]) { min-height: 44px; min-width: 44px }
  .sagan input[type=range] { height: 44px } .sagan label:has([type=checkbox]) { min-height: 44px }
  .sagan summary { padding: 0; min-height: 44px; line-height: 44px }
  .sagan .card .away { min-height: 44px } .sagan .pins .card span { padding-right: 44px; min-height: 44px } }
@media (max-width: 40rem) {
  .sagan, .sagan.framed { --side: 100% } .sagan { padding: 0 } .sagan .bar { gap: .4rem .6rem }
  .sagan .panels, .sagan .causes .panels { grid-template: none / repeat(2, minmax(0, 1fr)); gap: .5rem }
  .sagan .causes .effect { grid-area: auto / 1 / auto / 3 } .sagan .effect { gap: .4rem }
  .sagan .status { font-size: 15px; line-height: 1.35; min-height: 8.1em; margin: 0 0 .3rem } .sagan .notice { margin: 0 0 .3rem }
  .sagan h3, .sagan figcaption, .sagan .scale { font-size: 13px }
  .sagan .under { padding: 0 } .sagan .under input { min-width: 0 } .sagan .under + figcaption { margin: 0 } .sagan .scale { height: 44px }
  .sagan .pictures { grid-template-columns: repeat(3, 1fr) } .sagan .pictures figure { grid-column: auto }
  .sagan .more h3 { flex-basis: 100% } }`

// ---- Numbers

const STRONG = 1.5   // times an even spread: from here on there is an outline, and an arrow

// What Python packed: images as RGB, and queries and keys as 16-bit integers with one factor for each image
function unpack(header, view) {
  const bytes = bytesOf(view).slice()   // its own, so that it is aligned
  const vectors = (start, n, depth) => image => new Int16Array(bytes.buffer, start + 2 * image * n * depth, n * depth)
  const layers = header.layers.map(l => {
    const [nq, nk] = [l.queries, l.keys].map(([a, b]) => a * b)
    return { ...l, nq, nk, q: vectors(l.q, nq, l.depth), k: vectors(l.k, nk, l.depth), sums: {}, common: {} }
  })
  const magma = bytes.subarray(header.magma, header.magma + 768)
  const colors = Uint32Array.from({ length: 256 }, (_, i) => (255 << 24) + (magma[3 * i + 2] << 16) + (magma[3 * i + 1] << 8) + magma[3 * i])
  return { bytes, layers, magma, colors, contours: {}, plain: {} }   // the last two are filled as they are needed
}

// Keys that no query sees, and queries that get nothing, where attention was changed: hide and cut are boxes
function alter(view, { layer, view: { size } }, hide, cut) {
  const l = view.layers.find(l => l.name === layer)
  if (l && hide) l.hidden = covered(hide, l.keys, size)
  if (l && cut) l.cut = covered(cut, l.queries, size)
  return view
}

// Scalar products of vectors, one after the other in an array, with one vector
function products(vectors, one, factor) {
  const depth = one.length, out = new Float64Array(vectors.length / depth)
  for (let i = 0, at = 0; i < out.length; i++) {
    let sum = 0
    for (let d = 0; d < depth; d++) sum += vectors[at++] * one[d]
    out[i] = sum * factor
  }
  return out
}

const largest = values => { let best = 0; for (let i = 1; i < values.length; i++) if (values[i] > values[best]) best = i; return best }
const row = (vectors, i, depth) => vectors.subarray(i * depth, (i + 1) * depth)

// The logits of a query, minus infinity where a key is hidden
function logits(l, image, j) {
  const z = products(l.k(image), row(l.q(image), j, l.depth), l.factors[image])
  return l.hidden ? z.map((v, i) => l.hidden[i] ? -Infinity : v) : z
}

// Of each query: the logarithm of the sum in its softmax; and the largest weight of all, times the number of keys
function sums(l, image) {
  if (l.sums[image]) return l.sums[image]
  const logs = new Float64Array(l.nq)
  let top = 0
  for (let j = 0; j < l.nq; j++) {
    const z = logits(l, image, j), most = z[largest(z)]
    let sum = 0
    for (let i = 0; i < l.nk; i++) sum += Math.exp(z[i] - most)
    logs[j] = most + Math.log(sum)
    top = Math.max(top, l.nk / sum)
  }
  return l.sums[image] = { logs, top }
}

// The key at which most queries look most, and the share of the queries that do, of about a thousand
function common(l, image) {
  return l.common[image] ??= (() => {
    const votes = new Uint32Array(l.nk), step = Math.ceil(l.nq / 1024)
    let n = 0
    for (let j = 0; j < l.nq; j += step, n++) votes[largest(logits(l, image, j))]++
    const key = largest(votes)
    return { key, share: votes[key] / n }
  })()
}

const cellAt = ([r, c], grid, size) => Math.floor(r * grid[0] / size[0]) * grid[1] + Math.floor(c * grid[1] / size[1])

// Weights that the query of a point gives to all keys, or that its key is given by all queries (equation 1), in
// multiples of an even spread
function weigh(l, image, point, direction, size) {
  if (direction === 'to') {
    const { logs } = sums(l, image), i = cellAt(point, l.keys, size), z = products(l.q(image), row(l.k(image), i, l.depth), l.factors[image])
    return z.map((v, j) => l.hidden?.[i] || l.cut?.[j] ? 0 : l.nk * Math.exp(v - logs[j]))
  }
  const j = cellAt(point, l.queries, size), z = logits(l, image, j), most = z[largest(z)]
  if (l.cut?.[j]) return z.fill(0)
  let sum = 0
  for (let i = 0; i < z.length; i++) sum += z[i] = Math.exp(z[i] - most)
  return z.map(v => l.nk * v / sum)
}

// For each of N pixels the two of n cells that it lies between, and how far it is towards the second
const lattices = {}
function between(n, N, smooth) {
  if (lattices[[n, N, smooth]]) return lattices[[n, N, smooth]]
  const first = new Int32Array(N), second = new Int32Array(N), far = new Float64Array(N)
  for (let p = 0; p < N; p++) {
    const s = smooth ? Math.max(0, (p + .5) * n / N - .5) : Math.floor(p * n / N)
    first[p] = Math.floor(s); second[p] = Math.min(first[p] + 1, n - 1); far[p] = s - first[p]
  }
  return lattices[[n, N, smooth]] = [first, second, far]
}

// One value for each pixel of the image, from one for each cell
function upsample(weights, [h, w], [H, W], smooth) {
  const out = new Float32Array(H * W), [a, b, t] = between(h, H, smooth), [d, e, u] = between(w, W, smooth), line = new Float64Array(w)
  for (let r = 0, i = 0; r < H; r++) {
    const top = a[r] * w, bottom = b[r] * w, part = t[r]
    for (let c = 0; c < w; c++) line[c] = (1 - part) * weights[top + c] + part * weights[bottom + c]
    for (let c = 0; c < W; c++, i++) out[i] = (1 - u[c]) * line[d[c]] + u[c] * line[e[c]]
  }
  return out
}

// The same where some cells are off: these are zero, and the others do not mix with them
function upsampleApart(weights, grid, size, smooth, off) {
  const out = upsample(weights, grid, size, smooth)
  if (!smooth || !off?.includes(true)) return out
  const [share, cells] = [[off.map(v => !v), true], [off, false]].map(([v, mix]) => upsample(v, grid, size, mix))
  return out.map((v, i) => cells[i] ? 0 : v / share[i])
}

// How much of all weight, and of the image, is where the weight is strong
function inside(weights) {
  let sum = 0, all = 0, n = 0
  for (const v of weights) { all += v; if (v >= STRONG) { sum += v; n++ } }
  return { weight: Math.round(100 * sum / all), part: Math.round(100 * n / weights.length) }
}

// Marching squares: which sides of a square (0 top, 1 right, 2 bottom, 3 left) a line joins, by the corners above the level
const SIDES = { 1: [3, 0], 2: [0, 1], 3: [3, 1], 4: [1, 2], 5: [3, 0, 1, 2], 6: [0, 2], 7: [3, 2], 8: [2, 3], 9: [2, 0],
  10: [0, 1, 2, 3], 11: [2, 1], 12: [1, 3], 13: [1, 0], 14: [0, 3] }

// The borders of some cells of a grid, in pixels of the image
function border(cells, [h, w], [H, W]) {
  const path = new Path2D(), at = (r, c) => r >= 0 && c >= 0 && r < h && c < w && Boolean(cells[r * w + c]), y = H / h, x = W / w
  for (let r = 0; r <= h; r++) for (let c = 0; c <= w; c++) {
    if (at(r, c) !== at(r - 1, c)) { path.moveTo(c * x, r * y); path.lineTo((c + 1) * x, r * y) }
    if (at(r, c) !== at(r, c - 1)) { path.moveTo(c * x, r * y); path.lineTo(c * x, (r + 1) * y) }
  }
  return path
}
// Some cells of a grid as boxes of pixels that follow each other, one for each run of cells in a row
function boxes(cells, [h, w], [H, W]) {
  const found = []
  for (let r = 0; r < h; r++) for (let c = 0, from = 0; c < w; c++) {
    if (!cells[r * w + c]) continue
    if (!c || !cells[r * w + c - 1]) from = c
    if (c === w - 1 || !cells[r * w + c + 1]) found.push(...[r * H / h, from * W / w, (r + 1) * H / h, (c + 1) * W / w].map(Math.round))
  }
  return found
}

// Lines between the pixels above a level and those below, in pixels of the image; outside of it all is below
function outline(values, [H, W], level) {
  const path = new Path2D(), above = new Uint8Array((H + 2) * (W + 2))
  for (let r = 0; r < H; r++) for (let c = 0; c < W; c++) above[(r + 1) * (W + 2) + c + 1] = values[r * W + c] >= level
  const at = (r, c) => r < 0 || c < 0 || r >= H || c >= W ? NaN : values[r * W + c]
  const across = (a, b) => { const t = (level - a) / (b - a); return t >= 0 ? t : .5 }   // at the border of the image: halfway
  for (let r = -1, i = 0; r < H; r++, i++) for (let c = -1; c < W; c++, i++) {
    const kind = above[i] + 2 * above[i + 1] + 4 * above[i + W + 3] + 8 * above[i + W + 2]
    if (kind === 0 || kind === 15) continue
    const sides = SIDES[kind]
    for (let k = 0; k < sides.length; k++) {
      const side = sides[k], x = side === 1 ? 1 : side === 3 ? 0 : across(at(r + side / 2, c), at(r + side / 2, c + 1))
      const y = side === 0 ? 0 : side === 2 ? 1 : across(at(r, c + (side === 1)), at(r + 1, c + (side === 1)))
      if (k % 2) path.lineTo(c + .5 + x, r + .5 + y)
      else path.moveTo(c + .5 + x, r + .5 + y)
    }
  }
  return path
}

// The image as thin lines: how far its colors, blurred a little, are from its median color, cut at one and at two
// thirds of the range. So a shape has an outline whether it is lighter than the ground, darker, or of another color
function sketch(rgb, [H, W]) {
  const reach = Math.round(W / 64), far = new Float32Array(H * W), middle = (H * W - 1) >> 1
  const ground = [0, 1, 2].map(k => Uint8Array.from({ length: H * W }, (_, i) => rgb[3 * i + k]).sort()[middle])
  for (let r = 0; r < H; r++) for (let c = 0; c < W; c++) {
    const sum = [0, 0, 0]
    let n = 0
    for (let y = Math.max(0, r - reach); y <= Math.min(H - 1, r + reach); y++)
      for (let x = Math.max(0, c - reach); x <= Math.min(W - 1, c + reach); x++, n++)
        for (let k = 0; k < 3; k++) sum[k] += rgb[3 * (y * W + x) + k]
    far[r * W + c] = Math.hypot(...sum.map((v, k) => v / n - ground[k]))
  }
  const [low, high] = far.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, 0]), path = new Path2D()
  if (high - low > 8) for (const part of [1 / 3, 2 / 3]) path.addPath(outline(far, [H, W], low + part * (high - low)))
  return path
}

// ---- Pages and files

const make = (tag, props = {}, ...children) => {
  const e = Object.assign(document.createElement(tag), props)
  e.append(...children.filter(Boolean))
  return e
}
const attributes = (e, values) => { for (const k in values) e.setAttribute(k, values[k]); return e }

function download(name, blob) {
  const a = make('a', { href: URL.createObjectURL(blob), download: name })
  a.click()
  setTimeout(() => URL.revokeObjectURL(a.href), 60000)
}

const bytesOf = view => new Uint8Array(view.buffer, view.byteOffset, view.byteLength)
function base64(bytes) {
  let text = ''
  for (let i = 0; i < bytes.length; i += 32768) text += String.fromCharCode(...bytes.subarray(i, i + 32768))
  return btoa(text)
}

function fromBase64(text) {
  const raw = atob(text), bytes = new Uint8Array(raw.length)
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i)
  return bytes
}

const SHOWN = ['point', 'pins', 'layer', 'image', 'overlay', 'smooth', 'direction', 'same', 'before']
const BYTES = ['data', 'changed', 'after', 'weights']
const DRAWN = ['label', 'seed', 'towards', 'far', 'gamma', 'hide', 'cut']

// The stand-alone page of a model: its state is put into the page's gaps, as `AttentionExplorer.static` does in Python
function page(model) {
  const state = { message: '' }
  for (const k of ['header', ...SHOWN, ...DRAWN, 'effect', 'network', 'page']) if (model.get(k) !== undefined) state[k] = model.get(k)
  const parts = { state: JSON.stringify(state).replaceAll('<', '\\u003c'), js: model.get('_esm') }
  for (const k of BYTES) parts[k] = base64(bytesOf(model.get(k)))
  return model.get('page').replace(/@@(\w+)@@/g, (_, k) => parts[k])
}

const KEYS = [['Arrow keys', 'move the point by one cell'], ['Enter, Space', 'keep the point; with Hide or Cut, set a corner'],
  ['Delete', 'let go of the point kept last or chosen'], ['Escape', 'let go of all points'], ['F', 'from here, or to here'],
  ['L', 'next layer'], ['H', 'hide where the point looks'], ['B', 'before the change, or after it'], ['?', 'this list']]
const TOOLS = {
  hide: 'Drag over the image: the generator draws it again, and no point may look into that region.',
  cut: 'Drag over the image: the generator draws it again, and the points of that region get nothing from attention.' }
const EVEN = 'an even spread', SHARE = `${EVEN} (its equal share)`, MEANING = 'An even spread: if the point looked everywhere alike, each place would get the same weight. That weight is 1 here.'

const write = (e, text) => { if (e.textContent !== text) e.textContent = text }   // the same text again would cost a layout
const hovers = () => !matchMedia('(hover: none)').matches
const peaked = max => Math.round(10 * max) >= 10 * STRONG   // as the number beside it is rounded
const times = v => v.toFixed(1) + ' times'
const strong = v => v >= STRONG
const outlined = ({ max }) => peaked(max) && strong(max)
const place = ([r, c]) => `row ${Math.floor(r)}, column ${Math.floor(c)}`
const network = name => name.replace(/^G /, 'Generator ').replace(/^D /, 'Discriminator ')
const same = (a, b) => String(a) === String(b)

function render({ model, el }) {
  let header, view, trained, altered = null, current = null, pressed = null, hovering = false, tool = 'look', box = null, choice = null
  let drawn = false, asked = false, playing = false, shown = null, told = null, reading = null
  const set = values => { for (const k in values) model.set(k, values[k]); model.save_changes() }
  // Another image: what was hidden or cut was a region of the former one
  const another = values => set({ ...values, hide: null, cut: null })
  const live = () => model.get('drawing')?.classes
  const colour = i => header.colours[i % header.colours.length]
  const chosen = () => view.layers.find(l => l.name === model.get('layer')) ?? view.layers[0]

  // ---- What is on the page
  const button = (text, onclick, title = '') => make('button', { type: 'button', textContent: text, title, onclick })
  const field = (text, ...inputs) => make('label', {}, make('span', { textContent: text }), ...inputs)
  const number = (trait, max) => {
    const send = e => { if (e.target.reportValidity() && +e.target.value !== model.get(trait)) (trait === 'seed' ? another : set)({ [trait]: +e.target.value }) }
    return make('input', { type: 'number', min: 0, max, onchange: send, onkeydown: e => { if (e.key === 'Enter') send(e) } })
  }
  const slider = (trait, max, event) => make('input', { type: 'range', min: 0, max, step: .05, [event]: e => set({ [trait]: +e.target.value }) })
  const check = trait => make('input', { type: 'checkbox', onchange: e => set({ [trait]: e.target.checked }) })
  const group = (name, options, pick) => attributes(make('div', { className: 'group' }, ...Object.entries(options).map(([value, text]) =>
    Object.assign(button(text, () => pick(value)), { value }))), { role: 'group', 'aria-label': name })

  const klass = make('select'), seeds = make('select')
  const seed = number('seed', 1000000), towards = number('towards', 1000000)
  const far = slider('far', 1, 'oninput'), gamma = slider('gamma', 2, 'onchange'), strength = make('output')
  const files = make('input', { type: 'file', accept: 'image/*', multiple: true, hidden: true })
  const next = button('Next', () => another({ seed: model.get('seed') + 1 }), 'The next seed')
  const random = button('Random', () => another({ seed: Math.floor(Math.random() * 1000000) }), 'Another seed')
  const play = button('Play', () => { playing = !playing; choices(); if (playing) walk() }, 'Walk from one seed to the other, and back')
  const own = button('Own images', () => files.click(), 'Where the discriminator looks in images of your own')
  const classField = field('Class', klass), seedField = field('Seed', seeds), stored = make('p')
  const direction = group('Direction', { from: 'From here', to: 'To here' }, v => set({ direction: v }))
  const help = attributes(button('?', () => ask()), { 'aria-label': 'Keys and help', title: 'Keys and help' })
  const bar = make('div', { className: 'bar' }, classField, seedField, field('Seed', seed), next, random, direction, stored)
  attributes(direction, { title: 'Where this point looks, or which points look at it' })

  // What is needed less often is folded
  const overlay = slider('overlay', 1, 'oninput'), smooth = check('smooth'), sameScale = check('same')
  const tools = group('Tool', { look: 'Look', hide: 'Hide', cut: 'Cut' }, use)
  for (const b of tools.children) b.title = TOOLS[b.value] ?? 'Move over the image, and see where that point looks.'
  const clear = button('Clear points', () => letGo([]), 'Let go of all kept points')
  const titled = (text, ...parts) => make('div', { className: 'bar' }, make('h3', { textContent: text }), ...parts)
  const changes = titled('Attention', tools, field('Strength of attention', gamma, strength))
  const walking = titled('Walk', field('Towards seed', towards), field('How far', far), play)
  const needs = make('p', { textContent: 'They need Python: sagan-explore RUN opens the explorer of a run folder, where this is a button.' })
  const imports = titled('Own images', own, files, needs)
  const more = make('details', { className: 'more' }, make('summary', { textContent: 'More' }), changes, walking,
    titled('Map', field('Same scale for all points', sameScale), field('Smooth', smooth), clear), imports,
    titled('Save', button('Copy view', copy, 'A link or JSON that restores this view'), button('Save PNG', savePNG, 'A picture of image and map'),
      button('Save HTML', () => download(name('html'), new Blob([page(model)], { type: 'text/html' })), 'This page as a file that works by itself')))

  const about = make('p', { className: 'about' }), hint = make('p'), alert = attributes(make('p'), { role: 'alert' }), notice = make('div', { className: 'notice' }, hint, alert, help)
  const canvas = attributes(make('canvas', { tabIndex: 0, className: 'pixels' }), { role: 'application' })
  const map = attributes(make('canvas', {}), { role: 'img' })
  const scale = make('div', { className: 'scale' }), value = make('figcaption')
  const READ = `Gray lines: contours of the image. ${hovers() ? 'Move over' : 'Touch'} the map for values.`
  value.textContent = READ
  // The meaning hangs below the words
  const hang = ({ target: e }) => { e.style.setProperty('--left', `${e.offsetLeft}px`); e.style.setProperty('--top', `${e.offsetTop + e.offsetHeight}px`) }
  const term = textContent => attributes(make('span', { className: 'term', tabIndex: 0, textContent, onpointerenter: hang, onfocus: hang }), { role: 'button', 'data-meaning': MEANING, 'aria-description': MEANING })
  const status = attributes(make('p', { className: 'status' }), { 'aria-live': 'polite' }), meaning = term(EVEN)
  const imageTitle = make('h3'), title = make('h3')

  // What attention causes: the image before and after, which are a switch, too, and the difference
  const version = (text, before) => { const c = make('canvas', { className: 'pixels' }), b = button('', () => set({ before })); b.append(c, text); return { b, c } }
  const former = version('Before', true), later = version('After', false)
  const apart = attributes(make('canvas', { className: 'pixels' }), { role: 'img' }), apartWords = make('figcaption')
  const pictures = attributes(make('div', { className: 'pictures' }, former.b, later.b, make('figure', {}, apart, apartWords)), { role: 'group', 'aria-label': 'Before and after' })
  const verdict = make('p', { className: 'verdict' }), effect = attributes(make('p'), { role: 'status' })
  const undo = button('Undo changes', () => set({ hide: null, cut: null, gamma: 1 }))
  const without = button('Hide where it looks', hideOutlined), first = make('p')
  const effects = make('div', { className: 'effect' }, make('h3', { textContent: 'What if it may not look there?' }), make('div', { className: 'bar' }, without, undo), first, verdict, pictures, effect)

  const layersTitle = make('h3'), layers = make('div', { className: 'strip' }), kept = make('div', { className: 'strip pins' })
  const strips = make('div', { className: 'strips' }, make('section', {}, layersTitle, layers),
    make('section', {}, make('h3', { textContent: 'Kept points' }), kept))
  const panels = make('div', { className: 'panels' },
    make('figure', {}, imageTitle, canvas, make('div', { className: 'under' }, field('Image', overlay, make('span', { textContent: 'Map' })))),
    make('figure', {}, title, map, make('div', { className: 'under' }, scale), value), effects, make('div', { className: 'below' }, bar, more, strips))
  overlay.setAttribute('aria-label', 'From the image to the map')
  const dialog = make('dialog'), content = make('div', { className: 'content' }, status, panels)
  const root = make('div', { className: model.framed ? 'sagan framed' : 'sagan' }, about, notice, content, dialog)
  root.dataset.lmSuppressShortcuts = 'true'
  el.append(make('style', { textContent: CSS }), root)
  const ctx = canvas.getContext('2d'), over = map.getContext('2d'), small = document.createElement('canvas')

  // ---- Looking
  function look(point, layer = chosen()) {
    const image = model.get('image'), to = model.get('direction') === 'to', grid = to ? layer.queries : layer.keys, size = header.size
    const weights = weigh(layer, image, point, model.get('direction'), size), best = largest(weights), max = weights[best]
    const limit = Math.max(2, model.get('same') ? sums(layer, image).top : max)   // so that an even spread never looks strong
    const off = to ? layer.cut : layer.hidden
    return { point, layer: layer.name, grid, weights, best, max, limit, off,   // `to`: the middle of the strongest cell, in pixels from the corner
      to: [(Math.floor(best / grid[1]) + .5) * size[0] / grid[0], (best % grid[1] + .5) * size[1] / grid[1]],
      get inside() { return inside(weights) }, mean: weights.reduce((a, b) => a + b) / weights.length, get least() { return weights.reduce((a, b) => Math.min(a, b)) },
      get values() { return upsampleApart(weights, grid, size, model.get('smooth'), off) } }   // made when asked for
  }
  const pixels = (from = view) => from.bytes.subarray(3 * header.size[0] * header.size[1] * model.get('image'))
  const fit = (target, h, w) => { if (target.width !== w || target.height !== h) { target.width = w; target.height = h } return target.getContext('2d') }

  // The image, one canvas pixel for each of its own
  function plain(from = view) {
    return from.plain[model.get('image')] ??= (() => {
      const [H, W] = header.size, rgb = pixels(from), c = fit(document.createElement('canvas'), H, W), out = c.createImageData(W, H)
      for (let i = 0; i < H * W; i++) out.data.set([rgb[3 * i], rgb[3 * i + 1], rgb[3 * i + 2], 255], 4 * i)
      c.putImageData(out, 0, 0)
      return c.canvas
    })()
  }
  // Its contours as thin lines, as large as the map is on the screen
  function contours() {
    const known = view.contours[model.get('image')]
    if (known?.width === map.width) return known
    const c = fit(document.createElement('canvas'), map.height, map.width)
    line(c, sketch(pixels(), header.size), [2, '#0005'], [1, '#fff9'])
    return view.contours[model.get('image')] = c.canvas
  }
  // The map, so fine that the middle of each cell is one of its pixels: there the color is that of the cell's number
  function fine({ weights, grid, limit, off }) {
    if (!model.get('smooth')) return colored(small, weights, grid, limit)
    const size = grid.map(n => n * (2 * Math.floor(Math.max(0, 192 / n - 1) / 2) + 1))
    return colored(small, upsampleApart(weights, grid, size, true, off), size, limit)
  }
  // Values as colors, a canvas pixel for each
  function colored(target, values, [h, w], limit) {
    const c = fit(target, h, w), out = c.createImageData(w, h), px = new Uint32Array(out.data.buffer), factor = 255 / limit
    for (let i = 0; i < px.length; i++) px[i] = view.colors[Math.min(255, Math.round(values[i] * factor))]
    c.putImageData(out, 0, 0)
    return target
  }
  // The image under its map. Its contrast goes first: where the map is seen, lightness is the weight
  function blended(target, values, limit, a) {
    const [H, W] = header.size, rgb = pixels(), clear = (1 - a) ** 2, c = fit(target, H, W), out = c.createImageData(W, H)
    for (let i = 0; i < H * W; i++) {
      const m = 3 * Math.min(255, Math.round(255 * values[i] / limit))
      for (let k = 0; k < 3; k++) out.data[4 * i + k] = (1 - a) * (90 + clear * (rgb[3 * i + k] - 90)) + a * view.magma[m + k]
      out.data[4 * i + 3] = 255
    }
    c.putImageData(out, 0, 0)
    return target
  }
  function thumbnail(target, seen) {   // the browser smooths
    target.style.imageRendering = model.get('smooth') ? 'auto' : 'pixelated'
    colored(target, seen.weights, seen.grid, seen.limit)
  }

  // ---- Painting
  let density = 1   // canvas pixels in one of the screen
  function line(c, path, ...strokes) {   // `path` is in pixels of the image
    const s = c.canvas.width / header.size[1], u = density
    c.save(); c.scale(s, s); c.lineJoin = 'round'; c.lineCap = 'square'
    for (const [width, style] of strokes) { c.lineWidth = width * u / s; c.strokeStyle = style; c.stroke(path) }
    c.restore()
  }
  function mark(c, seen, colour) {
    const s = c.canvas.width / header.size[1], u = density
    const point = seen.point.map(v => (v + .5) * s), other = seen.to.map(v => v * s)
    const [[y, x], [ty, tx]] = model.get('direction') === 'to' ? [other, point] : [point, other], far = Math.hypot(tx - x, ty - y)
    if (peaked(seen.max) && far > 1) {
      const [dx, dy] = [(tx - x) / far, (ty - y) / far], head = Math.min(12 * u, far)
      for (const [width, style] of [[5, '#fff'], [2.5, colour]]) {
        c.beginPath(); c.moveTo(x, y); c.lineTo(tx, ty)
        for (const side of [1, -1]) {
          c.moveTo(tx, ty)
          c.lineTo(tx - head * (dx * .9 + side * dy * .45), ty - head * (dy * .9 - side * dx * .45))
        }
        c.lineCap = 'round'; c.lineWidth = width * u; c.strokeStyle = style; c.stroke()
      }
    }
    c.beginPath(); c.arc(point[1], point[0], 6 * u, 0, 7); c.fillStyle = colour; c.fill()
    c.lineWidth = 2 * u; c.strokeStyle = '#fff'; c.stroke()
  }
  function region(c, boxes, trait) {   // the cells that are hidden, or cut
    const grid = regionGrid(trait), cells = covered(boxes, grid, header.size), s = c.canvas.width / header.size[1], u = density, [y, x] = grid.map((n, i) => header.size[i] / n * s)
    c.fillStyle = '#0007'
    if (view === altered && c === ctx) cells.forEach((inside, i) => { if (inside) c.fillRect(i % grid[1] * x, Math.floor(i / grid[1]) * y, x, y) })
    const path = border(cells, grid, header.size), first = cells.indexOf(true)
    line(c, path, [2, '#000']); c.setLineDash([5 * u / s, 5 * u / s]); line(c, path, [2, '#fff']); c.setLineDash([])
    c.font = `600 ${13 * u}px system-ui, sans-serif`; c.textBaseline = 'top'; c.lineWidth = 3 * u; c.strokeStyle = '#000'; c.fillStyle = '#fff'
    const text = trait === 'hide' ? 'hidden' : 'cut', top = Math.floor(first / grid[1]) * y
    const at = [Math.min(first % grid[1] * x + 4 * u, c.canvas.width - 50 * u), top + (top < 18 * u ? 4 : -17) * u]   // above it, where no arrow ends
    if (first >= 0) { c.strokeText(text, ...at); c.fillText(text, ...at) }
  }

  function draw() {
    if (!header?.size) return
    const point = model.get('point'), pins = model.get('pins'), to = model.get('direction') === 'to', what = chosen()
    const i = pins.findIndex(p => same(p, point)), mine = colour(i < 0 ? pins.length : i)
    current = point && look(point)
    const a = model.get('overlay'), size = header.size
    ctx.imageSmoothingEnabled = false
    ctx.drawImage(current && a ? blended(small, current.values, current.limit, a) : plain(), 0, 0, canvas.width, canvas.height)
    over.imageSmoothingEnabled = model.get('smooth')
    if (current) over.drawImage(fine(current), 0, 0, map.width, map.height)
    else { over.fillStyle = '#000'; over.fillRect(0, 0, map.width, map.height) }
    over.drawImage(contours(), 0, 0)
    if (current && peaked(current.max)) line(ctx, border(current.weights.map(strong), current.grid, size), [4, '#fff'], [2, mine])
    const former = altered && view === trained
    for (const trait of ['hide', 'cut']) if (model.get(trait) && !former) for (const c of [ctx, over]) region(c, model.get(trait), trait)
    if (box) region(ctx, snapped(box), tool)
    points.forEach(({ seen }, k) => { if (k !== i) mark(ctx, seen, colour(k)) })
    if (current) { mark(ctx, current, mine); mark(over, current, mine) }
    write(title, `${!point ? 'Attention map' : `${to ? 'Who looks here' : 'Where this point looks'}${view === altered ? ' now' : ''}`}: ${network(what.name)}`)
    read()
    value.style.visibility = point ? 'visible' : 'hidden'   // so that nothing jumps
    write(layersTitle, point ? 'All layers at this point' : 'All layers')
    say(); ruler(); thumbnails()
    clear.disabled = !pins.length && !point
    const needed = what.name[0] !== 'G' ? 'Choose a layer of the generator: the discriminator does not draw.'
      : to ? 'Choose "From here": only where a point looks can be hidden.' : point ? '' : 'Choose a point first.'
    const hides = `One click hides the ${current && !outlined(current) ? 'brightest cell' : 'outlined place'} from all points, and the generator draws the image again.`
    without.disabled = Boolean(needed)
    without.title = needed || hides
    write(first, needed || (altered ? '' : hides)); first.hidden = without.hidden || !first.textContent
  }
  // At once, but no more than once in a frame: what is asked for after that is drawn when the next one begins
  function paint() {
    if (drawn) { asked = true; return }
    drawn = true; draw()
    requestAnimationFrame(() => { drawn = false; if (asked) { asked = false; paint() } })
  }

  function describe({ point, layer, best, to, max, mean, least, inside }) {
    const here = place(point), most = `${times(max)} ${SHARE}`, the = view === altered ? 'Now the' : 'The'
    if (view === altered && layer[0] === 'G' && model.get('gamma') === 0) return 'Attention is off (strength 0), so this map is not used.'
    if (model.get('direction') === 'to') return peaked(max) ? `Of all points, ${place(to)} looks here most: ${most}. The average of all points is ${times(mean)}.`
      : max < .05 ? `No point looks at ${here}.`
      : max < .95 ? `All points look less at ${here} than elsewhere: at most ${most}.`
      : least < .5 ? `Some points look at ${here}, but none strongly: at most ${most}.`
      : `All points look at ${here} nearly alike, at most ${most}.`
    if (!max) return `${the} point at ${here} is cut: it gets nothing from attention.`
    if (!peaked(max)) return `${the} point at ${here} looks ${least < .5 ? 'at many places, at none strongly:' : 'nearly everywhere alike,'} at most ${most}.`
    const { key, share } = common(view.layers.find(l => l.name === layer), model.get('image'))
    return `${the} point at ${here} looks most at ${place(to)}: ${most}. The outline holds ${inside.weight}% of its attention, on ${inside.part}% of the image.` +
      (view === trained && key === best && share >= .5 ? ` ${Math.round(100 * share)}% of all points look there most, so this place serves the whole image.` : '')
  }
  function say() {
    const text = current ? describe(current) : `No point is chosen. ${hovers() ? 'Move over the image, or click it' : 'Tap the image'}.`
    if (status.textContent === text) return
    const [start, ...rest] = text.split(EVEN)
    status.replaceChildren(start, ...rest.length ? [meaning, rest.join(EVEN)] : [])
  }
  // The color bar: from nothing to the limit, with a tick at an even spread
  const ramp = make('i'), tick = make('b'), even = make('span', {}, term('even spread')), zero = make('span', { textContent: '0' }), most = make('span')
  scale.append(ramp, tick, zero, even, most)
  function ruler() {
    scale.style.visibility = current ? 'visible' : 'hidden'
    if (!current) return
    const at = 100 / current.limit, text = `${times(current.limit)} an even spread`
    if (most.textContent === text) return
    most.textContent = text
    zero.hidden = at < 18
    tick.style.left = `${at}%`
    even.className = at > 50 ? 'even left' : 'even'
    even.style = at > 50 ? `width: ${at}%` : `margin-left: ${at}%`
  }
  const gradient = () => Array.from({ length: 17 }, (_, i) => { const m = 3 * Math.min(255, 16 * i); return `rgb(${view.magma.subarray(m, m + 3).join()})` }).join()

  // ---- Thumbnails: all layers for this point, and the kept points in this layer
  function card(onclick, away) {
    const c = attributes(make('canvas'), { 'aria-hidden': 'true' }), words = make('span'), b = make('button', { type: 'button', onclick }, c, words)
    const x = away && attributes(button('×', away), { class: 'away' })
    return { root: make('div', { className: 'card' }, b, x), c, words, b, x }
  }
  let cards = [], points = []
  function thumbnails() {
    cards.forEach(({ c, words, b, layer }) => {
      const l = view.layers.find(l => l.name === layer), seen = model.get('point') && (l.name === current.layer ? current : look(model.get('point'), l))
      c.hidden = !seen
      if (seen) thumbnail(c, seen)
      words.textContent = network(layer) + (seen ? `, up to ${times(seen.max)}` : '')
      b.setAttribute('aria-pressed', layer === chosen().name)
    })
    points.forEach(({ b, point }) => b.setAttribute('aria-pressed', same(point, model.get('point'))))
  }
  function drawPins() {
    if (!header?.size) return
    const pins = model.get('pins')
    if (!pins.some(p => same(p, choice))) choice = pins.at(-1) ?? null
    points = pins.map((point, i) => {
      const seen = look(point), item = card(() => { choice = point; set({ point }) }, () => letGo(pins.filter(p => p !== point)))
      thumbnail(item.c, seen)
      item.c.style.border = `4px solid ${colour(i)}`; item.c.style.boxSizing = 'border-box'
      item.words.textContent = `Point ${i + 1}, up to ${times(seen.max)}`
      item.b.setAttribute('aria-label', `Point ${i + 1}. ${describe(seen)}`)
      attributes(item.x, { 'aria-label': `Let go of point ${i + 1}`, title: 'Let go of this point' })
      return { ...item, point, seen }
    })
    kept.replaceChildren(...points.map(p => p.root))
    kept.parentNode.hidden = !pins.length
    paint()
  }

  // ---- Choices: the page follows the model, and the model the page
  const name = kind => ['attention', header.images[model.get('image')].class, header.numbered, header.images[model.get('image')].seed, chosen().name]
    .filter(Boolean).join('-').replace(/[^\w.-]+/g, '-') + '.' + kind
  function fill(select, options, value) {
    if (!same([...select.options].map(o => o.value), options.map(o => o[0])))
      select.replaceChildren(...options.map(([value, textContent]) => make('option', { value, textContent })))
    select.value = value
    select.parentNode.hidden = options.length < 2
  }
  const press = (group, value) => { for (const b of group.querySelectorAll('button')) b.setAttribute('aria-pressed', b.value === value) }

  function choices() {
    const message = model.get('message')
    playing &&= !message
    about.textContent = model.get('network')?.about ?? ''; about.hidden = !about.textContent
    alert.textContent = message; hint.hidden = Boolean(message); alert.hidden = !message
    notice.classList.toggle('error', Boolean(message)); notice.classList.toggle('tool', tool !== 'look')
    content.hidden = !header?.size
    if (content.hidden) return
    const image = header.images[model.get('image')], drawing = model.get('drawing') ?? {}, generates = Boolean(live())
    hint.textContent = TOOLS[tool] ?? (hovers() ? 'Move over the image: the map shows where that point looks. A click keeps the point.'
      : 'Tap the image: the map shows where that point looks.')
    if (generates) fill(klass, drawing.classes.map((c, i) => [String(i), c]), String(model.get('label')))
    else {
      const names = [...new Set(header.images.map(i => i.class))]
      fill(klass, names.map(c => [c, c]), image.class)
      fill(seeds, header.images.filter(i => i.class === image.class).map(i => [i.seed, i.seed]), image.seed)
      seedField.firstChild.textContent = header.numbered[0].toUpperCase() + header.numbered.slice(1)
    }
    if (generates) {
      seedField.hidden = header.images.length < 2 || header.numbered === 'seed'
      if (!seedField.hidden) { fill(seeds, header.images.map(i => [i.seed, i.seed]), image.seed); seedField.firstChild.textContent = 'Image' }
    }
    for (const e of [seed.parentNode, next, random, walking]) e.hidden = !generates
    changes.hidden = !drawing.attention
    without.hidden = !generates; undo.hidden = !generates || model.get('gamma') === 1 && !model.get('hide') && !model.get('cut')
    effects.hidden = !drawing.attention && !altered
    content.classList.toggle('causes', !effects.hidden)
    const { note: why, D } = model.get('network') ?? {}
    own.hidden = !drawing.own
    needs.hidden = drawing.own || !D
    imports.hidden = own.hidden && needs.hidden
    stored.hidden = generates || !why
    stored.textContent = `These images are stored in the page. It cannot draw others: ${why}.`
    seed.value = model.get('seed'); towards.value = model.get('towards'); far.value = model.get('far'); gamma.value = model.get('gamma')
    strength.textContent = `×${model.get('gamma')}`
    play.textContent = playing ? 'Pause' : 'Play'
    overlay.value = model.get('overlay'); smooth.checked = model.get('smooth'); sameScale.checked = model.get('same')
    press(direction, model.get('direction')); press(tools, tool)
    canvas.classList.toggle('drag', tool !== 'look')
    const what = chosen()
    imageTitle.textContent = view === altered ? 'The image after the change' : altered ? 'The image before the change' : 'The image'
    canvas.setAttribute('aria-label', `${image.class ? `Class ${image.class}, ` : ''}${header.numbered} ${image.seed}, ${header.size[1]} by ${header.size[0]} pixels, ` +
      `with attention of layer ${what.name}. Arrow keys move the point, Enter keeps it, Escape clears.`)
    map.setAttribute('aria-label', `Map of layer ${what.name}, from dark for no attention to bright for the most`)
    if (!same(cards.map(c => c.layer), view.layers.map(l => l.name))) {
      cards = view.layers.map(l => ({ ...card(() => set({ layer: l.name })), layer: l.name }))
      layers.replaceChildren(...cards.map(c => c.root))
    }
    ramp.style.background = `linear-gradient(to right, ${gradient()})`
    resize(); drawPins()
  }

  // Another view has come, or another change: what belongs together may come one after the other
  function receive() {
    const [h, data, e, changed, after] = ['header', 'data', 'effect', 'changed', 'after'].map(k => model.get(k))
    if (h.size && data?.byteLength !== h.bytes || h === header && data === shown && e === told) return
    if (e?.words && (after?.byteLength !== e.view.bytes || changed?.byteLength !== h.size[0] * h.size[1])) return
    if (h.size && (h !== header || data !== shown)) trained = unpack(h, data)
    if (e !== told) altered = e?.words ? alter(unpack(e.view, after), e, model.get('hide'), model.get('cut')) : null
    header = h; shown = data; told = e
    choose(); walk()
  }
  // What is looked at: the image as trained, or as it is with changed attention
  function choose() {
    view = altered && !model.get('before') ? altered : trained
    choices(); showEffect()
  }
  function showEffect() {
    verdict.hidden = pictures.hidden = effect.hidden = !altered
    effect.textContent = altered ? told.words : ''
    if (!altered) return
    const e = told, some = e.most >= 1e-3
    verdict.textContent = !some ? 'The image does not change.' : `The image ${e.most < .05 ? 'hardly changes' : 'changes'}: ${e.mean} on average, at most ${e.top} at one pixel (100% is from black to white).`
    for (const [{ b, c }, from] of [[former, trained], [later, altered]]) {
      fit(c, ...header.size).drawImage(plain(from), 0, 0)
      b.setAttribute('aria-pressed', from === view)
    }
    const [H, W] = header.size, bytes = bytesOf(model.get('changed')), c = fit(apart, H, W), out = c.createImageData(W, H)
    for (let i = 0; i < H * W; i++) out.data.set([bytes[i], bytes[i], bytes[i], 255], 4 * i)
    c.putImageData(out, 0, 0)
    const factor = 1 / e.most
    apart.hidden = !some
    apartWords.textContent = !some ? '' : `Difference${factor < 1.05 ? '' : `, amplified ${+factor.toPrecision(2)} times`}: black is none, white is ${e.top}`
    apart.setAttribute('aria-label', `Difference, amplified: ${e.words}`)
  }
  function walk() {
    if (!playing) return
    const t = model.get('far')
    if (t >= 1) walk.back = true
    if (t <= 0) walk.back = false
    setTimeout(() => { if (playing) set({ far: Math.min(1, Math.max(0, Math.round(100 * t + (walk.back ? -2 : 2)) / 100)) }) }, 40)
  }

  klass.onchange = () => live() ? another({ label: +klass.value }) : toImage({ class: klass.value, seed: seeds.value })
  seeds.onchange = () => toImage({ class: header.images[model.get('image')].class, seed: seeds.value })
  function toImage(wanted) {
    const alike = header.images.map((im, i) => [im, i]).filter(([im]) => im.class === wanted.class)
    set({ image: (alike.find(([im]) => im.seed === wanted.seed) ?? alike[0])[1] })
  }
  files.onchange = async () => {
    const read = await Promise.all([...files.files].map(async f => ({ name: f.name, content: new DataView(await f.arrayBuffer()) })))
    files.value = ''
    if (read.length) set({ uploads: read })
  }

  // ---- Dialogs
  function ask(...parts) {
    const close = button('Close', () => dialog.close())
    const keys = make('dl', {}, ...KEYS.flatMap(([k, what]) => [make('dt', { textContent: k }), make('dd', { textContent: what })]))
    const words = make('p', { textContent: `The map shows where the chosen point looks: the brighter, the more. ${MEANING} ` +
      'From 1.5 times an even spread on, an outline surrounds the place, and an arrow goes to the strongest one.' })
    dialog.replaceChildren(...parts.length ? parts : [make('h3', { textContent: 'Keys on the image' }), keys, words], close)
    dialog.showModal()
  }
  const restored = () => Object.fromEntries([...SHOWN, ...live() ? DRAWN : []].map(k => [k, model.get(k)]))
  function copy() {
    const json = JSON.stringify(restored()), linked = model.link
    const text = linked ? `${location.href.split('#')[0]}#view=${encodeURIComponent(json)}` : json
    const area = attributes(make('textarea', { value: text, readOnly: true, rows: 6 }), { 'aria-label': 'View' })
    navigator.clipboard?.writeText(text).catch(() => {})
    ask(make('h3', { textContent: linked ? 'This link restores the view' : 'This JSON restores the view' }),
      make('p', { textContent: linked ? 'It is in the clipboard, where the browser allows that.' : 'In Python: explorer.restore(\'...\'). It is in the clipboard, where the browser allows that.' }), area)
    area.select()
  }
  function savePNG() {   // both panels, and below them what they show
    const gap = Math.round(16 * density), text = Math.round(15 * density), w = canvas.width + gap + map.width
    const all = make('canvas', { width: w, height: canvas.height + 5 * text }), c = all.getContext('2d')
    c.fillStyle = '#fff'; c.fillRect(0, 0, w, all.height)
    c.drawImage(canvas, 0, 0); c.drawImage(map, canvas.width + gap, 0)
    c.fillStyle = '#000'; c.font = `${text}px system-ui, sans-serif`
    const lines = current ? [title.textContent + `; brightest: ${times(current.limit)} an even spread`, ...status.textContent.split(/(?<=\.) /)] : []
    lines.forEach((t, i) => c.fillText(t, 4, canvas.height + text * 1.35 * (i + 1), w - 8))
    all.toBlob(b => download(name('png'), b))
  }

  // ---- Points and regions
  function letGo(left) {
    choice = null
    set({ pins: left, point: left.at(-1) ?? null })
    const focus = document.activeElement
    if (focus === clear || !root.contains(focus)) canvas.focus({ preventScroll: true })
  }
  function keep(point) {
    const pins = model.get('pins')
    if (!point) return
    choice = point
    set(pins.some(k => same(k, point)) ? { point } : { point, pins: [...pins, point] })
  }
  function use(value) { tool = value; box = null; choices() }
  // A region covers whole cells of the generator's layer: of keys, to hide them; of queries, to cut them
  const regionGrid = trait => (chosen().name[0] === 'G' ? chosen() : view.layers.findLast(l => l.name[0] === 'G') ?? chosen())[trait === 'hide' ? 'keys' : 'queries']
  function snapped([[r0, c0], [r1, c1]]) {
    const grid = regionGrid(tool)
    const ends = [[r0, r1], [c0, c1]].map(([a, b], i) => {
      const cell = v => Math.floor(v * grid[i] / header.size[i]), edge = n => Math.round(n * header.size[i] / grid[i])
      return [edge(cell(Math.min(a, b))), edge(cell(Math.max(a, b)) + 1)]
    })
    return [ends[0][0], ends[1][0], ends[0][1], ends[1][1]]
  }
  // What is outlined, or where it is nowhere, the strongest cell; together with what is hidden in the map that is seen
  function hideOutlined() {
    const { weights, best, grid } = current, cells = Array.from(weights, (v, i) => outlined(current) ? strong(v) : i === best)
    set({ hide: [...view === altered && model.get('hide') || [], ...boxes(cells, grid, header.size)], before: false })
  }
  function finish() {
    const done = snapped(box), trait = tool
    box = null; tool = 'look'
    set({ [trait]: done, before: false })
  }

  const at = e => {
    const b = e.target.getBoundingClientRect(), inside = (v, n) => Math.min(n - 1, Math.max(0, Math.floor(v * n)))
    return [inside((e.clientY - b.top) / b.height, header.size[0]), inside((e.clientX - b.left) / b.width, header.size[1])]
  }
  const mouse = e => e.pointerType !== 'touch'
  canvas.onpointerdown = e => {
    if (e.button || !e.isPrimary) return
    pressed = { x: e.clientX, y: e.clientY, far: 0, point: model.get('point') }
    if (tool !== 'look') { canvas.setPointerCapture(e.pointerId); box = [at(e), at(e)]; paint() }
  }
  function moved(e) {
    if (!e.isPrimary) return
    const p = at(e)
    if (pressed) pressed.far = Math.max(pressed.far, Math.hypot(e.clientX - pressed.x, e.clientY - pressed.y))
    if (box && pressed) { if (!same(box[1], p)) { box = [box[0], p]; paint() } return }
    if (tool !== 'look' || same(p, model.get('point')) || !mouse(e) && !(pressed?.far >= 12)) return
    hovering = mouse(e)
    set({ point: p })
  }
  canvas.onpointermove = moved
  canvas.onpointerrawupdate = e => { if (!drawn) moved(e) }   // comes before the frame in which the browser hands movements over
  canvas.onpointerleave = () => { if (hovering && tool === 'look') set({ point: choice }); hovering = false }
  canvas.onpointerup = e => {
    if (!e.isPrimary || !pressed) return
    if (box) finish()
    else if (pressed.far < (mouse(e) ? 8 : 24)) { keep(at(e)); hovering = mouse(e) }
    pressed = null
  }
  canvas.onpointercancel = e => {   // a finger that scrolls
    if (!e.isPrimary || !pressed) return
    if (box) { box = null; paint() } else if (!same(pressed.point, model.get('point'))) set({ point: pressed.point })
    pressed = null
  }
  // The value where the map was touched last; a cell has the same place here and in the sentence
  function read() {
    if (!current || !reading) { write(value, READ); return }
    const { weights, grid } = current, cell = cellAt(reading, grid, header.size), v = weights[cell]
    const middle = [Math.floor(cell / grid[1]), cell % grid[1]].map((n, i) => (n + .5) * header.size[i] / grid[i])
    write(value, `At ${place(middle)}: ${v < .05 ? v.toFixed(3) + ' times' : times(v)} an even spread.`)
  }
  map.onpointermove = map.onpointerdown = e => { reading = at(e); read() }
  map.onpointerleave = e => { if (mouse(e)) { reading = null; read() } }   // a finger leaves whenever it is lifted

  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }
  canvas.onkeydown = e => {
    if (e.ctrlKey || e.altKey || e.metaKey) return
    const point = model.get('point'), pins = model.get('pins'), key = e.key.length === 1 ? e.key.toLowerCase() : e.key
    hovering = false
    if (steps[key]) {
      const grid = chosen()[model.get('direction') === 'to' ? 'keys' : 'queries']
      const to = i => {   // the middle of the next cell; of the image at first
        const n = grid[i], S = header.size[i], c = point ? Math.floor(point[i] * n / S) + steps[key][i] : Math.floor(n / 2)
        return Math.floor((Math.min(n - 1, Math.max(0, c)) + .5) * S / n)
      }
      const p = [to(0), to(1)]
      if (box) box = [box[0], p]
      set({ point: p })
    } else if (key === 'Enter' || key === ' ') {
      if (tool === 'look') keep(point)
      else if (box) finish()
      else if (point) { box = [point, point]; paint() }
    } else if (key === 'Delete' || key === 'Backspace') letGo(pins.filter(p => !same(p, pins.some(k => same(k, point)) ? point : choice)))
    else if (key === 'Escape') { if (box) { box = null; paint() } else letGo([]) }
    else if (key === 'f') set({ direction: model.get('direction') === 'to' ? 'from' : 'to' })
    else if (key === 'l') { const names = view.layers.map(l => l.name); set({ layer: names[(names.indexOf(chosen().name) + 1) % names.length] }) }
    else if (key === 'b' && altered) set({ before: !model.get('before') })
    else if (key === 'h' && !without.hidden && !without.disabled) hideOutlined()
    else if (key === '?') ask()
    else return
    e.preventDefault(); e.stopPropagation()
  }
  root.onkeydown = e => { if (e.key === '?' && !/INPUT|TEXTAREA|SELECT/.test(e.target.tagName) && !dialog.open) { ask(); e.preventDefault() } }

  // As many canvas pixels as the screen has
  function resize() {
    density = canvas.clientWidth ? Math.round(canvas.clientWidth * devicePixelRatio) / canvas.clientWidth : 1
    for (const c of [canvas, map]) {
      const width = Math.round(c.clientWidth * devicePixelRatio), height = Math.round(width * header.size[0] / header.size[1])
      if (width && (c.width !== width || c.height !== height)) { c.width = width; c.height = height; c.style.aspectRatio = `${width} / ${height}`; asked = true }
    }
    if (asked) { asked = false; draw() }
  }
  const observer = new ResizeObserver(() => { if (header?.size) resize() })
  observer.observe(canvas)

  root.attention = () => current   // for tests, and for whoever looks into it
  model.on('change:point', paint)
  model.on('change:pins', drawPins)
  model.on('change:before', choose)
  for (const k of ['header', 'data', 'effect', 'changed', 'after']) model.on(`change:${k}`, receive)
  for (const k of ['message', 'layer', 'image', 'overlay', 'smooth', 'direction', 'same', ...DRAWN]) model.on(`change:${k}`, choices)
  choice = model.get('point')
  receive()
  return () => { playing = false; observer.disconnect() }
}

export default { render }

// On a stand-alone page the state is in the page, or in its address, and a few lines do for a model
const state = document.getElementById('sagan-state')
if (state) {
  const values = JSON.parse(state.textContent), heard = {}, changed = new Set(), inPage = k => document.getElementById(`sagan-${k}`).textContent
  for (const k of BYTES) values[k] = new DataView(fromBase64(inPage(k)).buffer)
  values._esm = inPage('js')
  if (values.weights.byteLength) values.drawing = values.network
  const frame = window.frameElement   // of a page that shows this one, and is as high as this is
  document.documentElement.classList.toggle('framed', Boolean(frame))   // the page around it has a title
  if (frame) new ResizeObserver(() => { frame.style.height = `${Math.ceil(document.body.getBoundingClientRect().height) + 40}px` }).observe(document.body)
  const model = { link: !frame, framed: Boolean(frame), get: k => values[k], on: (event, f) => (heard[event] ??= []).push(f),
    set(k, v) { changed.add(k); model.put({ [k]: v }) },
    put(some) { Object.assign(values, some); for (const k in some) for (const f of heard[`change:${k}`] ?? []) f() },
    save_changes() { follow([...changed]); changed.clear() } }
  const follow = values.drawing ? drawer(model, values.network, values.weights) : () => {}
  const linked = /^#view=(.*)/.exec(location.hash)
  if (linked) try {
    const given = Object.entries(JSON.parse(decodeURIComponent(linked[1]))).filter(([k]) => [...SHOWN, ...values.drawing ? DRAWN : []].includes(k))
    Object.assign(values, Object.fromEntries(given))
    follow(given.map(([k]) => k))
  } catch { /* as saved */ }
  render({ model, el: document.getElementById('sagan-view') })
}
