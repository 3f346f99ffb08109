// What moves on a report's page: players, the line that they move over the curves, and the explorer's frame

// Each curve knows where its steps lie: its first and last pixel, and their steps
function moveCursors(step) {
  for (const plot of document.querySelectorAll('[data-cursor]')) {
    const { x, y, steps } = JSON.parse(plot.dataset.cursor)
    const at = x[0] + (x[1] - x[0])*(step - steps[0])/(steps[1] - steps[0])
    let line = plot.querySelector('.cursor')
    if (!line) {
      line = plot.appendChild(document.createElementNS(plot.namespaceURI, 'line'))
      line.setAttribute('class', 'cursor')
      line.setAttribute('y1', y[0])
      line.setAttribute('y2', y[1])
    }
    line.setAttribute('visibility', at < x[0] - 1 || at > x[1] + 1 ? 'hidden' : 'visible')
    for (const end of ['x1', 'x2']) line.setAttribute(end, at)
  }
}

function startPlayer(player) {
  const [button, slider, output] = ['button', 'input', 'output'].map(tag => player.querySelector(tag))
  const frames = JSON.parse(player.dataset.frames)  // [step, caption] of each
  const stacks = [...player.querySelectorAll('.stack')].map(stack => [...stack.children])
  const calm = matchMedia('(prefers-reduced-motion: reduce)')
  let timer = null

  function show(i) {
    for (const images of stacks) images.forEach((image, j) => image.classList.toggle('shown', i === j))
    const [step, caption] = frames[i]
    slider.value = i
    slider.setAttribute('aria-valuetext', caption)
    output.textContent = caption
    moveCursors(step)
  }
  function stop() {
    clearInterval(timer)
    timer = null
    button.textContent = 'Play'
  }
  function next() {
    if (+slider.value === frames.length - 1) return stop()
    show(+slider.value + 1)
  }
  function toggle() {
    if (timer) return stop()
    if (+slider.value === frames.length - 1) show(0)
    button.textContent = 'Pause'
    timer = setInterval(next, calm.matches ? 1500 : 500)
  }
  button.addEventListener('click', toggle)
  slider.addEventListener('input', () => {
    stop()
    show(+slider.value)
  })
  slider.addEventListener('keydown', e => {
    if (e.key !== ' ') return
    e.preventDefault()
    toggle()
  })
  player.querySelector('.controls').hidden = false
}

// The explorer is as high as it is, so that a swipe over it scrolls the page
function fitFrame(frame) {
  function watch() {
    const page = frame.contentDocument?.documentElement
    if (!page) return
    const fit = () => { frame.style.height = `${Math.ceil(page.getBoundingClientRect().height)}px` }
    new ResizeObserver(fit).observe(page)
  }
  frame.addEventListener('load', watch)
  watch()
}

// Where a block is wider than the page, a line above it says so
function tellMore(block) {
  const words = document.createElement('p')
  words.className = 'more'
  words.textContent = `${matchMedia('(hover: none)').matches ? 'Swipe' : 'Scroll'} sideways for all ${block.dataset.parts}.`
  block.before(words)
  new ResizeObserver(() => { words.hidden = block.scrollWidth <= block.clientWidth + 1 }).observe(block)
}

document.querySelectorAll('.player').forEach(startPlayer)
document.querySelectorAll('.wide').forEach(tellMore)
document.querySelectorAll('iframe').forEach(fitFrame)
