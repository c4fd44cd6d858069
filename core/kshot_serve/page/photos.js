/** Photos on their way: out of drops and clipboards, within the server's limits, and back as thumbnails. */
import { call, request } from './api.js'
import { el } from './dom.js'

/**
 * @typedef {{max_bytes: number, max_pixels: number, max_side: number}} PhotoLimits
 * @typedef {{formats: string[], photo: PhotoLimits, request: {photos: number, bytes: number}}} Limits
 */

/** @type {Promise<Limits> | null} */
let limits = null

/** What the server takes at most; asked once. */
export function serverLimits() {
  limits ??= call('GET', '/v1/limits').catch((error) => {
    limits = null
    throw error
  })
  return limits
}

/**
 * The photo as the server takes it: as it is if it can be, else drawn anew in this browser, smaller or as a JPEG.
 * What this browser cannot read goes as it is, and the server says what is wrong with it.
 * @param {File | Blob} file
 * @returns {Promise<File | Blob>}
 */
export async function fitted(file) {
  const { formats, photo } = await serverLimits()
  const image = await opened(file)
  if (!image) return file
  const { naturalWidth: width, naturalHeight: height } = image
  const taken = formats.some((format) => file.type === `image/${format.toLowerCase()}`)
  let scale = Math.min(1, photo.max_side / Math.max(width, height), Math.sqrt(photo.max_pixels / (width * height)))
  if (taken && scale === 1 && file.size <= photo.max_bytes) return file
  for (let tries = 0; ; tries++, scale *= 0.7) {
    const drawn = await draw(image, Math.floor(width * scale), Math.floor(height * scale))
    if (drawn.size <= photo.max_bytes || tries === 5) return new File([drawn], 'name' in file ? file.name : 'photo.jpg')
  }
}

/** @param {Blob} file @returns {Promise<HTMLImageElement | null>} */
function opened(file) {
  const image = new Image()
  const url = URL.createObjectURL(file)
  return new Promise((done) => {
    image.onload = () => done(image.naturalWidth ? image : null)
    image.onerror = () => done(null)
    image.src = url
  }).finally(() => URL.revokeObjectURL(url))
}

/**
 * A JPEG of what is in `source`, on white.
 * @param {CanvasImageSource} source @param {number} width @param {number} height
 * @returns {Promise<Blob>}
 */
export function draw(source, width, height) {
  const canvas = el('canvas', { width: Math.max(1, width), height: Math.max(1, height) })
  const brush = canvas.getContext('2d')
  brush.fillStyle = 'white'
  brush.fillRect(0, 0, canvas.width, canvas.height)
  brush.drawImage(source, 0, 0, canvas.width, canvas.height)
  return new Promise((done, fail) =>
    canvas.toBlob((/** @type {Blob | null} */ blob) => (blob ? done(blob) : fail(new Error('no room to draw'))), 'image/jpeg', 0.92))
}

/**
 * Let photos be dropped on an element.
 * @param {HTMLElement} target
 * @param {(files: File[]) => void} take
 */
export function droppable(target, take) {
  let depth = 0 // dragenter and dragleave come for every child as well
  const hover = (/** @type {number} */ change) => {
    depth = Math.max(0, depth + change)
    target.classList.toggle('over', depth > 0)
  }
  target.addEventListener('dragenter', () => hover(1))
  target.addEventListener('dragleave', () => hover(-1))
  target.addEventListener('dragover', (event) => event.preventDefault())
  target.addEventListener('drop', (event) => {
    event.preventDefault()
    hover(-depth)
    const files = [...(event.dataTransfer?.files ?? [])]
    if (files.length) take(files)
  })
}

/**
 * Photos from a file chooser; the same file may be chosen twice.
 * @param {HTMLInputElement} input @param {(files: File[]) => void} take
 */
export function chooser(input, take) {
  input.accept = 'image/*'
  input.addEventListener('change', () => {
    const files = [...(input.files ?? [])]
    input.value = ''
    if (files.length) take(files)
  })
}

/** Small pictures of photos that the server has, by id. @type {Map<string, Promise<string>>} */
const thumbnails = new Map()
const SIDE = 192

const near = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) continue
    near.unobserve(target)
    const image = /** @type {HTMLImageElement} */ (target)
    const { path, photo } = image.dataset
    if (!thumbnails.has(photo)) thumbnails.set(photo, thumbnail(path))
    thumbnails.get(photo).then(
      (url) => (image.src = url),
      () => thumbnails.delete(photo),
    )
  }
}, { rootMargin: '200px' })

/**
 * A photo that the server has, small; fetched (an <img> could not send a key) when it comes near the screen.
 * @param {string} space @param {string} photo
 */
export function thumb(space, photo) {
  const image = el('img', { alt: '', 'data-photo': photo, 'data-path': pathOf(space, photo) })
  near.observe(image)
  return image
}

/** @param {string} space @param {string} photo */
const pathOf = (space, photo) => `/v1/spaces/${space}/photos/${photo}`

/** @param {string} path */
async function thumbnail(path) {
  const bitmap = await createImageBitmap(await (await request('GET', path)).blob())
  const scale = Math.min(1, SIDE / Math.min(bitmap.width, bitmap.height))
  const small = await draw(bitmap, Math.round(bitmap.width * scale), Math.round(bitmap.height * scale))
  bitmap.close()
  return URL.createObjectURL(small)
}

/** Forget what was deleted. @param {string} photo */
export async function forget(photo) {
  const url = await thumbnails.get(photo)?.catch(() => null)
  if (url) URL.revokeObjectURL(url)
  thumbnails.delete(photo)
}

/** The whole photo. @param {string} space @param {string} photo */
export const whole = async (space, photo) => (await request('GET', pathOf(space, photo))).blob()
