/** "What is this?": a photo or the live camera, and the answer in words, bars and nearest photos. */
import { Refusal } from './api.js'
import { Camera } from './camera.js'
import { $, announce, el, keep, percent, sleep } from './dom.js'
import { chooser, droppable, fitted, thumb } from './photos.js'

/** @typedef {import('./space.js').Space} Space @typedef {import('./space.js').Answer} Answer @typedef {import('./space.js').Model} Model */

const EVERY = 500 // ms between frames of the live camera

export class Ask {
  /**
   * @param {(photo: string) => void} look shows a photo whole
   * @param {(model: Model, revision: number) => void} told what answered
   */
  constructor(look, told) {
    this.look = look
    this.told = told
    /** @type {Space} */
    this.space = /** @type {any} */ (null)
    /** @type {File | null} */
    this.photo = null
    /** @type {Answer | null} */
    this.answer = null
    this.live = false
    this.camera = new Camera($('live'), $('ask-flip'))
    this.url = ''
    /** Counts questions: an answer to an older one is not shown. */
    this.asked = 0
    const refuse = (/** @type {string} */ text) => this.problem(text)
    chooser($('ask-file'), ([{ file }]) => this.show(file), refuse)
    droppable($('ask'), ([{ file }]) => this.show(file), refuse)
    $('query').addEventListener('load', () => this.hint())
    $('query').addEventListener('error', () => this.hint())
    $('ask-camera').addEventListener('click', () => (this.live ? this.stop() : this.start()))
    document.addEventListener('visibilitychange', () => (document.hidden ? this.stop() : this.picture()))
  }

  /** @param {Space} space */
  open(space) {
    this.stop()
    this.space = space
    this.asked++
    this.photo = this.answer = null
    $('answer').hidden = true
    $('ask-tab').textContent = 'What is this?'
    this.problem('')
    this.picture()
  }

  hint() {
    $('query').hidden = this.live || !this.photo || !$('query').naturalWidth // no sign of a broken image
    $('stage-hint').hidden = this.live || !$('query').hidden
    $('stage-hint').textContent = !this.space.classes.length
      ? 'Make a class or two first. Then drop a photo here and see what it is.'
      : 'Drop a photo here, paste one, or use the camera.'
  }

  /** A new photo to ask about. @param {File} file */
  async show(file) {
    this.stop()
    this.answer = null
    try {
      this.photo = await fitted(file)
      this.picture()
      await this.again()
    } catch (error) {
      this.photo = null
      this.asked++ // an answer that is on its way is about another photo
      this.picture()
      this.refused(error)
    }
  }

  picture() {
    if (document.hidden) return // the page may be on its way out, and loads nothing then
    URL.revokeObjectURL(this.url)
    this.url = this.photo ? URL.createObjectURL(this.photo) : ''
    if (this.url) $('query').src = this.url
    else $('query').removeAttribute('src')
    this.hint()
  }

  /**
   * Ask about the last photo again.
   * @param {string} [because] what has changed, for the words about how the answer moved
   */
  async again(because = '') {
    this.hint()
    if (!this.photo || this.live) return
    const number = ++this.asked
    if (!this.space.classes.length) {
      this.answer = null
      $('answer').hidden = true
      return this.problem('There is no class yet that this could be. Make one with a photo or two.')
    }
    $('ask').setAttribute('aria-busy', 'true')
    try {
      const { answer, model, revision } = await this.space.classify(this.photo)
      if (number !== this.asked) return
      this.problem('')
      this.draw(answer, because)
      this.told(model, revision)
      announce(said(answer))
    } catch (error) {
      if (number === this.asked) this.refused(error)
    } finally {
      if (number === this.asked) $('ask').removeAttribute('aria-busy')
    }
  }

  /** Answer what the camera sees: a frame every half second, the next one only when the last is answered. */
  async start() {
    this.problem('')
    try {
      if (!(await this.camera.start())) return
    } catch (error) {
      this.camera.stop()
      return this.problem(/** @type {Error} */ (error).message)
    }
    this.live = true
    this.answer = null
    this.pressed()
    this.hint()
    let before = ''
    const number = ++this.asked
    while (this.live && number === this.asked) {
      const started = performance.now()
      let rest = EVERY
      try {
        if (this.space.classes.length) {
          const photo = await this.camera.frame()
          const { answer, model, revision } = await this.space.classify(photo, { patient: false })
          if (!this.live || number !== this.asked) break
          this.photo = photo
          this.problem('')
          this.draw(answer, '')
          this.told(model, revision)
          if (said(answer, false) !== before) announce((before = said(answer, false)))
        } else this.problem('Make a class first; then the camera has something to compare with.')
      } catch (error) {
        if (!this.live) break
        rest = error instanceof Refusal && error.after ? 1000 * error.after : 2000
        this.problem(/** @type {Error} */ (error).message)
      }
      await sleep(Math.max(50, rest - (performance.now() - started)))
    }
  }

  /** Stop the camera, also one that is about to start; its last frame stays as the photo. */
  stop() {
    this.camera.stop()
    if (!this.live) return
    this.live = false
    this.pressed()
    this.picture()
  }

  pressed() {
    $('ask-camera').setAttribute('aria-pressed', this.live)
    $('ask-camera').querySelector('span').textContent = this.live ? 'Stop' : 'Live camera'
  }

  /** No answer, and why. @param {any} error */
  refused({ message }) {
    this.problem(message)
    $('answer').hidden = true
    this.answer = null
  }

  /** @param {string} text */
  problem(text) {
    $('ask-problem').textContent = text
  }

  /** @param {Answer} answer @param {string} because */
  draw(answer, because) {
    const before = this.answer
    this.answer = answer
    const { kind, name, more } = words(answer, this.space.classes.length)
    const part = $('answer')
    part.hidden = false
    part.dataset.decision = answer.decision
    $('verdict-kind').textContent = kind
    $('verdict').textContent = name
    $('verdict-more').textContent = more
    $('ask-tab').textContent = name
    $('bars-title').textContent = answer.decision === 'unknown' ? 'If it had to be one of them' : 'How probable'

    const was = new Map(because ? before?.classes.map(({ id, probability }) => [id, probability]) : [])
    $('bars').classList.toggle('moved', was.size > 0)
    keep($('bars'), answer.classes, ({ id }) => id, bar, (row, one) => fill(row, one, was.get(one.id)))
    const moved = because && before ? `${moves(before, answer)} after ${because}.` : ''
    $('moved').textContent = moved
    $('moved').hidden = !moved

    const near = answer.evidence.filter(({ photo }) => this.space.classes.some(({ photos }) => photos.some(({ id }) => id === photo)))
    keep($('evidence'), near, ({ photo }) => photo, ({ photo }) => this.near(photo), (item, { photo, similarity }) => {
      const of = this.space.classes.find(({ photos }) => photos.some(({ id }) => id === photo))
      item.querySelector('b').textContent = of?.name ?? ''
      item.querySelector('small').textContent = similarity.toFixed(2)
      item.querySelector('button').setAttribute('aria-label', `A photo of ${of?.name}, similarity ${similarity.toFixed(2)}`)
    })
    $('evidence-part').hidden = !near.length
  }

  /** @param {string} photo */
  near(photo) {
    return el('li', {}, el('button', { class: 'tile', type: 'button', onclick: () => this.look(photo) }, thumb(this.space.id, photo)),
      el('b', {}), el('small', {}))
  }
}

/**
 * The decision in words.
 * @param {Answer} answer @param {number} count classes in all
 */
function words(answer, count) {
  const first = answer.classes[0]
  if (answer.decision === 'unknown') {
    const nearest = first ? `Nearest is ${first.name}, but not near enough.` : ''
    return { kind: 'Not one of your classes', name: 'None of these', more: nearest }
  }
  if (answer.decision === 'ambiguous') {
    const rivals = rivalsOf(answer)
    if (rivals.length === 1) return { kind: 'Not sure', name: `Perhaps ${first.name}`, more: 'No class is likely enough. More photos of each help.' }
    const either = rivals.map(({ name }) => name).join(', ').replace(/, ([^,]*)$/, ' or $1')
    return { kind: 'Not sure', name: either, more: 'It could be any of these. More photos of each help to tell them apart.' }
  }
  const alone = count === 1 ? ' It is the only class so far.' : ''
  return { kind: 'This looks like', name: answer.class?.name ?? first.name, more: `${percent(answer.probability)} sure.${alone}` }
}

/** The classes that an answer names. @param {Answer} answer */
function rivalsOf({ decision, classes }) {
  if (decision === 'unknown') return []
  return classes.filter(({ probability }, i) => i === 0 || (decision === 'ambiguous' && i < 3 && 2 * probability > classes[0].probability))
}

/** The answer as one sentence. @param {Answer} answer @param {boolean} [exact] */
function said(answer, exact = true) {
  const { name } = words(answer, 2)
  return exact && answer.decision === 'match' ? `${name}, ${percent(answer.probability)}` : name
}

/** @param {Answer} before @param {Answer} now */
function moves(before, now) {
  const named = (/** @type {Answer} */ answer) => rivalsOf(answer).map(({ id }) => id).sort().join()
  if (before.decision !== now.decision || named(before) !== named(now))
    return `It was “${words(before, 2).name}” before; now “${words(now, 2).name}”,`
  if (now.decision === 'unknown') return 'The answer stayed “None of these”' // how near its classes are says nothing of how sure that is
  if (now.decision === 'ambiguous') return 'It is still not sure'
  const change = Math.round(100 * now.probability) - Math.round(100 * before.probability)
  if (!change) return 'The answer stayed the same'
  return `The answer stayed; it is ${Math.abs(change)} ${Math.abs(change) === 1 ? 'point' : 'points'} ${change > 0 ? 'surer' : 'less sure'}`
}

const bar = () =>
  el('li', {}, el('span', { class: 'of' }), el('span', { class: 'track' }, el('span', { class: 'fill' }), el('span', { class: 'was' })),
    el('span', { class: 'share' }), el('span', { class: 'delta' }))

/** @param {HTMLElement} row @param {{name: string, probability: number}} one @param {number} [was] */
function fill(row, { name, probability }, was) {
  const part = (/** @type {string} */ of) => /** @type {HTMLElement} */ (row.querySelector(of))
  const change = was === undefined ? 0 : Math.round(100 * probability) - Math.round(100 * was)
  part('.of').textContent = part('.of').title = name
  part('.share').textContent = percent(probability)
  part('.fill').style.width = `${100 * probability}%`
  part('.was').style.left = `${100 * (was ?? 0)}%`
  part('.was').hidden = !change
  part('.delta').textContent = change ? `${change > 0 ? '+' : '−'}${Math.abs(change)}` : ''
}
