/** Photos on their way in: how far many of them are, and the list of those that are left out. */
import { $, announce, counted, el, icon, sentence, toast } from './dom.js'

/** @typedef {import('./space.js').Space} Space */

/** Many classes that are added in one go: how far it is, a way to stop it, and the photos left out. */
export class Adding {
  constructor() {
    /** @type {AbortController | null} */
    this.under = null // way
    $('adding-stop').addEventListener('click', () => (this.under ? this.under.abort() : this.clear()))
  }

  clear() {
    this.under?.abort()
    this.under = null
    $('adding').hidden = true
  }

  /** @param {Space} space @param {{name: string, files: File[]}[]} classes */
  async run(space, classes) {
    if (this.under) return toast('Other photos are being added. Wait until they are in, or stop them.')
    const under = (this.under = new AbortController())
    const show = (/** @type {Parameters<Adding['show']>} */ ...how) => this.under === under && this.show(...how)
    const total = classes.reduce((sum, { files }) => sum + files.length, 0)
    const problems = $('adding').querySelector('.problems')
    problems.replaceChildren()
    const refused = refusals(problems)
    let done = 0
    show(`Adding ${counted(total, 'photo')} of ${counted(classes.length, 'class', 'classes')}…`, 0)
    try {
      const { added, notes } = await space.addClasses(classes, (file, of, refusal) => {
        show(`Adding photo ${++done} of ${total}: ${of}`, done / total)
        if (refusal) refused(`${of}/${file.name}`, refusal)
      }, under.signal)
      notes.forEach((note) => problems.append(problem(note)))
      const out = done - added
      show(`${counted(added, 'photo')} added${out ? `, ${out} left out` : ''}${under.signal.aborted ? ', then stopped' : ''}.`)
      if (added) toast(`${counted(added, 'photo')} added.`, UNDO)
    } catch (error) {
      show(/** @type {Error} */ (error).message)
    }
  }

  /** @param {string} text @param {number} [share] how much is done; none: it has ended */
  show(text, share) {
    $('adding').hidden = false
    $('adding-words').textContent = text
    $('adding-bar').hidden = share === undefined
    $('adding-bar').value = share ?? 1
    $('adding-stop').textContent = share === undefined ? 'Close' : 'Stop'
    if (share !== undefined) return
    this.under = null
    announce(text)
  }
}

export const UNDO = { label: 'Undo', run: () => $('undo').click() }
const NAMED = 6 // files of one line

/**
 * Lists refused files: one line for each reason, however many files it is about.
 * @param {Element} problems
 */
export function refusals(problems) {
  /** @type {Map<string, {files: string[], line: any}>} */
  const reasons = new Map()
  return (/** @type {string} */ file, /** @type {Error} */ refusal) => {
    const reason = sentence(refusal.message.replace(/^photo \d+: /i, ''))
    const known = reasons.get(reason) ?? { files: [], line: problem(reason) }
    if (!reasons.has(reason)) problems.append(known.line)
    reasons.set(reason, known)
    known.files.push(file)
    const more = known.files.length - NAMED
    const names = known.files.slice(0, NAMED).join(', ')
    known.line.querySelector('span').replaceChildren(el('b', {}, `${names}${more > 0 ? ` and ${more} more` : ''}: `), reason)
  }
}

/** @param {string} text */
export const problem = (text) =>
  el('li', {}, el('span', {}, text),
    el('button', { class: 'quiet only', type: 'button', 'aria-label': 'Dismiss', onclick: (/** @type {Event} */ event) =>
      /** @type {HTMLElement} */ (event.currentTarget).parentElement?.remove() }, icon('close')))
