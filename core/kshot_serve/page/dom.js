/** Small helpers for the document: nothing here knows what the page is about. */

/**
 * The element with this id; a missing one is a mistake in the page itself.
 * @param {string} id
 * @returns {any}
 */
export function $(id) {
  const found = document.getElementById(id)
  if (!found) throw new Error(`the page has no #${id}`)
  return found
}

/**
 * A new element. Attributes by name; `on…` are listeners; children are text or elements. Text is never read as HTML.
 * @param {string} tag
 * @param {Record<string, any>} [attributes]
 * @param {...(Node | string | null)} children
 * @returns {any}
 */
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag)
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith('on')) made.addEventListener(name.slice(2), value)
    else if (value === true) made.setAttribute(name, '')
    else if (value !== false && value != null) made.setAttribute(name, value)
  }
  made.append(...children.filter((child) => child != null))
  return made
}

/**
 * One of the symbols of index.html; it says nothing to a screen reader.
 * @param {string} name
 */
export function icon(name) {
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg')
  const use = document.createElementNS('http://www.w3.org/2000/svg', 'use')
  use.setAttribute('href', `#i-${name}`)
  svg.setAttribute('class', 'icon')
  svg.setAttribute('aria-hidden', 'true')
  svg.append(use)
  return svg
}

/**
 * Make the children of `parent` those of `items`, in their order. Elements that stay are kept, and so is the focus.
 * @template T
 * @param {Element} parent
 * @param {T[]} items
 * @param {(item: T) => string} key
 * @param {(item: T) => any} make
 * @param {(element: any, item: T) => void} [update]
 */
export function keep(parent, items, key, make, update = () => {}) {
  const old = new Map([...parent.children].map((child) => [/** @type {any} */ (child).dataset.key, child]))
  const wanted = items.map((item) => {
    const element = old.get(key(item)) ?? make(item)
    element.dataset.key = key(item)
    update(element, item)
    return element
  })
  const names = new Set(items.map(key))
  for (const [name, child] of old) if (!names.has(name)) child.remove()
  wanted.forEach((element, i) => {
    if (parent.children[i] !== element) parent.insertBefore(element, parent.children[i] ?? null)
  })
}

/** @param {number} count @param {string} one @param {string} [more] */
export const counted = (count, one, more = `${one}s`) => `${count} ${count === 1 ? one : more}`

/** Never a plain 100 or 0: no answer is as sure as that. Its spaces do not break. @param {number} share */
export const percent = (share) =>
  (share > 0.99 ? '> 99 %' : share < 0.01 ? '< 1 %' : `${Math.round(100 * share)} %`).replaceAll(' ', '\u00a0')

/** With a capital letter and a full stop. @param {string} text */
export const sentence = (text) => `${text.charAt(0).toUpperCase()}${text.slice(1)}${/[.!?…]$/.test(text) ? '' : '.'}`

/** Whether a name has this in it, in large or small letters. @param {string} name @param {string} part */
export const has = (name, part) => name.toLocaleLowerCase().includes(part.trim().toLocaleLowerCase())

/** @param {number} ms */
export const sleep = (ms) => new Promise((done) => setTimeout(done, ms))

/**
 * Open a dialog and wait until it is closed: the value of the button that closed it, '' for Escape.
 * @param {HTMLDialogElement} dialog
 * @returns {Promise<string>}
 */
export function ask(dialog) {
  dialog.returnValue = ''
  dialog.showModal()
  return new Promise((done) => dialog.addEventListener('close', () => done(dialog.returnValue), { once: true }))
}

/**
 * Ask before something that cannot be undone.
 * @param {string} title @param {string} text @param {string} yes
 */
export async function confirmed(title, text, yes) {
  $('confirm-title').textContent = title
  $('confirm-text').textContent = text
  $('confirm-yes').textContent = yes
  return (await ask($('confirm'))) === 'yes'
}

/** Say something to whoever listens rather than looks. @param {string} text */
export function announce(text) {
  $('announce').textContent = text
}

let fading = 0

/**
 * A short note over the head of the page, with something to do about it if there is.
 * @param {string} text
 * @param {{label: string, run: () => void}} [action]
 */
export function toast(text, action) {
  const box = $('toast')
  const button = box.querySelector('button')
  box.querySelector('span').textContent = text
  button.hidden = !action
  button.textContent = action?.label ?? ''
  button.onclick = () => {
    box.hidePopover()
    action?.run()
  }
  if (box.matches(':popover-open')) box.hidePopover() // to come above a dialog that opened since
  box.showPopover()
  clearTimeout(fading)
  fading = setTimeout(() => box.matches(':popover-open') && !box.matches(':hover, :focus-within') && box.hidePopover(), 6000)
}
