/** The camera: a stream in a <video>, frames of it as JPEG, and the dialog that takes photos while a button is held. */
import { $, ask, counted, el, keep, sleep } from './dom.js'
import { draw } from './photos.js'

const SIDE = 720 // of a frame, at most
const EVERY = 400 // ms between the photos of one hold
const MOST = 24 // photos of one hold

/** One camera shown in one <video>. */
export class Camera {
  /** @param {HTMLVideoElement} video @param {HTMLButtonElement} flip shows itself where there is another camera */
  constructor(video, flip) {
    this.video = video
    this.flip = flip
    this.facing = 'environment'
    /** @type {MediaStream | null} */
    this.stream = null
    /** Counts starts and stops: a stream that comes after another of them is let go. */
    this.turn = 0
    flip.addEventListener('click', () => {
      this.facing = this.facing === 'environment' ? 'user' : 'environment'
      this.start().catch(() => this.stop())
    })
  }

  /** Whether it runs: not, if it was stopped or started anew meanwhile. Throws an Error whose message is for people. */
  async start() {
    this.stop()
    const { turn } = this
    if (!navigator.mediaDevices) throw new Error('Browsers give a camera only to pages on https or localhost. This one is on neither.')
    let stream
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: this.facing }, audio: false })
    } catch (error) {
      if (turn !== this.turn) return false
      const why = /** @type {DOMException} */ (error).name
      if (why === 'NotAllowedError') throw new Error('The browser did not give leave to use the camera. Its address bar has a setting for that.')
      if (why === 'NotFoundError') throw new Error('There is no camera on this device.')
      throw new Error('The camera did not start. Another program may be using it.')
    }
    if (turn !== this.turn) {
      stream.getTracks().forEach((track) => track.stop())
      return false
    }
    this.stream = stream
    this.video.srcObject = stream
    this.video.hidden = false
    try {
      await this.video.play()
    } catch (error) {
      if (turn === this.turn) throw error
    }
    const cameras = await navigator.mediaDevices.enumerateDevices()
    if (turn !== this.turn) return false
    this.flip.hidden = cameras.filter((device) => device.kind === 'videoinput').length < 2
    return true
  }

  stop() {
    this.turn++
    this.stream?.getTracks().forEach((track) => track.stop())
    this.stream = null
    this.video.srcObject = null
    this.video.hidden = true
    this.flip.hidden = true
  }

  /** What the camera sees now. */
  frame() {
    const { videoWidth: width, videoHeight: height } = this.video
    const scale = Math.min(1, SIDE / Math.max(width, height))
    return draw(this.video, Math.round(width * scale), Math.round(height * scale))
  }
}

/** @type {Camera | null} */
let taking = null

/**
 * The dialog that takes photos. Each hold of the button gives a handful to `take`.
 * @param {string} title
 * @param {(photos: File[]) => Promise<void>} take
 */
export async function takePhotos(title, take) {
  const dialog = $('camera')
  const button = $('camera-hold')
  const words = $('camera-words')
  const tiles = $('camera-taken')
  taking ??= new Camera($('camera-view'), $('camera-flip'))
  const camera = taking
  /** @type {{url: string}[]} */
  const taken = []
  let holding = false
  /** @type {Promise<void>} */
  let sending = Promise.resolve()

  const show = () =>
    keep(tiles, taken.slice(-12), ({ url }) => url, ({ url }) => el('li', {}, el('img', { src: url, alt: '' })))
  const hold = async () => {
    if (holding || !camera.stream) return
    holding = true
    button.classList.add('held')
    const photos = []
    while (holding && photos.length < MOST) {
      const photo = await camera.frame()
      photos.push(photo)
      taken.push({ url: URL.createObjectURL(photo) })
      words.textContent = counted(taken.length, 'photo')
      show()
      await sleep(EVERY)
    }
    holding = false
    button.classList.remove('held')
    sending = sending.then(() => take(photos)).then(() => {
      words.textContent = `${counted(taken.length, 'photo')} taken. Hold again for more.`
    })
  }
  const release = () => (holding = false)
  const listening = new AbortController()
  const on = (/** @type {string} */ what, /** @type {(event: any) => void} */ act) =>
    button.addEventListener(what, act, { signal: listening.signal })
  on('pointerdown', (event) => {
    button.setPointerCapture(event.pointerId)
    hold()
  })
  on('pointerup', release)
  on('pointercancel', release)
  on('blur', release)
  on('contextmenu', (event) => event.preventDefault()) // a long press on a phone
  on('keydown', (event) => {
    if (event.key !== ' ' && event.key !== 'Enter') return
    event.preventDefault()
    hold()
  })
  on('keyup', release)

  $('camera-title').textContent = title
  words.textContent = 'Hold the button to take photos; move a little between them.'
  show()
  const closed = ask(dialog)
  camera.start().catch((error) => (words.textContent = error.message))
  await closed
  release()
  camera.stop()
  listening.abort()
  taken.forEach(({ url }) => URL.revokeObjectURL(url))
  await sending
}
