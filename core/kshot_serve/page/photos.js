/** Photos on their way: out of drops and clipboards, within the server's limits, and back as thumbnails. */
import { call, request, server } from './api.js'
import { el } from './dom.js'
import { chosen, dropped, nameOf } from './folders.js'

/**
 * @typedef {{max_bytes: number, max_pixels: number, max_side: number}} PhotoLimits
 * @typedef {{scope: string, formats: string[], photo: PhotoLimits, request: {photos: number, bytes: number}}} Limits
 */

/** @type {Promise<Limits> | null} */
let limits = null

/** What the server takes at most, and what this key may do; asked once for each key. */
export function serverLimits() {
  limits ??= call('GET', '/v1/limits').catch((error) => {
    limits = null
    throw error
  })
  return limits
}
server.addEventListener('key', () => (limits = null))

/**
 * The photo as the server takes it: as it is if it can be, else drawn anew in this browser, smaller or as a JPEG.
 * What this browser cannot read goes as it is, and the server says what is wrong with it; but not what is plainly no image.
 * @param {File} file
 * @returns {Promise<File>}
 */
export async function fitted(file) {
  if (file.type && !file.type.startsWith('image/')) throw new Error('This file is not a photo.')
  const { formats, photo } = await serverLimits()
  const image = await opened(file)
  if (!image) return file
  const { naturalWidth: width, naturalHeight: height } = image
  const taken = formats.some((format) => file.type === `image/${format.toLowerCase()}`)
  let scale = Math.min(1, photo.max_side / Math.max(width, height), Math.sqrt(photo.max_pixels / (width * height)))
  if (taken && scale === 1 && file.size <= photo.max_bytes) return file
  for (let tries = 0; ; tries++, scale *= 0.7) {
    const drawn = await draw(image, Math.floor(width * scale), Math.floor(height * scale), file.name)
    if (drawn.size <= photo.max_bytes || tries === 5) return drawn
  }
}

/** As an image, if this browser can read it. @param {Blob} file @returns {Promise<HTMLImageElement | null>} */
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
 * @param {CanvasImageSource} source @param {number} width @param {number} height @param {string} [name] of the file
 * @returns {Promise<File>}
 */
export function draw(source, width, height, name = 'photo.jpg') {
  const canvas = el('canvas', { width: Math.max(1, width), height: Math.max(1, height) })
  const brush = canvas.getContext('2d')
  brush.fillStyle = 'white'
  brush.fillRect(0, 0, canvas.width, canvas.height)
  brush.drawImage(source, 0, 0, canvas.width, canvas.height)
  return new Promise((done, fail) =>
    canvas.toBlob((/** @type {Blob | null} */ blob) =>
      (blob ? done(new File([blob], name, { type: blob.type })) : fail(new Error('There is no room to draw this photo.'))), 'image/jpeg', 0.92))
}

/**
 * Let photos be dropped on an element, and folders and zips of them.
 * @param {HTMLElement} target
 * @param {(found: import('./folders.js').Found[], name: string) => void} take `name` of the first thing dropped
 * @param {(problem: string) => void} refuse
 */
export function droppable(target, take, refuse) {
  let depth = 0 // dragenter and dragleave come for every child as well
  const hover = (/** @type {number} */ change) => {
    depth = Math.max(0, depth + change)
    target.classList.toggle('over', depth > 0)
  }
  target.addEventListener('dragenter', () => hover(1))
  target.addEventListener('dragleave', () => hover(-1))
  target.addEventListener('dragover', (event) => event.preventDefault())
  target.addEventListener('drop', (event) => {
    const taken = event.defaultPrevented // by an element within
    event.preventDefault()
    hover(-depth)
    const name = nameOf(event.dataTransfer?.files[0])
    if (!taken) dropped(event.dataTransfer).then((found) => found.length && take(found, name)).catch((error) => refuse(error.message))
  })
}

/**
 * Photos from a file chooser, or a folder or a zip of them; the same file may be chosen twice.
 * @param {HTMLInputElement} input
 * @param {(found: import('./folders.js').Found[]) => void} take
 * @param {(problem: string) => void} refuse
 */
export function chooser(input, take, refuse) {
  input.accept ||= 'image/*'
  input.addEventListener('change', () => {
    const files = [...(input.files ?? [])]
    input.value = ''
    chosen(files).then((found) => found.length && take(found)).catch((error) => refuse(error.message))
  })
}

/** Thumbnails of photos that the server has, by the photo's id. @type {Map<string, Promise<string>>} */
const thumbnails = new Map()

/** Act once on each element that comes near the screen. @param {(element: any) => void} act @param {number} margin in pixels */
export function whenNear(act, margin) {
  const observer = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue
      observer.unobserve(target)
      act(target)
    }
  }, { rootMargin: `${margin}px` })
  return observer
}

const near = whenNear((image) => {
  const { path, photo } = image.dataset
  if (!thumbnails.has(photo)) thumbnails.set(photo, thumbnail(path))
  thumbnails.get(photo).then(
    (/** @type {string} */ url) => (image.src = url),
    () => thumbnails.delete(photo),
  )
}, 200)

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
const thumbnail = async (path) => URL.createObjectURL(await (await request('GET', `${path}/thumbnail`)).blob())

/** Forget what was deleted. @param {string} photo */
export async function forget(photo) {
  const url = await thumbnails.get(photo)?.catch(() => null)
  if (url) URL.revokeObjectURL(url)
  thumbnails.delete(photo)
}

/** The whole photo. @param {string} space @param {string} photo */
export const whole = async (space, photo) => (await request('GET', pathOf(space, photo))).blob()
