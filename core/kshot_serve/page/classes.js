/** The classes of a label space: a card for each, with its photos, and the form that makes a new one. */
import { $, announce, ask, confirmed, counted, el, icon, keep, toast } from './dom.js'
import { takePhotos } from './camera.js'
import { chooser, droppable, thumb, whole } from './photos.js'

/** @typedef {import('./space.js').Space} Space @typedef {import('./space.js').Class} Class */

const SHOWN = 24 // photos of a card until more are asked for

export class Classes {
  constructor() {
    /** @type {Space} */
    this.space = /** @type {any} */ (null)
    /** Photos on their way to a class, by its id. @type {Map<string, {file: Blob, url: string}[]>} */
    this.coming = new Map()
    /** @type {Set<string>} */
    this.opened = new Set()
    this.form = new NewClass(this)
  }

  /** @param {Space} space */
  open(space) {
    this.space = space
    this.coming.clear()
    this.form.clear()
    $('cards').replaceChildren()
    this.draw()
  }

  draw() {
    keep($('cards'), this.space.classes, ({ id }) => id, (one) => this.card(one), (card, one) => this.fill(card, one))
  }

  /** @param {Class} made */
  card(made) {
    const { id } = made
    const now = () => this.space.classes.find((one) => one.id === id) ?? made
    const name = el('input', { class: 'title', type: 'text', maxlength: 200, autocomplete: 'off', spellcheck: 'false' })
    name.addEventListener('change', async () => {
      const wanted = name.value.trim()
      if (wanted && wanted !== now().name) await this.space.renameClass(now(), wanted).catch((error) => toast(error.message))
      name.value = now().name
    })
    name.addEventListener('keydown', (/** @type {KeyboardEvent} */ event) => {
      if (event.key === 'Escape') name.value = now().name
      if (event.key === 'Escape' || event.key === 'Enter') name.blur()
    })
    const input = el('input', { type: 'file', multiple: true, class: 'hidden-input', 'aria-label': 'Add photos' })
    const card = el('article', { class: 'card', tabindex: '-1' },
      el('div', { class: 'line spread' },
        name,
        el('span', { class: 'count hint' }),
        el('button', { class: 'quiet only bin', type: 'button', onclick: () => this.remove(now()) }, icon('bin'))),
      el('ul', { class: 'tiles' }),
      el('div', { class: 'line' },
        el('label', { class: 'filebutton small' }, input, icon('plus'), 'Add photos'),
        el('button', { class: 'small', type: 'button', onclick: () =>
          takePhotos(`Photos of ${now().name}`, (photos) => this.add(now(), photos)) }, icon('camera'), 'Camera')),
      el('ul', { class: 'problems', 'aria-live': 'polite' }))
    chooser(input, (files) => this.add(now(), files))
    droppable(card, (files) => this.add(now(), files))
    return card
  }

  /** @param {HTMLElement} card @param {Class} of */
  fill(card, of) {
    card.setAttribute('aria-label', of.name)
    const name = /** @type {HTMLInputElement} */ (card.querySelector('.title'))
    if (document.activeElement !== name) name.value = of.name
    name.setAttribute('aria-label', `Name of the class ${of.name}`)
    card.querySelector('.count').textContent = counted(of.photos.length, 'photo')
    card.querySelector('.bin').setAttribute('aria-label', `Delete the class ${of.name}`)
    card.querySelector('.tiles').setAttribute('aria-label', `Photos of ${of.name}`)
    const shown = this.opened.has(of.id) ? of.photos : of.photos.slice(0, SHOWN)
    const coming = this.coming.get(of.id) ?? []
    const more = of.photos.length - shown.length
    const tiles = [
      ...shown.map((photo, i) => ({ key: photo.id, make: () => this.tile(of, photo.id, i + 1) })),
      ...(more ? [{ key: 'more', make: () => el('li', {}, el('button', { class: 'tile quiet', type: 'button', onclick: () => {
        this.opened.add(of.id)
        this.draw()
      } })) }] : []),
      ...coming.map(({ url }) => ({ key: url, make: () => el('li', { class: 'coming' }, el('img', { src: url, alt: 'On its way' })) })),
    ]
    const list = /** @type {HTMLElement} */ (card.querySelector('.tiles'))
    keep(list, tiles, ({ key }) => key, ({ make }) => make(), (tile, { key }) => {
      if (key === 'more') tile.firstChild.textContent = `+${more}`
    })
    list.hidden = !tiles.length
  }

  /** @param {Class} of @param {string} photo @param {number} number */
  tile(of, photo, number) {
    const button = el('button', { class: 'tile', type: 'button', 'aria-label': `Photo ${number} of ${of.name}` }, thumb(this.space.id, photo))
    button.addEventListener('click', () => this.look(photo))
    button.addEventListener('keydown', (/** @type {KeyboardEvent} */ event) => event.key === 'Delete' && this.look(photo))
    return el('li', {}, button)
  }

  /** One photo, whole; it can be deleted from there. @param {string} photo */
  async look(photo) {
    const of = this.space.classes.find(({ photos }) => photos.some(({ id }) => id === photo))
    if (!of) return toast('That photo is not here any more.')
    $('photo-title').textContent = of.name
    $('photo-view').replaceChildren()
    let url = ''
    whole(this.space.id, photo).then(
      (blob) => $('photo-view').replaceChildren(el('img', { src: (url = URL.createObjectURL(blob)), alt: `A photo of ${of.name}` })),
      (error) => $('photo-view').replaceChildren(el('p', { class: 'problem' }, error.message)),
    )
    const answer = await ask($('photo'))
    URL.revokeObjectURL(url)
    if (answer === 'yes') {
      await this.space.deletePhoto(photo, of).then(() => toast('Photo deleted.'), (error) => toast(error.message))
      this.focus(of.id)
    }
  }

  /** @param {Class} of */
  async remove(of) {
    const text = `Its ${counted(of.photos.length, 'photo')} will be deleted for good: undo does not bring them back.`
    if (!(await confirmed(`Delete ${of.name}?`, text, 'Delete class'))) return
    await this.space.deleteClass(of).then(() => toast(`${of.name} deleted.`), (error) => toast(error.message))
    $('new-class-name').focus()
  }

  /**
   * Photos for a class that is there.
   * @param {Class} to @param {(File | Blob)[]} files
   */
  async add(to, files) {
    const coming = files.map((file) => ({ file, url: URL.createObjectURL(file) }))
    this.coming.set(to.id, [...(this.coming.get(to.id) ?? []), ...coming])
    this.draw()
    const card = this.element(to.id)
    await this.send(to, files, card?.querySelector('.problems') ?? $('cards'))
    this.coming.set(to.id, (this.coming.get(to.id) ?? []).filter((one) => !coming.includes(one)))
    coming.forEach(({ url }) => URL.revokeObjectURL(url))
    this.draw()
  }

  /**
   * Send photos, and show what the server says of each that it refuses.
   * @param {{id?: string, name: string}} to @param {(File | Blob)[]} files @param {Element} problems
   */
  async send(to, files, problems) {
    problems.replaceChildren()
    const space = this.space
    try {
      const { added, notes } = await space.addPhotos(to, files, (file, refusal) => {
        if (refusal) problems.append(problem('name' in file ? file.name : 'A photo', refusal.message.replace(/^photo \d+: /, '')))
      })
      notes.forEach((note) => problems.append(problem('', note)))
      if (added) toast(`${counted(added, 'photo')} of ${to.name} added.`, { label: 'Undo', run: () => $('undo').click() })
      return added
    } catch (error) {
      problems.append(problem('', /** @type {Error} */ (error).message))
      return 0
    }
  }

  /** @param {string} id @returns {HTMLElement | null} */
  element(id) {
    return document.querySelector(`#cards > [data-key="${CSS.escape(id)}"]`)
  }

  /** @param {string} id */
  focus(id) {
    this.element(id)?.focus()
  }

  /** Where pasted photos go, if the focus is in a class or in the form. @param {Element | null} focused */
  pasteTarget(focused) {
    if (focused?.closest('#new-class')) return (/** @type {File[]} */ files) => this.form.take(files)
    const key = /** @type {HTMLElement | null} */ (focused?.closest('#cards > .card'))?.dataset.key
    const of = this.space?.classes.find(({ id }) => id === key)
    return of ? (/** @type {File[]} */ files) => this.add(of, files) : null
  }
}

/** The form for a new class: a name and photos, in either order; with both, the class is made at once. */
class NewClass {
  /** @param {Classes} classes */
  constructor(classes) {
    this.classes = classes
    this.name = $('new-class-name')
    /** Photos that wait for a name. @type {{file: File | Blob, url: string}[]} */
    this.waiting = []
    this.busy = false
    const form = $('new-class')
    form.addEventListener('submit', (/** @type {Event} */ event) => {
      event.preventDefault()
      this.submit()
    })
    chooser($('new-class-files'), (files) => this.take(files))
    droppable(form, (files) => this.take(files))
    $('new-class-camera').addEventListener('click', () => this.camera())
  }

  clear() {
    this.waiting.forEach(({ url }) => URL.revokeObjectURL(url))
    this.waiting = []
    this.name.value = ''
    $('new-class').querySelector('.problems').replaceChildren()
    this.draw()
  }

  draw() {
    const tiles = $('new-class-photos')
    keep(tiles, this.waiting, ({ url }) => url, (one) => el('li', { class: this.busy ? 'coming' : '' },
      el('button', { class: 'tile', type: 'button', 'aria-label': 'Take this photo out', onclick: () => {
        this.waiting = this.waiting.filter((other) => other !== one)
        URL.revokeObjectURL(one.url)
        this.draw()
      } }, el('img', { src: one.url, alt: '' }))),
      (tile) => tile.classList.toggle('coming', this.busy))
    tiles.hidden = !this.waiting.length
    $('new-class-add').disabled = this.busy
  }

  /** @param {(File | Blob)[]} files */
  async take(files) {
    this.waiting.push(...files.map((file) => ({ file, url: URL.createObjectURL(file) })))
    this.draw()
    if (this.name.value.trim()) await this.submit()
    else {
      this.hint('Now give it a name.')
      this.name.focus()
    }
  }

  async submit() {
    if (this.busy) return
    const name = this.name.value.trim()
    if (!name) {
      this.hint('A class needs a name first.')
      return this.name.focus()
    }
    if (!this.waiting.length) return $('new-class-files').click()
    this.busy = true
    this.draw()
    const sent = [...this.waiting] // others may come meanwhile
    const problems = $('new-class').querySelector('.problems')
    const added = await this.classes.send({ name }, sent.map(({ file }) => file), problems)
    this.busy = false
    if (added) {
      sent.forEach(({ url }) => URL.revokeObjectURL(url))
      this.waiting = this.waiting.filter((one) => !sent.includes(one))
      this.name.value = ''
    }
    const next = this.waiting.length ? 'Now give it a name.' : 'Another? Name it, then drop photos here, paste them, or take some.'
    this.hint(added ? next : 'No class was made.')
    this.draw()
  }

  async camera() {
    const name = this.name.value.trim()
    if (!name) {
      this.hint('Give it a name first, then take its photos.')
      return this.name.focus()
    }
    /** @type {{id?: string, name: string}} */
    const to = { name }
    const problems = $('new-class').querySelector('.problems')
    await takePhotos(`Photos of ${name}`, async (photos) => {
      if (await this.classes.send(to, photos, problems)) this.name.value = ''
    })
  }

  /** @param {string} text */
  hint(text) {
    $('new-class-hint').textContent = text
    announce(text)
  }
}

/** @param {string} of @param {string} text */
const problem = (of, text) =>
  el('li', {}, el('span', {}, of ? el('b', {}, `${of}: `) : null, text),
    el('button', { class: 'quiet only', type: 'button', 'aria-label': 'Dismiss', onclick: (/** @type {Event} */ event) =>
      /** @type {HTMLElement} */ (event.currentTarget).parentElement?.remove() }, icon('close')))
