/** Folders and zips of photos, read in this browser: each folder that holds files is a class. */

/**
 * @typedef {{file: File, folder: string}} Found `folder`: the name of the folder that the file lies in, '' if in none
 */

const HIDDEN = /(^|\/)(\.|__MACOSX\/|Thumbs\.db$|desktop\.ini$)/i // what systems add by themselves
const MANIFEST = 'manifest.json' // of a label space that was exported: it says which photo is of which class
const LARGEST = 100_000_000 // bytes of one file of a zip; the server's limit is less, and photos are drawn smaller
const TYPES = { jpg: 'jpeg', jpeg: 'jpeg', png: 'png', webp: 'webp', gif: 'gif', heic: 'heic', avif: 'avif', bmp: 'bmp' }

/** What was dropped, with all that is in folders. To be called before the event has ended. @param {DataTransfer | null} carried */
export async function dropped(carried) {
  const files = [...(carried?.files ?? [])]
  const entries = [...(carried?.items ?? [])].filter(({ kind }) => kind === 'file').map((item) => item.webkitGetAsEntry?.())
  if (!entries.some((entry) => entry?.isDirectory)) return unpacked(files.map((file) => ({ file, folder: '' })))
  /** @type {Found[]} */
  const found = []
  for (const entry of entries) if (entry) await walk(entry, '', found)
  return unpacked(found)
}

/** What was chosen, files or a folder (of which a browser gives every file with its path). @param {File[]} files */
export const chosen = (files) =>
  unpacked(files.map((file) => ({ file, folder: parent(file.webkitRelativePath) }))
    .filter(({ file }) => !HIDDEN.test(file.webkitRelativePath)))

/** Those in folders by the name of their folder, in the order of names; the others apart. @param {Found[]} found */
export function grouped(found) {
  /** @type {Map<string, File[]>} */
  const classes = new Map()
  for (const { file, folder } of found) if (folder) classes.set(folder, [...(classes.get(folder) ?? []), file])
  const inOrder = [...classes].map(([name, files]) => ({ name, files })).sort((a, b) => byName(a.name, b.name))
  return { classes: inOrder, loose: found.filter(({ folder }) => !folder).map(({ file }) => file) }
}

/** @param {File} file */
const isZip = (file) => /\.zip$/i.test(file.name)

/** What a folder or a zip is called. @param {File | undefined} file */
export const nameOf = (file) => file?.name.replace(/\.zip$/i, '') ?? ''

/** Whether a zip is a label space that was exported. @param {File} zip */
export const isExport = async (zip) => (await directory(zip)).some(({ path }) => path === MANIFEST)

/** @param {string} path */
const parent = (path) => path.split('/').at(-2) ?? ''

/** @param {string} a @param {string} b */
const byName = (a, b) => a.localeCompare(b, undefined, { numeric: true })

/** @param {any} entry @param {string} folder @param {Found[]} found */
async function walk(entry, folder, found) {
  if (HIDDEN.test(entry.name)) return
  if (entry.isFile) return found.push({ file: await new Promise((done, fail) => entry.file(done, fail)), folder })
  const reader = entry.createReader()
  const inside = []
  for (let some; (some = await new Promise((done, fail) => reader.readEntries(done, fail))).length; ) inside.push(...some)
  for (const each of inside.sort((a, b) => byName(a.name, b.name))) await walk(each, entry.name, found)
}

/** The files themselves, and in place of each zip what is in it. @param {Found[]} found @returns {Promise<Found[]>} */
async function unpacked(found) {
  const all = await Promise.all(found.map(async (one) => (isZip(one.file) ? unzip(one.file) : [one])))
  return all.flat()
}

/** @param {File} zip @returns {Promise<Found[]>} */
async function unzip(zip) {
  const entries = await directory(zip)
  const manifest = entries.find(({ path }) => path === MANIFEST)
  const { classes = [] } = manifest ? JSON.parse(await (await inflated(zip, manifest)).text()) : {}
  const classOf = new Map(classes.flatMap((/** @type {any} */ { name, photos }) => photos.map((/** @type {any} */ { file }) => [file, name])))
  const found = []
  for (const { path, ...how } of entries.sort((a, b) => byName(a.path, b.path))) {
    if (path.endsWith('/') || HIDDEN.test(path) || path === MANIFEST) continue
    const name = path.split('/').at(-1) ?? path
    const content = await inflated(zip, how).catch(() => new Blob()) // the server says of it what it is: no photo
    const type = /** @type {Record<string, string>} */ (TYPES)[name.split('.').at(-1)?.toLowerCase() ?? '']
    const file = new File([content], name, { type: type ? `image/${type}` : 'application/octet-stream' })
    found.push({ file, folder: classOf.get(path) ?? (parent(path) || nameOf(zip)) })
  }
  return found
}

/**
 * The entries of a zip, from the directory at its end (APPNOTE.TXT 4.3.12, 4.3.16).
 * @param {File} zip
 */
async function directory(zip) {
  const tail = await view(zip, Math.max(0, zip.size - 65_557), zip.size)
  let end = tail.byteLength - 22
  while (end >= 0 && tail.getUint32(end, true) !== 0x06054b50) end--
  if (end < 0) throw new Error(`${zip.name} cannot be read as a zip.`)
  const [size, start] = [tail.getUint32(end + 12, true), tail.getUint32(end + 16, true)]
  if (start === 0xffffffff) throw new Error(`${zip.name} is larger than 4 GB: drop its folders instead.`)
  const list = await view(zip, start, start + size)
  const entries = []
  for (let at = 0; at + 46 <= list.byteLength && list.getUint32(at, true) === 0x02014b50; ) {
    const [name, extra, comment] = [28, 30, 32].map((offset) => list.getUint16(at + offset, true))
    entries.push({
      path: new TextDecoder().decode(new Uint8Array(list.buffer, at + 46, name)),
      method: list.getUint16(at + 10, true),
      packed: list.getUint32(at + 20, true),
      size: list.getUint32(at + 24, true),
      start: list.getUint32(at + 42, true),
    })
    at += 46 + name + extra + comment
  }
  return entries
}

/**
 * One file of a zip: stored, or deflated; never more of it than its directory says.
 * @param {File} zip @param {{method: number, packed: number, size: number, start: number}} entry
 */
async function inflated(zip, { method, packed, size, start }) {
  if (size > LARGEST) throw new Error('too large')
  const head = await view(zip, start, start + 30)
  const from = start + 30 + head.getUint16(26, true) + head.getUint16(28, true)
  const content = zip.slice(from, from + packed)
  if (method === 0) return content
  if (method !== 8) throw new Error('compressed in another way')
  const reader = content.stream().pipeThrough(new DecompressionStream('deflate-raw')).getReader()
  const parts = []
  for (let read, length = 0; !(read = await reader.read()).done; parts.push(read.value))
    if ((length += read.value.length) > size) throw new Error('larger than it says')
  return new Blob(parts)
}

/** @param {Blob} file @param {number} start @param {number} end */
const view = async (file, start, end) => new DataView(await file.slice(start, end).arrayBuffer())
