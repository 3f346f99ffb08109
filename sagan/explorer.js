// The attention explorer. One module serves Jupyter and Voila, where anywidget calls `render`, and stand-alone pages, which start themselves at the end.
// `model` has get, set, save_changes and on; page 09 says what header and data hold.

const CSS = `
.sagan { --ink: var(--jp-ui-font-color0, #1a1a1a); --paper: var(--jp-layout-color1, #fff); --line: var(--jp-border-color0, #767676);
  display: flex; flex-wrap: wrap; gap: 1rem 1.5rem; padding: .25rem; color: var(--ink); background: var(--paper); font: 15px/1.45 system-ui, sans-serif }
@media (prefers-color-scheme: dark) { .sagan { --ink: var(--jp-ui-font-color0, #eee); --paper: var(--jp-layout-color1, #181818); --line: var(--jp-border-color0, #8a8a8a) } }
.sagan[hidden], .sagan [hidden] { display: none !important }
.sagan > div { flex: 1 1 17rem; min-width: 0 }
.sagan > div:first-child { flex: 2 1 20rem; max-width: min(36rem, 85vh) }
.sagan > div:last-child { max-width: 36rem }
.sagan canvas { display: block; width: 100%; border-radius: 3px; image-rendering: pixelated }
.sagan canvas[tabindex] { touch-action: pinch-zoom; cursor: crosshair }
.sagan :focus-visible { outline: 3px solid #0072b2; outline-offset: 2px }
.sagan p { margin: .5rem 0; min-height: 2.9em; font-variant-numeric: tabular-nums }
.sagan p[role=alert] { flex-basis: 100%; min-height: 0; border: 2px solid #d55e00; border-radius: 3px; padding: .5rem .75rem; margin: 0 }
.sagan label { display: flex; align-items: center; gap: .6rem; margin-bottom: .6rem }
.sagan label span { flex: 0 0 4.2rem }
.sagan select, .sagan button { font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--line); border-radius: 3px; padding: .3rem .6rem; min-height: 2.2rem }
.sagan select { flex: 1; min-width: 0 }
.sagan input[type=range] { flex: 1; min-width: 0; accent-color: #0072b2 }
.sagan input[type=checkbox] { accent-color: #0072b2; width: 1.1rem; height: 1.1rem; margin: 0 }
.sagan button { margin: 0 .5rem .5rem 0; cursor: pointer } .sagan button:disabled { opacity: .5; cursor: default }
.sagan .pins { display: flex; flex-wrap: wrap; gap: .6rem; margin: .75rem 0 }
.sagan figure { margin: 0; width: calc((100% - 1.2rem) / 3); max-width: 10rem } .sagan figure canvas { border: 3px solid; box-sizing: border-box }
.sagan figcaption { font-size: 13px; line-height: 1.3; margin-top: .2rem }`

const make = (tag, props = {}, ...children) => { const e = Object.assign(document.createElement(tag), props); e.append(...children); return e }

const cell = ([row, col], grid, size) => Math.floor(row * grid[0] / size[0]) * grid[1] + Math.floor(col * grid[1] / size[1])

// For each of N pixels the two of n cells that it lies between, and how far it is towards the second
function between(n, N, smooth) {
  return Array.from({ length: N }, (_, p) => {
    if (!smooth) return [Math.floor(p * n / N), 0, 0]
    const s = Math.max(0, (p + .5) * n / N - .5), a = Math.floor(s)
    return [a, Math.min(a + 1, n - 1), s - a]
  })
}

// One value in [0, 255] for each pixel of the image, from one for each key
function upsample(weights, [h, w], [H, W], smooth) {
  const out = new Float32Array(H * W), rows = between(h, H, smooth), cols = between(w, W, smooth)
  for (let r = 0, i = 0; r < H; r++) {
    const [a, b, t] = rows[r]
    for (let c = 0; c < W; c++, i++) {
      const [d, e, u] = cols[c]
      out[i] = (1 - t) * ((1 - u) * weights[a * w + d] + u * weights[a * w + e]) + t * ((1 - u) * weights[b * w + d] + u * weights[b * w + e])
    }
  }
  return out
}

function download(name, blob) {
  const a = make('a', { href: URL.createObjectURL(blob), download: name })
  a.click()
  setTimeout(() => URL.revokeObjectURL(a.href), 60000)
}

function base64(bytes) {
  let text = ''
  for (let i = 0; i < bytes.length; i += 32768) text += String.fromCharCode(...bytes.subarray(i, i + 32768))
  return btoa(text)
}

// The stand-alone page of a model: what the widget sends is put into the page's gaps, as `AttentionExplorer.static` does in Python
function page(model, bytes) {
  const state = { message: '' }
  for (const k of ['header', 'point', 'pins', 'path', 'layer', 'image', 'overlay', 'smooth', 'page']) state[k] = model.get(k)
  const parts = { state: JSON.stringify(state).replaceAll('<', '\\u003c'), data: base64(bytes), js: model.get('_esm') }
  return model.get('page').replace(/@@(\w+)@@/g, (_, k) => parts[k])
}

function render({ model, el }) {
  let bytes, header, pressed = null, hovering = false, drawn = false, asked = false, current = null
  const set = values => { for (const k in values) model.set(k, values[k]); model.save_changes() }

  // What stands where
  const canvas = make('canvas', { tabIndex: 0 }), status = make('p'), alert = make('p'), pins = make('div', { className: 'pins' })
  const select = () => make('select'), row = (text, input) => make('label', {}, make('span', { textContent: text }), input)
  const klass = select(), seed = select(), layer = select(), overlay = make('input', { type: 'range', min: 0, max: 1, step: .05 }), smooth = make('input', { type: 'checkbox' })
  const rows = [row('Class', klass), row('Seed', seed), row('Layer', layer), row('Overlay', overlay), row('Smooth', smooth)]
  const button = (text, onclick) => make('button', { type: 'button', textContent: text, onclick })
  const buttons = [button('Clear points', () => clear()), button('Save PNG', () => canvas.toBlob(b => download(name('png'), b))),
    button('Save HTML', () => download(name('html'), new Blob([page(model, bytes)], { type: 'text/html' })))]
  const help = make('p', { textContent: 'Move over the image, or use the arrow keys: the map of that point. Click, Enter or Space: keep the point. Drag: show the path. Leaving the image returns to the last kept point. Escape: clear the points. A map from 1.5x uniform on, that is 1.5 times the weight of an even spread, has an arrow to its strongest place.' })
  const stage = make('div', {}, canvas, status), panel = make('div', {}, ...rows, ...buttons, pins, help)
  const root = make('div', { className: 'sagan' }, stage, panel)
  canvas.setAttribute('role', 'application'); status.setAttribute('aria-live', 'polite'); alert.setAttribute('role', 'alert'); root.dataset.lmSuppressShortcuts = 'true'
  el.append(make('style', { textContent: CSS }), root, make('div', { className: 'sagan' }, alert))   // below, so that the image stays where it is
  const ctx = canvas.getContext('2d'), small = document.createElement('canvas')

  // The map of a point in the layer and image that are chosen
  const chosen = () => header.layers.find(l => l.name === model.get('layer')) ?? header.layers[0]
  function look(point) {
    const l = chosen(), [nq, nk] = [l.queries, l.keys].map(([a, b]) => a * b), q = model.get('image') * nq + cell(point, l.queries, header.size)
    const weights = bytes.subarray(l.maps + q * nk, l.maps + (q + 1) * nk), best = weights.indexOf(255), [h, w] = l.keys
    const max = new DataView(bytes.buffer, bytes.byteOffset).getFloat32(l.maxima + 4 * q, true)
    return { point, weights, max, to: [(Math.floor(best / w) + .5) * header.size[0] / h, (best % w + .5) * header.size[1] / w],   // in pixels from the corner
      get values() { return upsample(weights, l.keys, header.size, model.get('smooth')) } }   // made when asked for: an arrow needs none
  }

  // The image with a map over it, one canvas pixel for each of its own. The more of the map, the greyer and darker the image, as in the figures:
  // its colours would be taken for the map's
  function picture(target, seen, alpha) {
    const [H, W] = header.size, rgb = bytes.subarray(3 * H * W * model.get('image')), magma = bytes.subarray(header.magma)
    target.width = W; target.height = H
    const c = target.getContext('2d'), out = c.createImageData(W, H), values = seen?.values, a = seen ? alpha : 0
    for (let i = 0; i < H * W; i++) {
      const m = seen ? 3 * Math.round(values[i]) : 0
      const grey = (rgb[3 * i] + rgb[3 * i + 1] + rgb[3 * i + 2]) / 6
      for (let k = 0; k < 3; k++) out.data[4 * i + k] = (1 - a) * ((1 - a) * rgb[3 * i + k] + a * grey) + a * magma[m + k]
      out.data[4 * i + 3] = 255
    }
    c.putImageData(out, 0, 0)
  }

  const peaked = max => Math.round(10 * max) >= 15   // as the number beside it is rounded
  const colour = i => header.colours[i % header.colours.length]
  function mark(seen, colour) {
    const scale = canvas.width / header.size[1], unit = canvas.width / canvas.clientWidth   // canvas pixels in one of the image, and of the screen
    const [y, x] = seen.point.map(v => (v + .5) * scale), [ty, tx] = seen.to.map(v => v * scale), far = Math.hypot(tx - x, ty - y)
    if (peaked(seen.max) && far > 1) {
      const [dx, dy] = [(tx - x) / far, (ty - y) / far], head = Math.min(12 * unit, far)
      for (const [width, style] of [[5, '#fff'], [2.5, colour]]) {
        ctx.beginPath(); ctx.moveTo(x, y); ctx.lineTo(tx, ty)
        for (const s of [1, -1]) { ctx.moveTo(tx, ty); ctx.lineTo(tx - head * (dx * .9 + s * dy * .45), ty - head * (dy * .9 - s * dx * .45)) }
        ctx.lineCap = 'round'; ctx.lineWidth = width * unit; ctx.strokeStyle = style; ctx.stroke()
      }
    }
    ctx.beginPath(); ctx.arc(x, y, 6 * unit, 0, 7); ctx.fillStyle = colour; ctx.fill(); ctx.lineWidth = 2 * unit; ctx.strokeStyle = '#fff'; ctx.stroke()
  }

  function draw() {
    if (!header?.size) return
    const point = model.get('point'), kept = model.get('pins'), path = model.get('path'), i = kept.findIndex(p => String(p) === String(point)), own = colour(i < 0 ? kept.length : i)
    current = point && look(point)
    picture(small, current, model.get('overlay'))
    ctx.imageSmoothingEnabled = false
    ctx.drawImage(small, 0, 0, canvas.width, canvas.height)
    if (path.length > 1) {
      const scale = canvas.width / header.size[1]
      ctx.beginPath(); for (const [r, c] of path) ctx.lineTo((c + .5) * scale, (r + .5) * scale)
      ctx.lineJoin = 'round'; ctx.lineWidth = 3 * canvas.width / canvas.clientWidth; ctx.strokeStyle = own; ctx.stroke()
    }
    kept.forEach((p, i) => mark(look(p), colour(i)))
    if (current) mark(current, own)
    status.textContent = current ? say(current) : 'No point yet.'
    buttons[0].disabled = !kept.length && path.length < 2
  }
  // At once, but no more than once in a frame: what is asked for after that is drawn when the next one begins
  function paint() {
    if (drawn) { asked = true; return }
    drawn = true; draw()
    requestAnimationFrame(() => { drawn = false; if (asked) { asked = false; paint() } })
  }
  const place = ([row, col]) => `row ${Math.floor(row)}, column ${Math.floor(col)}`
  const say = ({ point, to, max }) => `From ${place(point)}: max ${max.toFixed(1)}x uniform` + (peaked(max) ? ` at ${place(to)}` : ', nearly everywhere alike')

  // The image alone, and the kept points' maps, as in the paper's figure 1
  function drawPins() {
    if (!header?.size) return
    const panel = (seen, border, label, caption) => {
      const c = make('canvas')
      c.style.borderColor = border; c.setAttribute('role', 'img'); c.setAttribute('aria-label', label)
      picture(c, seen, model.get('overlay'))
      return make('figure', {}, c, make('figcaption', { textContent: caption }))
    }
    const kept = model.get('pins').map(look), im = header.images[model.get('image')], which = [im.class, `${header.numbered} ${im.seed}`, chosen().name].filter(Boolean).join(', ')
    pins.replaceChildren(panel(null, 'transparent', `The image without a map: ${which}`, which),
      ...kept.map((seen, i) => panel(seen, colour(i), `Point ${i + 1}. ${say(seen)}`, `max ${seen.max.toFixed(1)}x uniform`)))
    paint()
  }

  // Choices: the selects follow the model, and the model the selects
  const name = kind => ['attention', klass.value, header.numbered, seed.value, layer.value].filter(Boolean).join('-').replace(/[^\w.-]+/g, '-') + '.' + kind
  function fill(select, options, value) {
    select.replaceChildren(...options.map(text => make('option', { value: text, textContent: text })))
    select.value = value
    select.parentNode.hidden = options.length < 2
  }
  function choices() {
    const view = model.get('data')
    header = model.get('header'); bytes = new Uint8Array(view.buffer, view.byteOffset, view.byteLength)
    alert.textContent = model.get('message'); alert.parentNode.hidden = !alert.textContent; root.hidden = !header.size
    if (root.hidden) return
    const image = header.images[model.get('image')]
    fill(klass, [...new Set(header.images.map(i => i.class))], image.class)
    fill(seed, header.images.filter(i => i.class === image.class).map(i => i.seed), image.seed)
    fill(layer, header.layers.map(l => l.name), chosen().name)
    seed.parentNode.firstChild.textContent = header.numbered[0].toUpperCase() + header.numbered.slice(1)
    overlay.value = model.get('overlay'); smooth.checked = model.get('smooth')
    canvas.setAttribute('aria-label', `${image.class ? `Class ${image.class}, ` : ''}${header.numbered} ${image.seed}, ${header.size[1]} by ${header.size[0]} pixels, ` +
      `with attention of layer ${chosen().name}. Arrow keys move the point, Enter keeps it, Escape clears.`)
    resize(); drawPins()
  }
  function toImage(wanted) {
    const same = header.images.map((im, i) => [im, i]).filter(([im]) => im.class === wanted.class)
    set({ path: [], image: (same.find(([im]) => im.seed === wanted.seed) ?? same[0])[1] })
  }
  klass.onchange = seed.onchange = () => toImage({ class: klass.value, seed: seed.value })
  layer.onchange = () => set({ layer: layer.value })
  overlay.oninput = () => set({ overlay: +overlay.value })
  smooth.onchange = () => set({ smooth: smooth.checked })

  // Pointer and keys
  const pin = () => { const p = model.get('point'), kept = model.get('pins'); if (p && !kept.some(k => String(k) === String(p))) set({ pins: [...kept, p] }) }
  const clear = () => { if (document.activeElement === buttons[0]) canvas.focus(); set({ pins: [], path: [] }) }
  const at = e => {
    const box = canvas.getBoundingClientRect(), inside = (v, n) => Math.min(n - 1, Math.max(0, Math.floor(v * n)))
    return [inside((e.clientY - box.top) / box.height, header.size[0]), inside((e.clientX - box.left) / box.width, header.size[1])]
  }
  canvas.onpointerdown = e => { if (e.button || !e.isPrimary) return; pressed = { x: e.clientX, y: e.clientY, far: 0 }; canvas.setPointerCapture(e.pointerId); set({ point: at(e), path: [at(e)] }) }
  function moved(e) {
    const p = at(e)
    if (!e.isPrimary) return
    if (pressed) pressed.far = Math.max(pressed.far, Math.hypot(e.clientX - pressed.x, e.clientY - pressed.y))
    if (String(p) === String(model.get('point'))) return
    hovering = !pressed; set(pressed ? { point: p, path: [...model.get('path'), p] } : { point: p })
  }
  canvas.onpointermove = moved
  canvas.onpointerrawupdate = e => { if (!drawn) moved(e) }   // comes before the frame in which the browser hands movements over
  canvas.onpointerleave = () => { const kept = model.get('pins'); if (hovering && kept.length) set({ point: kept.at(-1) }); hovering = false }   // on the way to a button
  canvas.onpointerup = e => {
    if (!e.isPrimary) return
    if (pressed?.far < 6) { set({ path: [] }); pin() }
    pressed = null
  }
  canvas.onpointercancel = e => { if (e.isPrimary) pressed = null }
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }
  canvas.onkeydown = e => {
    if (e.ctrlKey || e.altKey || e.metaKey) return
    hovering = false
    if (steps[e.key]) {
      const grid = chosen().queries, from = model.get('point')
      const to = i => {   // the centre of the next cell; the middle of the image at first
        const n = grid[i], S = header.size[i], c = from ? Math.floor(from[i] * n / S) + steps[e.key][i] : Math.floor(n / 2)
        return Math.floor((Math.min(n - 1, Math.max(0, c)) + .5) * S / n)
      }
      set({ point: [to(0), to(1)], path: [] })
    } else if (e.key === 'Enter' || e.key === ' ') pin()
    else if (e.key === 'Escape') clear()
    else return
    e.preventDefault(); e.stopPropagation()
  }

  // As many canvas pixels as the screen has
  function resize() {
    const width = Math.round(canvas.clientWidth * devicePixelRatio), height = Math.round(width * header.size[0] / header.size[1])
    if (width && (canvas.width !== width || canvas.height !== height)) { canvas.width = width; canvas.height = height; canvas.style.aspectRatio = `${width} / ${height}`; draw() }
  }
  const observer = new ResizeObserver(() => { if (header?.size) resize() })
  observer.observe(canvas)

  root.attention = () => current   // for tests, and for who looks into it
  for (const k of ['point', 'path']) model.on(`change:${k}`, paint)
  model.on('change:pins', drawPins)
  for (const k of ['header', 'data', 'message', 'layer', 'image']) model.on(`change:${k}`, choices)
  for (const k of ['overlay', 'smooth']) model.on(`change:${k}`, () => { overlay.value = model.get('overlay'); smooth.checked = model.get('smooth'); drawPins() })
  choices()
  return () => observer.disconnect()
}

export default { render }

// On a stand-alone page the state stands in the page, and a few lines do for a model
const state = document.getElementById('sagan-state')
if (state) {
  const values = JSON.parse(state.textContent), heard = {}
  values.data = Uint8Array.from(atob(document.getElementById('sagan-data').textContent), c => c.charCodeAt(0))
  values._esm = document.getElementById('sagan-js').textContent
  const model = { get: k => values[k], save_changes() {}, on: (event, f) => (heard[event] ??= []).push(f),
    set(k, v) { values[k] = v; for (const f of heard[`change:${k}`] ?? []) f() } }
  render({ model, el: document.getElementById('sagan-view') })
}
