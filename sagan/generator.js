// The networks without a kernel: what Python's `pack_networks` exports is computed here, in plain JavaScript.
//
// A feature map is a Float32Array, channel by channel, row by row. `drawer` stands in for the kernel behind a
// stand-alone page: it listens to the traits that ask for an image, and sets those that show it.

// The numbers of `torch.randn(n, generator=torch.Generator().manual_seed(seed))` on a CPU, for n of at least 16: a
// Mersenne Twister makes uniform ones, Box and Muller's formula pairs of normal ones
function randn(seed, n) {
  const state = new Uint32Array(624), out = new Float32Array(n)
  state[0] = seed
  for (let i = 1; i < 624; i++) state[i] = Math.imul(1812433253, state[i - 1] ^ state[i - 1] >>> 30) + i
  let at = 624
  function uniform() {   // in [0, 1), of 24 bits
    if (at === 624) {
      for (let i = 0; i < 624; i++) {
        const y = state[i] & 0x80000000 | state[(i + 1) % 624] & 0x7fffffff
        state[i] = state[(i + 397) % 624] ^ y >>> 1 ^ (y & 1 ? 0x9908b0df : 0)
      }
      at = 0
    }
    let y = state[at++]
    y ^= y >>> 11; y ^= y << 7 & 0x9d2c5680; y ^= y << 15 & 0xefc60000; y ^= y >>> 18
    return (y & 0xffffff) / 0x1000000
  }
  const fill = from => { for (let i = from; i < Math.min(n, from + 16); i++) out[i] = uniform() }
  function normal(from) {   // of 16 uniform ones
    for (let i = from; i < from + 8; i++) {
      const radius = Math.sqrt(-2 * Math.log(1 - out[i])), angle = 2 * Math.PI * out[i + 8]
      out[i] = radius * Math.cos(angle); out[i + 8] = radius * Math.sin(angle)
    }
  }
  for (let i = 0; i < n; i += 16) fill(i)
  for (let i = 0; i + 16 <= n; i += 16) normal(i)
  if (n % 16) { fill(n - 16); normal(n - 16) }   // the last 16 are drawn once more
  return out
}

const relu = x => x.map(v => v > 0 ? v : 0)
const plus = (x, y) => x.map((v, i) => v + y[i])

// Add to four lines of sums what one line of the input gives to four outputs, whose weights begin at a, b, c and d.
// Functions apart, because browsers compile what is called often
function addThree(s0, s1, s2, s3, weight, a, b, c, d, line) {
  const a0 = weight[a], a1 = weight[a + 1], a2 = weight[a + 2], b0 = weight[b], b1 = weight[b + 1], b2 = weight[b + 2]
  const c0 = weight[c], c1 = weight[c + 1], c2 = weight[c + 2], d0 = weight[d], d1 = weight[d + 1], d2 = weight[d + 2]
  let u = line[0], v = line[1]
  for (let i = 0; i < s0.length; i++) {
    const t = line[i + 2]
    s0[i] += a0 * u + a1 * v + a2 * t; s1[i] += b0 * u + b1 * v + b2 * t
    s2[i] += c0 * u + c1 * v + c2 * t; s3[i] += d0 * u + d1 * v + d2 * t
    u = v; v = t
  }
}
function addOne(s0, s1, s2, s3, weight, a, b, c, d, line) {
  const wa = weight[a], wb = weight[b], wc = weight[c], wd = weight[d]
  for (let i = 0; i < s0.length; i++) { const v = line[i]; s0[i] += wa * v; s1[i] += wb * v; s2[i] += wc * v; s3[i] += wd * v }
}

// A convolution of size 1 or 3 that keeps the size of a map (C, H, W)
function conv({ weight, bias, shape: [outputs, C, size] }, x, H, W) {
  const reach = size >> 1, h = H + 2 * reach, w = W + 2 * reach, padded = new Float32Array(C * h * w), out = new Float32Array(outputs * H * W)
  for (let c = 0; c < C; c++) for (let r = 0; r < H; r++) padded.set(x.subarray((c * H + r) * W, (c * H + r + 1) * W), (c * h + r + reach) * w + reach)
  const lines = Array.from({ length: C * h }, (_, i) => padded.subarray(i * w, (i + 1) * w))
  const add = size === 3 ? addThree : addOne, sums = [0, 1, 2, 3].map(() => new Float64Array(W)), [s0, s1, s2, s3] = sums
  for (let o = 0; o < outputs; o += 4) {
    const four = [o, o + 1, o + 2, o + 3].map(n => Math.min(n, outputs - 1)), [i, j, k, l] = four.map(n => n * C * size * size)
    for (let r = 0; r < H; r++) {
      sums.forEach((s, n) => s.fill(bias ? bias[four[n]] : 0))
      for (let c = 0, at = 0; c < C; c++) for (let dy = 0; dy < size; dy++, at += size)
        add(s0, s1, s2, s3, weight, i + at, j + at, k + at, l + at, lines[c * h + r + dy])
      four.forEach((n, m) => out.set(sums[m], (n * H + r) * W))
    }
  }
  return out
}

// The layers of a network by name, with their numbers
function openNetwork(network, bytes) {
  const numbers = name => {
    const [start, ...shape] = network.numbers[name] ?? []
    return start === undefined ? null : Object.assign(new Float32Array(bytes.buffer, start, shape.reduce((a, b) => a * b, 1)), { shape })
  }
  return name => {
    const [weight, bias, scale, shift, gamma] = ['weight', 'bias', 'scale', 'shift', 'gamma'].map(part => numbers(`${name}.${part}`))
    return { weight, bias, scale, shift, gamma, shape: weight?.shape }
  }
}

// Batch norm with its averages, and a factor and a summand for each channel of a class
function normalize({ scale, shift }, x, y) {
  const C = scale.shape[1], n = x.length / C, out = new Float32Array(x.length)
  for (let c = 0, i = 0; c < C; c++) for (const end = i + n; i < end; i++) out[i] = x[i] * scale[y * C + c] + shift[y * C + c]
  return out
}
// Each value four times
function double(x, S) {
  const out = new Float32Array(4 * x.length), W = 2 * S
  for (let i = 0; i < out.length; i++) out[i] = x[(Math.floor(i / W / 2) * S) + (i % W >> 1)]
  return out
}
// Of each 2x2 values the mean, or the largest
function pool(x, S, join = (a, b, c, d) => (a + b + c + d) / 4) {
  const out = new Float32Array(x.length / 4), h = S / 2
  for (let i = 0; i < out.length; i++) {
    const at = Math.floor(i / h) * 2 * S + 2 * (i % h)
    out[i] = join(x[at], x[at + 1], x[at + S], x[at + S + 1])
  }
  return out
}
// (C, n) to (n, C): a vector for each position
function vectors(x, n) {
  const C = x.length / n, out = new Float32Array(x.length)
  for (let i = 0; i < n; i++) for (let c = 0; c < C; c++) out[i * C + c] = x[c * n + i]
  return out
}

// Equations 1 to 3 of the paper on features (C, S, S). Keys that are `hidden` are seen by no query, queries that are
// `cut` get nothing
function attend(layer, x, S, pooled, { factor = 1, hidden, cut } = {}) {
  const small = pooled ? S / 2 : S, nq = S * S, nk = small * small, project = name => conv(layer(name), x, S, S)
  const reduced = name => pooled ? pool(project(name), S, Math.max) : project(name)
  const q = vectors(project('query'), nq), k = vectors(reduced('key'), nk), v = vectors(reduced('value'), nk)
  const D = q.length / nq, Dv = v.length / nk, mixed = new Float32Array(Dv * nq), weights = new Float64Array(nk), sum = new Float64Array(Dv)
  for (let j = 0; j < nq; j++) if (!cut?.[j]) {
    let most = -Infinity, all = 0
    for (let i = 0; i < nk; i++) {
      let z = 0
      for (let d = 0; d < D; d++) z += q[j * D + d] * k[i * D + d]
      weights[i] = hidden?.[i] ? -Infinity : z
      if (weights[i] > most) most = weights[i]
    }
    sum.fill(0)
    for (let i = 0; i < nk; i++) {
      const w = Math.exp(weights[i] - most)
      all += w
      for (let c = 0; c < Dv; c++) sum[c] += w * v[i * Dv + c]
    }
    for (let c = 0; c < Dv; c++) mixed[c * nq + j] = sum[c] / all
  }
  const out = layer('out'), o = out.weight ? conv(out, mixed, S, S) : mixed, gamma = factor * layer('').gamma[0]
  return { x: x.map((u, i) => u + gamma * o[i]), map: { q, k, depth: D, queries: [S, S], keys: [small, small] } }
}

// The image (3, S, S) of a latent and a class, and its maps; `changes` says what is different in a layer of that name
function generate(network, layers, z, y, changes = {}) {
  const { maps, blocks, pooled } = network.G, layer = name => layers(`G.${name}`), { weight, bias } = layer('linear'), found = []
  let S = 4, x = bias.map((b, i) => { for (let d = 0; d < z.length; d++) b += weight[i * z.length + d] * z[d]; return b })
  for (let n = 0; n < blocks; n++, S *= 2) {
    const part = name => layer(`blocks.${n}.${name}`)
    const h = conv(part('conv1'), double(relu(normalize(part('bn1'), x, y)), S), 2 * S, 2 * S)
    x = plus(conv(part('conv2'), relu(normalize(part('bn2'), h, y)), 2 * S, 2 * S), double(conv(part('skip'), x, S, S), S))
    if (maps[n]) {
      const { place, name } = maps[n], seen = attend(part => layer(`attention.${place}${part && '.'}${part}`), x, 2 * S, pooled, changes[name])
      found.push({ name, ...seen.map }); x = seen.x
    }
  }
  return { image: conv(layer('conv'), relu(normalize(layer('bn'), x, 0)), S, S).map(Math.tanh), maps: found }
}

// Where the discriminator looks in an image: its blocks as far as the last one with attention
function look(network, layers, x) {
  const { maps, blocks, pooled, down, relu_skip } = network.D, layer = name => layers(`D.${name}`), found = []
  for (let n = 0, S = network.size; n < blocks; n++) {
    const part = name => layer(`blocks.${n}.${name}`), skip = part('skip'), a = n ? relu(x) : x
    let h = conv(part('conv2'), relu(conv(part('conv1'), a, S, S)), S, S)
    if (relu_skip) x = a
    if (n < down) { h = pool(h, S); x = pool(x, S); S /= 2 }
    x = plus(h, skip.weight ? conv(skip, x, S, S) : x)
    if (maps[n]) {
      const { place, name } = maps[n], seen = attend(part => layer(`attention.${place}${part && '.'}${part}`), x, S, pooled)
      found.push({ name, ...seen.map }); x = seen.x
    }
  }
  return found
}

// ---- What a kernel does elsewhere

// A latent of a seed, or one on the arc towards another
function latent(network, seed, towards, far) {
  const a = randn(seed, network.z_dim), b = randn(towards, network.z_dim)
  if (seed === towards || !far) return a
  return a.map((v, i) => Math.cos(far * Math.PI / 2) * v + Math.sin(far * Math.PI / 2) * b[i])
}

const toByte = v => Math.min(255, Math.max(0, Math.round((v + 1) * 127.5)))
const interleave = (x, n) => Uint8Array.from({ length: 3 * n }, (_, i) => toByte(x[i % 3 * n + Math.floor(i / 3)]))
function toIntegers(values) {
  const factor = Math.max(1e-12, values.reduce((m, v) => Math.max(m, Math.abs(v)), 0)) / 32767
  return [Int16Array.from(values, v => Math.round(v / factor)), factor]
}

// Of 16x16 points the one that looks farthest and most sharply, to begin with
function propose({ q, k, depth, queries: [S], keys: [s] }, size) {
  const step = Math.max(1, S / 16)
  let start = null, most = -1
  for (let r = 0; r < S; r += step) for (let c = 0; c < S; c += step) {
    const j = r * S + c, z = Array.from({ length: s * s }, (_, i) => { let v = 0; for (let d = 0; d < depth; d++) v += q[j * depth + d] * k[i * depth + d]; return v })
    const best = z.reduce((b, v, i) => v > z[b] ? i : b, 0), sum = z.reduce((t, v) => t + Math.exp(v - z[best]), 0)
    const center = (i, n) => [Math.floor(i / n), i % n].map(v => (v + .5) * size / n), [[y, x], [ty, tx]] = [center(j, S), center(best, s)]
    const reach = (s * s / sum - 1) * Math.hypot(ty - y, tx - x)
    if (reach > most) { most = reach; start = [Math.floor(y), Math.floor(x)] }
  }
  return start
}

// Header and bytes of one image and its maps, as Python's `view` makes them
function pack(former, magma, image, maps, names) {
  const parts = [], add = array => { parts.push(new Uint8Array(array.buffer, array.byteOffset, array.byteLength)); return (end += array.byteLength) - array.byteLength }
  let end = 0
  add(interleave(image, image.length / 3))
  const header = { ...former, images: [names], numbered: 'seed', magma: add(magma), layers: maps.map(({ name, q, k, depth, queries, keys }) => {
    const n = k.length / depth, mean = new Float64Array(depth)
    k.forEach((v, i) => { mean[i % depth] += v / n })   // adds the same to all logits of a query
    const [[qs, fq], [ks, fk]] = [q, k.map((v, i) => v - mean[i % depth])].map(toIntegers)
    return { name, queries, keys, depth, q: add(qs), k: add(ks), factors: [fq * fk] }
  }) }
  const bytes = new Uint8Array(end)
  parts.reduce((at, part) => { bytes.set(part, at); return at + part.length }, 0)
  return [{ ...header, bytes: end }, new DataView(bytes.buffer)]
}

// What a change did to an image, as Python's `pack_change` says and shows it
function packChange(caption, before, after) {
  const n = before.length / 3, apart = Float64Array.from({ length: n }, (_, i) => [i, n + i, 2 * n + i].reduce((sum, j) => sum + Math.abs(after[j] - before[j]), 0) / 6)
  const top = apart.reduce((a, b) => Math.max(a, b), 0), mean = apart.reduce((a, b) => a + b) / n, percent = v => `${+(100 * v).toPrecision(2)}%`
  const words = `${caption}. On average, a pixel changes by ${percent(mean)} of the way from black to white; the one that changes most, by ${percent(top)}.`
  const bytes = Uint8Array.from(apart, v => Math.round(255 * v / Math.max(top, 1e-12)))
  return [{ words: words[0].toUpperCase() + words.slice(1), mean: percent(mean), top: percent(top), most: top }, new DataView(bytes.buffer)]
}

// Which cells of a grid have their center in one of the boxes, which follow each other: top, left, bottom, right
const covered = (boxes, [h, w], [H, W]) => Array.from({ length: h * w }, (_, i) => {
  const r = (Math.floor(i / w) + .5) * H / h, c = (i % w + .5) * W / w
  for (let b = 0; b < boxes.length; b += 4)
    if (boxes[b] <= r && r < boxes[b + 2] && boxes[b + 1] <= c && c < boxes[b + 3]) return true
  return false
})

// Draws what the traits of a stand-alone page ask for. `follow` takes the names of those that have changed
function drawer(model, network, bytes) {
  const layers = openNetwork(network, bytes), get = k => model.get(k), size = [network.size, network.size]
  const magma = header => new Uint8Array(get('data').buffer, get('data').byteOffset + header.magma, 768)
  let drawn = null   // the latent, the class, the image and the generator's maps of what is in view
  function generated() {
    const z = latent(network, get('seed'), get('towards'), get('far')), y = network.classes.length ? get('label') : 0
    if (network.classes.length && !network.classes[y]) throw Error(`there is no class ${y} here; they go from 0 to ${network.classes.length - 1}`)
    return drawn = { z, y, ...generate(network, layers, z, y) }
  }
  // A view of an image, with the maps of both networks
  function shown({ image, maps }, names) {
    const header = get('header'), all = network.D ? [...maps, ...look(network, layers, image)] : maps
    return [...pack(header, magma(header), image, all, names), all]
  }
  function draw(walking) {
    const image = generated(), far = get('far'), former = get('header').start
    const seed = `${get('seed')}${far ? ` towards ${get('towards')} at ${far}` : ''}`
    const [newer, data, all] = shown(image, { class: network.classes[get('label')] ?? '', seed })
    if (!walking) newer.start = propose(image.maps.at(-1) ?? all.at(-1), network.size)
    const proposed = String(get('pins')) === String(former) && String(get('point')) === String(former)
    return { data, header: newer, image: 0, ...proposed ? { point: newer.start, pins: [newer.start] } : {} }
  }
  const none = new DataView(new ArrayBuffer(0)), nothing = { effect: {}, changed: none, after: none }
  function change(names) {
    const regions = ['hide', 'cut'].filter(get), gamma = get('gamma')
    if (gamma === 1 && !regions.length) return nothing
    if (!names && get('header').numbered !== 'seed') throw Error('the generator has not drawn this image; the next seed is one that it has')
    const { z, y, image, maps } = drawn ?? generated(), changes = {}
    const layer = maps.find(m => m.name === get('layer')) ?? maps.at(-1)   // one of the discriminator draws nothing
    for (const { name } of maps) changes[name] = { factor: gamma }
    if (get('hide')) {
      const hidden = changes[layer.name].hidden = covered(get('hide'), layer.keys, size)
      if (hidden.every(Boolean)) throw Error('Nothing is left to look at: the hidden region covers the whole image.')
    }
    if (get('cut')) changes[layer.name].cut = covered(get('cut'), layer.queries, size)
    const place = `in ${layer.name.replace('G', 'Generator')}`, said = [gamma !== 1 && `attention is multiplied by ${gamma}`,
      get('hide') && `${place} no point looks at the hidden region`,
      get('cut') && `${place} the cut region gets nothing from attention`].filter(Boolean)
    const altered = generate(network, layers, z, y, changes), [effect, changed] = packChange(said.join(', and '), image, altered.image)
    const [view, after] = shown(altered, names ?? get('header').images[0])
    return { effect: { ...effect, layer: layer.name, view }, changed, after }
  }
  return names => {
    const anew = names.some(k => ['label', 'seed', 'towards', 'far'].includes(k))
    if (!anew && !names.some(k => ['gamma', 'hide', 'cut', 'layer'].includes(k))) return
    let message = '', view = {}, done = nothing
    try {
      if (anew) view = draw(!names.includes('seed') && !names.includes('label'))
      done = change(view.header?.images[0])
    } catch (e) { message = e.message }
    model.put({ ...view, ...done })
    if (message !== get('message')) model.put({ message })
  }
}
