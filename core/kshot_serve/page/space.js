/** The label space that is open: what the page knows of it, and everything that can be done to it. */
import { Refusal, call, request } from './api.js'
import { counted, sentence } from './dom.js'
import { fitted, forget, serverLimits } from './photos.js'

const BATCH = 8_000_000 // bytes of photos in one request, about: half a minute of a slow phone
const OFTEN = 1500 // ms from one look at classes that are being added to the next

/**
 * @typedef {{id: string, sha256: string, created: string}} Photo
 * @typedef {{id: string, name: string, photos: Photo[]}} Class
 * @typedef {{number: number, created: string, who?: string, action: string, what: string, to?: number}} Revision
 * @typedef {{name: string, version: string, bundle: string}} Model
 * @typedef {{class: {id: string, name: string} | null, probability: number, decision: 'match' | 'ambiguous' | 'unknown',
 *            classes: {id: string, name: string, probability: number}[],
 *            evidence: {photo: string, class: any, similarity: number}[]}} Answer
 * @typedef {(file: File, refusal?: Error) => void} Told
 */

/**
 * `changed` after every change, with `detail` the words for it; the page then draws itself and asks again. `growing`
 * from time to time while a long one goes on.
 */
export class Space extends EventTarget {
  /** @param {string} id */
  constructor(id) {
    super()
    this.id = id
    this.path = `/v1/spaces/${id}`
    this.name = ''
    /** @type {number | null} */
    this.accept = null // the model's balance of both errors
    this.revision = 0
    /** @type {Class[]} */
    this.classes = []
    /** @type {any} */
    this.facts = {}
    /** One change after another, so that two of ours never meet. @type {Promise<any>} */
    this.last = Promise.resolve()
    /** What one action did may be several revisions: the last of them -> the one before the first. @type {Map<number, number>} */
    this.actions = new Map()
    /** The revision of a deletion that was asked to be undone. */
    this.kept = 0
  }

  /** @param {string} name @returns {Promise<{id: string}>} */
  static create(name) {
    return call('POST', '/v1/spaces', { json: { name } })
  }

  /** The newest first. @returns {Promise<{id: string, name: string, classes: number, photos: number}[]>} */
  static async all() {
    return (await pages('/v1/spaces', 'spaces', 'after')).reverse()
  }

  /** @param {Blob} zip @returns {Promise<{id: string, name: string}>} */
  static import(zip) {
    return call('POST', '/v1/spaces/import', { body: zip, headers: { 'Content-Type': 'application/zip' } })
  }

  async load() {
    const [facts, listed] = await Promise.all([call('GET', this.path), call('GET', `${this.path}/classes`)])
    this.facts = facts
    this.name = facts.name
    this.accept = facts.accept
    this.classes = listed.classes
    this.revision = listed.revision
    return this
  }

  get photos() {
    return this.classes.reduce((sum, { photos }) => sum + photos.length, 0)
  }

  /**
   * Do something to the label space, after what is under way; then read it anew and tell the page.
   * @template T
   * @param {string} words
   * @param {() => Promise<T>} act
   * @returns {Promise<T>}
   */
  change(words, act) {
    const done = this.last.then(async () => {
      const before = this.revision
      const [acted] = await Promise.allSettled([act()])
      await this.load().catch((error) => {
        throw acted.status === 'rejected' ? acted.reason : error
      })
      if (this.revision !== before) {
        this.actions.set(this.revision, before)
        this.dispatchEvent(new CustomEvent('changed', { detail: words }))
      }
      if (acted.status === 'rejected') throw acted.reason
      return acted.value
    })
    this.last = done.catch(() => {})
    return done
  }

  /** @param {string} name */
  rename(name) {
    return this.change('a new name', () => call('PATCH', this.path, { json: { name } }))
  }

  /** @param {number | null} accept the share of known photos to accept; null: the server's default */
  setAccept(accept) {
    return this.change('the new strictness', () => call('PATCH', this.path, { json: { accept } }))
  }

  /** @param {Class} of @param {string} name */
  renameClass(of, name) {
    return this.change(`renaming ${of.name} to ${name}`, () => call('PATCH', `${this.path}/classes/${of.id}`, { json: { name } }))
  }

  /** @param {Class} gone */
  async deleteClass(gone) {
    await this.change(`deleting ${gone.name}`, () => call('DELETE', `${this.path}/classes/${gone.id}`))
    gone.photos.forEach(({ id }) => forget(id))
  }

  /** @param {string} photo @param {Class} of */
  async deletePhoto(photo, of) {
    await this.change(`deleting a photo of ${of.name}`, () => call('DELETE', `${this.path}/photos/${photo}`))
    forget(photo)
  }

  /**
   * Add photos to a class, or make one of them. Photos that the server refuses are left out, each with the reason.
   * @param {{id?: string, name: string}} to gets its id once the class is made
   * @param {File[]} files
   * @param {Told} told of each photo, when it is in or refused
   * @returns {Promise<{added: number, notes: string[]}>}
   */
  addPhotos(to, files, told) {
    const words = `adding ${files.length === 1 ? 'a photo' : `${files.length} photos`} of ${to.name}`
    return this.change(words, () => this.post(to, files, told))
  }

  /**
   * Add photos to many classes as one action: to those of these names, which are made if need be.
   * @param {{name: string, files: File[]}[]} classes
   * @param {(file: File, of: string, refusal?: Error) => void} told
   * @param {AbortSignal} signal ends it; what is in stays
   * @returns {Promise<{added: number, notes: string[]}>}
   */
  addClasses(classes, told, signal) {
    return this.change(`adding photos of ${counted(classes.length, 'class', 'classes')}`, async () => {
      const total = { added: 0, notes: /** @type {string[]} */ ([]) }
      let shown = performance.now()
      for (const { name, files } of classes) {
        const to = { name, id: this.classes.find((one) => one.name === name.trim().normalize())?.id }
        const { added, notes } = await this.post(to, files, (file, refusal) => told(file, name, refusal), signal)
        total.added += added
        total.notes.push(...notes)
        if (signal.aborted) break
        if (performance.now() - shown < OFTEN) continue
        await this.load()
        this.dispatchEvent(new Event('growing'))
        shown = performance.now()
      }
      return total
    })
  }

  /** @param {{id?: string, name: string}} to @param {File[]} files @param {Told} told @param {AbortSignal} [signal] */
  async post(to, files, told, signal) {
    const { request: limit } = await serverLimits()
    let added = 0
    /** @type {string[]} */
    const notes = []
    const send = async (/** @type {[File, Blob][]} */ batch) => {
      const form = new FormData()
      if (!to.id) form.append('name', to.name)
      for (const [file, photo] of batch) form.append('photos', photo, file.name)
      const path = to.id ? `${this.path}/classes/${to.id}/photos` : `${this.path}/classes`
      const made = await call('POST', path, { body: form })
      to.id ??= made.class.id
      added += made.photos.length // not those that are there already
      notes.push(...made.notes.map((/** @type {string} */ note) => named(note, batch)))
      batch.forEach(([file]) => told(file))
    }
    for await (const batch of batches(files, limit, told)) {
      if (signal?.aborted) break
      try {
        await send(batch)
      } catch (error) {
        if (batch.length === 1 || !isAboutAPhoto(error)) batch.forEach(([file]) => told(file, /** @type {Error} */ (error)))
        else for (const one of batch) await send([one]).catch((refusal) => told(one[0], refusal)) // to find the bad ones
      }
    }
    return { added, notes }
  }

  /**
   * @param {Blob} photo @param {{patient?: boolean}} [how]
   * @returns {Promise<{answer: Answer, model: Model, revision: number}>}
   */
  async classify(photo, how = {}) {
    const form = new FormData()
    form.append('photos', photo, 'photo.jpg')
    const { results, model, revision } = await call('POST', `${this.path}/classify`, { body: form, asks: true, ...how })
    if (results[0].error) throw new Refusal(results[0].error.code, results[0].error.message)
    return { answer: results[0], model, revision }
  }

  /** Newest first. @returns {Promise<Revision[]>} */
  revisions() {
    return pages(`${this.path}/revisions`, 'revisions', 'before')
  }

  /** @param {number} to @returns {Promise<{gone: any[]}>} */
  rollback(to) {
    return this.change(`going back to revision ${to}`, () => call('POST', `${this.path}/rollback`, { json: { revision: to } }))
  }

  /**
   * Go back to before the last action. Where that is nothing but deletions, which stay, only the next call goes further back.
   * @returns {Promise<{what: 'nothing' | 'deleted' | 'same' | 'undone', gone: any[]}>} `same`: all is as it was, since
   *   revisions do not hold the name of the label space
   */
  async undo() {
    await this.last
    const revisions = await this.revisions()
    let step = undoStep(revisions, this.actions)
    if (step && step.made.every(({ action }) => action.startsWith('delete')) && this.kept !== step.now) {
      this.kept = step.now
      return { what: 'deleted', gone: [] }
    }
    if (step && this.kept === step.now) step = undoStep(revisions, this.actions, step.to)
    if (!step) return { what: 'nothing', gone: [] }
    const shown = () => JSON.stringify([this.accept, this.classes])
    const before = shown()
    const { gone } = await this.rollback(step.to)
    return { what: !gone.length && shown() === before ? 'same' : 'undone', gone }
  }

  async export() {
    return (await request('GET', `${this.path}/export`)).blob()
  }

  async delete() {
    await call('DELETE', this.path)
    this.classes.forEach(({ photos }) => photos.forEach(({ id }) => forget(id)))
  }
}

/**
 * What an undo takes back: the revisions of the last action, and the one `to` go back to; null if there is none. After an
 * undo the present equals an older revision, and it is that one's action that the next undo takes back.
 * @param {Revision[]} revisions newest first
 * @param {Map<number, number>} actions
 * @param {number} [from] the revision that is taken for the present
 */
export function undoStep(revisions, actions, from = revisions[0].number) {
  const rollbacks = new Map(revisions.filter(({ to }) => to != null).map(({ number, to }) => [number, to]))
  const same = (/** @type {number} */ number) => {
    while (rollbacks.has(number)) number = rollbacks.get(number)
    return number
  }
  const now = same(from)
  if (now <= 1) return null
  const before = actions.get(now) ?? now - 1
  return { now, to: same(before), made: revisions.filter(({ number }) => number > before && number <= now) }
}

/**
 * The server counts the photos of a request; a person knows them by the names of their files.
 * @param {string} note @param {[File, Blob][]} batch
 */
const named = (note, batch) => sentence(note.replace(/^photo (\d+)/, (counted, number) => batch[number - 1]?.[0].name ?? counted))

/**
 * All pages of a list.
 * @param {string} path @param {string} of what it is called in an answer @param {string} from what `next` is given back as
 * @returns {Promise<any[]>}
 */
async function pages(path, of, from) {
  const found = []
  for (let next = ''; next !== null; ) {
    const page = await call('GET', `${path}?limit=1000${next && `&${from}=${next}`}`)
    found.push(...page[of])
    next = page.next
  }
  return found
}

/** @param {any} error */
const isAboutAPhoto = (error) =>
  ['not_an_image', 'photo_too_large', 'body_too_large', 'media_type_unknown', 'too_many_photos'].includes(error.code)

/**
 * Photos made to fit, in groups that fit into one request.
 * @param {File[]} files @param {{photos: number, bytes: number}} limit @param {Told} told of those that are no photos
 */
async function* batches(files, limit, told) {
  const room = Math.min(BATCH, 0.9 * limit.bytes) // the rest is for the form around them
  /** @type {[File, Blob][]} */
  let batch = []
  let bytes = 0
  for (const file of files) {
    const photo = await fitted(file).catch((error) => void told(file, error))
    if (!photo) continue
    if (batch.length && (batch.length === limit.photos || bytes + photo.size > room)) {
      yield batch
      batch = []
      bytes = 0
    }
    batch.push([file, photo])
    bytes += photo.size
  }
  if (batch.length) yield batch
}
