/** The classes of a label space: a card for each, with its photos, and the form that makes a new one. */
import { Adding, UNDO, problem, refusals } from './adding.js'
import { may } from './api.js'
import { takePhotos } from './camera.js'
import { $, announce, ask, confirmed, counted, el, has, icon, keep, toast } from './dom.js'
import { grouped } from './folders.js'
import { chooser, droppable, thumb, whenNear, whole } from './photos.js'

/**
 * @typedef {import('./space.js').Space} Space @typedef {import('./space.js').Class} Class
 * @typedef {import('./folders.js').Found} Found
 */

const SHOWN = 24 // photos of a card until more are asked for
const MANY = 12 // classes; where there are more, they can be searched

export class Classes {
  constructor() {
    /** @type {Space} */
    this.space = /** @type {any} */ (null)
    /** Photos on their way to a class, by its id. @type {Map<string, {file: File, url: string}[]>} */
    this.coming = new Map()
    /** @type {Set<string>} */
    this.opened = new Set()
    this.form = new NewClass(this)
    this.adding = new Adding()
    /** A card has only its name until it comes near the screen: a thousand whole ones would take seconds to make. */
    this.near = whenNear((card) => {
      const of = this.space.classes.find(({ id }) => id === card.dataset.key)
      if (of) this.fill(this.furnish(card, of), of)
    }, 600)
    $('find-class').addEventListener('input', () => this.draw())
    droppable($('classes'), (found) => this.form.take(found), (problem) => toast(problem))
  }

  /** @param {Space} space */
  open(space) {
    this.space = space
    this.coming.clear()
    this.form.clear()
    this.adding.clear()
    $('find-class').value = ''
    $('cards').replaceChildren()
    this.draw()
  }

  draw() {
    const { classes } = this.space
    $('find').hidden = classes.length <= MANY
    const part = $('find').hidden ? '' : $('find-class').value
    const found = part ? classes.filter(({ name }) => has(name, part)) : classes
    $('found').textContent = part ? `${found.length} of ${counted(classes.length, 'class', 'classes')}` : ''
    keep($('cards'), found, ({ id }) => id, () => this.card(), (card, one) => this.fill(card, one))
  }

  card() {
    const card = el('article', { class: 'card', tabindex: '-1' })
    this.near.observe(card)
    return card
  }

  /** Make all that a card has. @param {HTMLElement} card @param {Class} made */
  furnish(card, made) {
    const { id } = made
    const now = () => this.space.classes.find((one) => one.id === id) ?? made
    const name = el('input', { class: 'title', type: 'text', maxlength: 200, autocomplete: 'off', spellcheck: 'false', readonly: !may('write') })
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
    card.classList.add('whole')
    card.replaceChildren(
      el('div', { class: 'line spread' },
        name,
        el('span', { class: 'count hint' }),
        el('button', { class: 'quiet only bin', type: 'button', 'data-needs': 'write', onclick: () => this.remove(now()) }, icon('bin'))),
      el('ul', { class: 'tiles' }),
      el('div', { class: 'line', 'data-needs': 'write' },
        el('label', { class: 'filebutton small' }, input, icon('plus'), 'Add photos'),
        el('button', { class: 'small', type: 'button', onclick: () =>
          takePhotos(`Photos of ${now().name}`, (photos) => this.add(now(), photos)) }, icon('camera'), 'Camera')),
      el('ul', { class: 'problems', 'aria-live': 'polite' }))
    const add = (/** @type {Found[]} */ found) => this.add(now(), found.map(({ file }) => file))
    const refuse = (/** @type {string} */ text) => this.problems(id).append(problem(text))
    chooser(input, add, refuse)
    droppable(card, add, refuse)
    return card
  }

  /** @param {HTMLElement} card @param {Class} of */
  fill(card, of) {
    card.setAttribute('aria-label', of.name)
    if (!card.classList.contains('whole')) return void (card.textContent = of.name)
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
      ...coming.map(({ url }) => ({ key: url, make: () => el('li', { class: 'coming' }, el('img', { src: url, alt: '' })) })),
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
   * @param {Class} to @param {File[]} files
   */
  async add(to, files) {
    if (!may('write')) return
    const coming = files.map((file) => ({ file, url: URL.createObjectURL(file) }))
    this.coming.set(to.id, [...(this.coming.get(to.id) ?? []), ...coming])
    this.draw()
    await this.send(to, files, this.problems(to.id))
    this.coming.set(to.id, (this.coming.get(to.id) ?? []).filter((one) => !coming.includes(one)))
    coming.forEach(({ url }) => URL.revokeObjectURL(url))
    this.draw()
  }

  /**
   * Send photos, and show what the server says of each that it refuses.
   * @param {{id?: string, name: string}} to @param {File[]} files @param {Element} problems
   */
  async send(to, files, problems) {
    problems.replaceChildren()
    const refused = refusals(problems)
    try {
      const { added, notes } = await this.space.addPhotos(to, files, (file, refusal) => refusal && refused(file.name, refusal))
      notes.forEach((note) => problems.append(problem(note)))
      if (added) toast(`${counted(added, 'photo')} of ${to.name} added.`, UNDO)
      return added
    } catch (error) {
      problems.append(problem(/** @type {Error} */ (error).message))
      return 0
    }
  }

  /** Photos of many classes, as they came out of folders or a zip. @param {{name: string, files: File[]}[]} classes */
  async addAll(classes) {
    if (may('write')) await this.adding.run(this.space, classes)
  }

  /** Where a class shows what is wrong with photos. @param {string} id @returns {Element} */
  problems(id) {
    return this.element(id)?.querySelector('.problems') ?? $('new-class').querySelector('.problems')
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
    if (focused?.closest('#new-class')) return (/** @type {File[]} */ files) => this.form.hold(files)
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
    /** Photos that wait for a name. @type {{file: File, url: string}[]} */
    this.waiting = []
    this.busy = false
    this.next = false // another was asked for meanwhile
    const form = $('new-class')
    form.addEventListener('submit', (/** @type {Event} */ event) => {
      event.preventDefault()
      this.submit()
    })
    const refuse = (/** @type {string} */ text) => form.querySelector('.problems').append(problem(text))
    chooser($('new-class-files'), (found) => this.take(found), refuse)
    chooser($('new-class-folder'), (found) => this.take(found), refuse)
    droppable(form, (found) => this.take(found), refuse)
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

  /** Folders become classes; photos by themselves wait for a name. @param {Found[]} found */
  take(found) {
    if (!may('write')) return
    const { classes, loose } = grouped(found)
    if (classes.length) this.classes.addAll(classes)
    if (loose.length) this.hold(loose)
  }

  /** @param {File[]} files */
  async hold(files) {
    this.waiting.push(...files.map((file) => ({ file, url: URL.createObjectURL(file) })))
    this.draw()
    if (this.name.value.trim()) await this.submit()
    else {
      this.hint('Now give it a name.')
      this.name.focus()
    }
  }

  async submit() {
    if (this.busy) return void (this.next = true)
    const name = this.name.value.trim()
    if (!name) {
      this.hint('A class needs a name first.')
      return this.name.focus()
    }
    if (!this.waiting.length) return $('new-class-files').click()
    this.busy = true
    this.next = false
    this.draw()
    const sent = [...this.waiting] // others may come meanwhile
    const problems = $('new-class').querySelector('.problems')
    const added = await this.classes.send({ name }, sent.map(({ file }) => file), problems)
    this.busy = false
    if (added) {
      sent.forEach(({ url }) => URL.revokeObjectURL(url))
      this.waiting = this.waiting.filter((one) => !sent.includes(one))
      $('find-class').value = ''
      if (this.name.value.trim() === name) this.name.value = ''
    }
    const next = this.waiting.length ? 'Now give it a name.' : 'Another? Name it, then drop photos here, paste them, or take some.'
    this.hint(added ? next : 'No class was made.')
    this.draw()
    const named = this.name.value.trim()
    if (this.next && named && named !== name) await this.submit()
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
