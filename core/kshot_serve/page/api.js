/** Calls to the server: its refusals as errors with its own words, waiting when it is busy, asking for a key. */
import { sentence, sleep } from './dom.js'

/** What the server, or the way to it, refused. `message` is for people. */
export class Refusal extends Error {
  /** @param {string} code @param {string} message @param {number} [status] @param {number} [after] seconds */
  constructor(code, message, status = 0, after = 0) {
    super(sentence(message))
    this.code = code
    this.status = status
    this.after = after
  }
}

/** Reports `away`, `back`, `busy` (detail: seconds until the next try), `answered` and `key` (another one is in use). */
export const server = new EventTarget()

/** Asks the person for a key and gives it, or null. Set by the page. @type {{ask: (refused: boolean) => Promise<string|null>}} */
export const keys = { ask: async () => null }

const SCOPES = ['read', 'write', 'admin']

/** Whether the key in use may do what needs this scope; <body> has its scope, also for the style sheet. @param {string} needed */
export const may = (needed) => SCOPES.indexOf(document.body.dataset.scope ?? '') >= SCOPES.indexOf(needed)

const KEY = 'kshot-key'
const PATIENCE = 5 // tries when the server is busy
const PATIENCE_MS = 120_000
const PACE = 100 // bytes of a body a millisecond, at least; the server expects as much
/** @type {Promise<string|null> | null} */
let asking = null
let away = false

/**
 * One request. Busy servers are asked again after the time that they name; a missing key is asked for.
 * @param {string} method
 * @param {string} path
 * @param {{json?: any, body?: BodyInit, headers?: Record<string, string>, patient?: boolean, asks?: boolean}} [what]
 *   `asks`: it changes nothing, though it is a POST
 * @returns {Promise<Response>}
 */
export async function request(method, path, what = {}) {
  for (let tries = 1; ; tries++) {
    const used = sessionStorage.getItem(KEY)
    const response = await send(method, path, what, used)
    if (response.ok) return response
    const refusal = await read(response)
    if (response.status === 401 && (await newKey(used))) continue
    const again = refusal.after > 0 && what.patient !== false && tries < PATIENCE
    if (!again) throw refusal
    server.dispatchEvent(new CustomEvent('busy', { detail: { seconds: refusal.after, message: refusal.message } }))
    await sleep(1000 * refusal.after)
  }
}

/** The same, for answers in JSON. @type {(...args: Parameters<typeof request>) => Promise<any>} */
export const call = async (...args) => {
  const response = await request(...args)
  return response.status === 204 ? null : response.json()
}

/** @param {string} method @param {string} path @param {any} what @param {string | null} key */
async function send(method, path, { json, body, headers = {}, asks = method === 'GET' }, key) {
  const sent = { ...headers }
  if (key) sent.Authorization = `Bearer ${key}`
  if (json !== undefined) sent['Content-Type'] = 'application/json'
  try {
    const response = await fetch(path, {
      method,
      headers: sent,
      body: json === undefined ? body : JSON.stringify(json),
      signal: AbortSignal.timeout(PATIENCE_MS + sizeOf(body) / PACE),
    })
    here()
    return response
  } catch {
    gone()
    throw new Refusal('away', `The server does not answer.${asks ? '' : ' What you just did may not have been saved.'}`)
  }
}

/** In bytes, but for what a form has around its files. @param {any} body @returns {number} */
const sizeOf = (body) =>
  body instanceof FormData ? [...body.values()].reduce((sum, part) => sum + sizeOf(part), 0) : (body?.size ?? 0)

/** @param {Response} response */
async function read(response) {
  const after = Number(response.headers.get('Retry-After')) || 0
  try {
    const { code, message } = (await response.json()).error
    return new Refusal(code, message, response.status, after)
  } catch {
    return new Refusal('unreadable', `The server answered ${response.status} without saying why.`, response.status, after)
  }
}

/** One question for a key at a time, whoever needs it. @param {string | null} used @returns {Promise<boolean>} */
async function newKey(used) {
  if (used !== sessionStorage.getItem(KEY)) return true // another request has got one since
  asking ??= askKey(used !== null)
  const key = await asking
  asking = null
  if (key) {
    sessionStorage.setItem(KEY, key)
    server.dispatchEvent(new Event('key'))
  }
  return Boolean(key)
}

/** Until it is one that a header can carry: `fetch` fails on others as if the server were away. @param {boolean} refused */
async function askKey(refused) {
  let key = await keys.ask(refused)
  while (key !== null && !/^[\x21-\x7e]+$/.test(key)) key = await keys.ask(true)
  return key
}

function here() {
  if (away) server.dispatchEvent(new Event('back'))
  else server.dispatchEvent(new Event('answered'))
  away = false
}

/** Look for the server until it is back. */
async function gone() {
  if (away) return
  away = true
  server.dispatchEvent(new Event('away'))
  while (away) {
    await sleep(2000)
    try {
      if ((await fetch('/healthz/ready')).ok) here()
    } catch {
      // still away
    }
  }
}
