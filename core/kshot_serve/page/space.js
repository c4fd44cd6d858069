/** The label space that is open: what the page knows of it, and everything that can be done to it. */
import { Refusal, call, request } from './api.js'
import { fitted, forget, serverLimits } from './photos.js'

const BATCH = 8_000_000 // bytes of photos in one request, about: half a minute of a slow phone

/**
 * @typedef {{id: string, sha256: string, created: string}} Photo
 * @typedef {{id: string, name: string, photos: Photo[]}} Class
 * @typedef {{number: number, created: string, who?: string, action: string, what: string, to?: number}} Revision
 * @typedef {{name: string, version: string, bundle: string}} Model
 * @typedef {{class: {id: string, name: string} | null, probability: number, decision: 'match' | 'ambiguous' | 'unknown',
 *            classes: {id: string, name: string, probability: number}[],
 *            evidence: {photo: string, class: any, similarity: number}[]}} Answer
 */

/** `changed` after every change, with `detail` the words for it; the page then draws itself and asks again. */
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
      try {
        return await act()
      } finally {
        await this.load()
        if (this.revision !== before) {
          this.actions.set(this.revision, before)
          this.dispatchEvent(new CustomEvent('changed', { detail: words }))
        }
      }
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
   * @param {(File | Blob)[]} files
   * @param {(file: File | Blob, refusal?: Error) => void} [told] of each photo, when it is in or refused
   * @returns {Promise<{added: number, notes: string[]}>}
   */
  async addPhotos(to, files, told = () => {}) {
    const { request: limit } = await serverLimits()
    const words = `adding ${files.length === 1 ? 'a photo' : `${files.length} photos`} of ${to.name}`
    return this.change(words, async () => {
      let added = 0
      /** @type {string[]} */
      const notes = []
      const post = async (/** @type {[File | Blob, Blob][]} */ batch) => {
        const form = new FormData()
        if (!to.id) form.append('name', to.name)
        for (const [file, photo] of batch) form.append('photos', photo, 'name' in file ? file.name : 'photo.jpg')
        const path = to.id ? `${this.path}/classes/${to.id}/photos` : `${this.path}/classes`
        const made = await call('POST', path, { body: form })
        to.id ??= made.class.id
        added += made.photos.length // not those that are there already
        notes.push(...made.notes.map((/** @type {string} */ note) => named(note, batch)))
        batch.forEach(([file]) => told(file))
      }
      for await (const batch of batches(files, limit)) {
        try {
          await post(batch)
        } catch (error) {
          if (batch.length === 1 || !isAboutAPhoto(error)) batch.forEach(([file]) => told(file, /** @type {Error} */ (error)))
          else for (const one of batch) await post([one]).catch((refusal) => told(one[0], refusal)) // to find the bad ones
        }
      }
      return { added, notes }
    })
  }

  /**
   * @param {Blob} photo @param {{patient?: boolean}} [how]
   * @returns {Promise<{answer: Answer, model: Model, revision: number}>}
   */
  async classify(photo, how = {}) {
    const form = new FormData()
    form.append('photos', photo, 'photo.jpg')
    const { results, model, revision } = await call('POST', `${this.path}/classify`, { body: form, ...how })
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
   * Go back to before the last action. Gives null when there is nothing left to undo; `same` tells that all is as it was:
   * revisions do not hold the name of the label space.
   * @returns {Promise<{gone: any[], same: boolean} | null>}
   */
  async undo() {
    await this.last
    const to = undoTarget(await this.revisions(), this.actions)
    if (to === null) return null
    const shown = () => JSON.stringify([this.accept, this.classes])
    const before = shown()
    const { gone } = await this.rollback(to)
    return { gone, same: !gone.length && shown() === before }
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
 * The revision to go back to. After an undo the present equals an older revision, and it is that one's action that the
 * next undo takes back.
 * @param {Revision[]} revisions newest first
 * @param {Map<number, number>} actions
 */
export function undoTarget(revisions, actions) {
  const rollbacks = new Map(revisions.filter(({ to }) => to != null).map(({ number, to }) => [number, to]))
  const same = (/** @type {number} */ number) => {
    while (rollbacks.has(number)) number = rollbacks.get(number)
    return number
  }
  const now = same(revisions[0].number)
  return now <= 1 ? null : same(actions.get(now) ?? now - 1)
}

/**
 * The server counts the photos of a request; a person knows them by the names of their files.
 * @param {string} note @param {[File | Blob, Blob][]} batch
 */
const named = (note, batch) => note.replace(/^photo (\d+)/, (counted, number) => batch[number - 1]?.[0].name ?? counted)

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
const isAboutAPhoto = (error) => error instanceof Refusal && [400, 413, 415, 422].includes(error.status)

/**
 * Photos made to fit, in groups that fit into one request.
 * @param {(File | Blob)[]} files @param {{photos: number, bytes: number}} limit
 */
async function* batches(files, limit) {
  const room = Math.min(BATCH, 0.9 * limit.bytes) // the rest is for the form around them
  /** @type {[File | Blob, Blob][]} */
  let batch = []
  let bytes = 0
  for (const file of files) {
    const photo = await fitted(file)
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
